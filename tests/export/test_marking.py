"""The canary of the marking: each BLN call is one custom node, however the model is put together."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import numpy_helper
from support.models import bln, with_random_statistics

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import freezing, marking, saved_model, tf_to_onnx
from bln_serve.export.custom_ops import (
    BATCH_LAYER_NORMALIZATION,
    DOMAIN,
    EMBEDDING,
    RECURRENT,
    TABLES,
    attributes_of,
    is_op,
)
from bln_serve.export.marking import MarkedModel, marked_nodes
from bln_serve.layers import BatchLayerNormalization
from bln_serve.statistics import StatisticsPolicy


def mark(model: keras.Model) -> MarkedModel:
    frozen = freezing.freeze(with_random_statistics(model), None)
    return marking.to_marked_onnx(saved_model.describe(model), frozen)


def facts_of(marked: MarkedModel) -> dict[str, Mapping[str, Any]]:
    """Return the attributes of the BLN nodes by the layer's name."""
    nodes = [attributes_of(node) for node in marked_nodes(marked.model) if is_op(node, BATCH_LAYER_NORMALIZATION)]
    return {facts["layer"]: facts for facts in nodes}


def functional() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, bln(4, "PPMM", "b")(layers.Dense(5)(bln(4, "MMMM", "a")(x))))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), bln(4, "PPMM", "a"), layers.Dense(5), bln(2, "PPPP", "b")])


def nested() -> keras.Model:
    x = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5), bln(4, "PPMM", "b")])
    return keras.Model(x, inner(bln(4, "PPMM", "a")(x)))


def shared_layer_on_one_input() -> keras.Model:
    x = keras.Input((6,))
    twice = bln(4, "PPMM", "shared")
    return keras.Model(x, layers.Add()([twice(x), layers.Dense(6)(twice(x))]))


def static_batch_size() -> keras.Model:
    x = keras.Input((6,), batch_size=4)
    return keras.Model(x, bln(4, "PPMM", "b")(layers.Dense(5)(bln(4, "MMMM", "a")(x))))


@pytest.mark.parametrize(
    ("build", "calls"),
    [(functional, 2), (sequential, 2), (nested, 2), (shared_layer_on_one_input, 2), (static_batch_size, 2)],
)
def test_as_many_marked_nodes_as_calls(build, calls: int) -> None:
    nodes = marked_nodes(mark(build()).model)
    assert [(node.domain, node.op_type) for node in nodes] == [(DOMAIN, BATCH_LAYER_NORMALIZATION)] * calls


def test_a_marked_node_carries_its_layers_tables_and_facts() -> None:
    model = sequential()
    marked = mark(model)
    assert_tables(marked.model, "b", model.get_layer("b"))
    facts = facts_of(marked)["b"]
    assert (facts["m"], facts["policy"], facts["dtype"], facts["rows_per_row"]) == (2, "PPPP", "float32", 1)
    # As text, and so to the last digit of a float64.
    assert (facts["epsilon"], facts["w_b"], facts["w_f"]) == ("0.001", repr(1 - (1 / 2 + 1e-4)), repr(1 / 2 - 1e-4))


@pytest.mark.parametrize("policy", ["PPPP", "PPMM"])
def test_a_pooled_layers_feature_tables_have_one_row_and_nothing_else_is_another(policy: str) -> None:
    model = with_random_statistics(sequential())
    layer = model.get_layer("b")
    layer.policy = StatisticsPolicy.from_code(policy)
    layer.slot_steps.assign([3.0, 1.0])
    nodes = {}
    for layer.feature_slots in ("keep", "pool"):
        marked = marking.to_marked_onnx(saved_model.describe(model), freezing.freeze(model, None)).model
        (node,) = (each for each in marked_nodes(marked) if attributes_of(each)["layer"] == "b")
        stored = {item.name: numpy_helper.to_array(item) for item in marked.graph.initializer}
        nodes[layer.feature_slots] = attributes_of(node), [stored[name] for name in node.input[1:]]
    (kept_facts, kept), (facts, pooled) = nodes.values()
    assert facts == kept_facts
    for name, by_slot, one in zip(TABLES, kept, pooled, strict=True):
        feature = name.startswith("feature")
        expected = (by_slot[:1] * 3 + by_slot[1:]) / 4 if feature else by_slot
        # float64, in another order of operations
        np.testing.assert_allclose(one, expected, rtol=1e-15, atol=0, strict=True)


def assert_tables(marked: onnx.ModelProto, name: str, layer: BatchLayerNormalization) -> None:
    node = next(node for node in marked_nodes(marked) if attributes_of(node)["layer"] == name)
    stored = {item.name: numpy_helper.to_array(item) for item in marked.graph.initializer}
    values = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
    for table, key in zip(TABLES, node.input[1:], strict=True):
        np.testing.assert_array_equal(stored[key], values[table].numpy().astype(np.float64))


def test_layers_of_one_name_in_two_nested_models_have_each_their_own_tables_policy_and_name() -> None:
    x = keras.Input((6,))
    inner = [keras.Sequential([keras.Input((6,)), bln(4, policy, "same")]) for policy in ("PPMM", "MMPP")]
    model = keras.Model(x, inner[0](x) - inner[1](x))
    marked = mark(model)
    assert {name: facts["policy"] for name, facts in facts_of(marked).items()} == {"same": "PPMM", "same_2": "MMPP"}
    for name, each in zip(("same", "same_2"), inner, strict=True):
        assert_tables(marked.model, name, each.get_layer("same"))
    names = [item.name for item in freezing.freeze(model, None)]
    assert names == ["same", "same_2"]


