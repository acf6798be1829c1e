"""The canary of the marking: each BLN call is one custom node, however the model is put together."""

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import helper, numpy_helper
from support.models import bln, with_random_statistics

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import freezing, marking, saved_model
from bln_serve.export.marking import DOMAIN, OP_TYPE, TABLES, marked_nodes


def mark(model: keras.Model) -> onnx.ModelProto:
    frozen = freezing.freeze(with_random_statistics(model), None)
    return marking.to_marked_onnx(saved_model.describe(model), frozen, marking.CONVERTER_OPSET)


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
    nodes = marked_nodes(mark(build()))
    assert [(node.domain, node.op_type) for node in nodes] == [(DOMAIN, OP_TYPE)] * calls


def test_a_marked_node_carries_its_layers_tables_and_facts() -> None:
    model = sequential()
    marked = mark(model)
    layer = model.get_layer("b")
    node = next(n for n in marked_nodes(marked) if helper.get_node_attr_value(n, "layer") == b"b")
    stored = {item.name: numpy_helper.to_array(item) for item in marked.graph.initializer}
    values = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
    for name, key in zip(TABLES, node.input[1:], strict=True):
        np.testing.assert_array_equal(stored[key], values[name].numpy().astype(np.float64))
    assert helper.get_node_attr_value(node, "m") == 2
    assert helper.get_node_attr_value(node, "policy") == b"PPPP"


def test_the_batch_dimension_is_free_and_named_also_for_a_static_input() -> None:
    marked = mark(static_batch_size())
    for value in (*marked.graph.input, *marked.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "rows"


def test_the_model_answers_as_before_once_the_marking_is_over() -> None:
    model = functional()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mark(model)
    before = model(x).numpy()
    mark(model)
    np.testing.assert_array_equal(model(x).numpy(), before)


def test_time_folded_into_the_rows_is_refused() -> None:
    x = keras.Input((3, 6))
    folded = keras.ops.reshape(x, (-1, 6))
    model = keras.Model(x, keras.ops.reshape(bln(4, "PPMM", "folded")(folded), (-1, 3, 6)))
    with pytest.raises(UnsupportedModelError, match=r"axis 0 of layer 'folded' to be the request's rows. Received: 21"):
        mark(model)


def test_a_lost_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = marking._convert

    def convert_and_lose(*arguments):
        model = convert(*arguments)
        model.graph.node.remove(marked_nodes(model)[0])
        return model

    monkeypatch.setattr(marking, "_convert", convert_and_lose)
    with pytest.raises(UnsupportedModelError, match="Expected 2 marked Batch Layer Normalization nodes .* Received: 1"):
        mark(functional())