def test_numbered_names_meet_no_other_layers_name() -> None:
    x = keras.Input((6,))
    inner = [keras.Sequential([keras.Input((6,)), bln(4, "PPMM", name)]) for name in ("same", "same", "same_2")]
    model = with_random_statistics(keras.Model(x, [each(x) for each in inner]))
    assert [item.name for item in freezing.freeze(model, None)] == ["same", "same_2", "same_2_2"]


def test_recurrent_layers_and_embeddings_are_marked_too_in_the_order_of_their_calls() -> None:
    x = keras.Input((5,), dtype="int32")
    y = bln(4, "PPMM", "b")(layers.LSTM(3, return_sequences=True)(layers.Embedding(9, 4, name="words")(x)))
    marked = mark(keras.Model(x, layers.GRU(2)(y)))
    found = [node.op_type for node in marked_nodes(marked.model)]
    assert found == [EMBEDDING, RECURRENT, BATCH_LAYER_NORMALIZATION, RECURRENT]
    assert (list(marked.tables), marked.notes) == (["words/embeddings"], ())


def test_a_layer_inside_a_wrapper_is_marked_by_its_own_call() -> None:
    x = keras.Input((3, 6))
    y = layers.TimeDistributed(bln(4, "PPMM", "steps"))(x)
    assert [facts["layer"] for facts in map(attributes_of, marked_nodes(mark(keras.Model(x, y)).model))] == [
        "steps"
    ] * 3


def test_a_half_precision_layers_node_keeps_its_dtype() -> None:
    x = keras.Input((6, 4))
    layer = BatchLayerNormalization(4, dtype="mixed_float16", name="half")
    layer.policy = StatisticsPolicy.from_code("PPMM")
    marked = mark(keras.Model(x, layer(x))).model
    (value,) = onnx.shape_inference.infer_shapes(marked).graph.output
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert attributes_of(marked_nodes(marked)[0])["dtype"] == "float16"


def test_the_batch_dimension_is_free_and_named_also_for_a_static_input() -> None:
    marked = mark(static_batch_size()).model
    for value in (*marked.graph.input, *marked.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "rows"


def test_the_model_answers_as_before_once_the_marking_is_over() -> None:
    model = functional()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mark(model)
    before = model(x).numpy()
    mark(model)
    np.testing.assert_array_equal(model(x).numpy(), before)


def folded(steps: int) -> keras.Model:
    """Return a model whose layer sees each row as `steps` rows of its own."""
    x = keras.Input((6, 6))
    y = bln(4, "PPMM", "folded")(keras.ops.reshape(x, (-1, 36 // steps)))
    return keras.Model(x, keras.ops.reshape(y, (-1, 6, 6)))


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_time_folded_into_the_rows_is_counted(steps: int) -> None:
    marked = mark(folded(steps))
    assert marked.rows_per_row == {"folded": steps}
    assert facts_of(marked)["folded"]["rows_per_row"] == steps


def test_rows_that_are_no_whole_number_of_a_requests_rows_are_refused() -> None:
    x = keras.Input((6,))
    model = keras.Model(x, keras.ops.reshape(bln(4, "PPMM", "folded")(keras.ops.reshape(x, (-1, 14))), (-1, 6)))
    with pytest.raises(UnsupportedModelError, match="axis 0 of layer 'folded' to be .* Received: 3 for 7 rows"):
        mark(model)


def test_a_row_too_many_is_refused() -> None:
    x = keras.Input((6,))
    longer = layers.Lambda(lambda x: keras.ops.concatenate([x, x[:1]], axis=0), output_shape=(6,))(x)
    model = keras.Model(x, bln(4, "PPMM", "longer")(longer)[:-1,])
    with pytest.raises(
        UnsupportedModelError, match=r"axis 0 of layer 'longer' to be the request's rows, .* Received: 8"
    ):
        mark(model)


def test_a_layer_used_on_different_numbers_of_rows_is_refused() -> None:
    x = keras.Input((2, 6))
    twice = bln(4, "PPMM", "twice")
    whole = twice(x[:, 0])
    model = keras.Model(x, [whole, keras.ops.reshape(twice(keras.ops.reshape(x, (-1, 6))), (-1, 2, 6))])
    with pytest.raises(
        UnsupportedModelError, match="the same whole number of entries for each. Received: .* for 7 rows"
    ):
        mark(model)


def lose(model: onnx.ModelProto) -> None:
    model.graph.node.remove(marked_nodes(model)[0])


def confuse(model: onnx.ModelProto) -> None:
    first, second = marked_nodes(model)
    second.attribute[0].CopyFrom(first.attribute[0])


@pytest.mark.parametrize(("fault", "received"), [(lose, 1), (confuse, 2)])
def test_a_node_that_is_lost_or_stands_for_two_calls_is_noticed(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[onnx.ModelProto], None], received: int
) -> None:
    convert = tf_to_onnx.convert

    def convert_badly(*arguments):
        model = convert(*arguments)
        fault(model)
        return model

    monkeypatch.setattr(tf_to_onnx, "convert", convert_badly)
    message = f"Expected 2 marked nodes in the main graph, one a call of a Batch Layer .* Received: {received}"
    with pytest.raises(UnsupportedModelError, match=message):
        mark(functional())


def test_a_layer_inside_a_loop_is_noticed() -> None:
    class Repeated(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = bln(4, "PPMM", "inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return keras.ops.fori_loop(0, 3, lambda _, y: self.inner(y), x)

    x = keras.Input((6,))
    with pytest.raises(UnsupportedModelError, match="A layer inside a loop, or one whose output is not used"):
        mark(keras.Model(x, Repeated()(x)))
