"""Embeddings: marked without their tables, lowered to one look-up, and their tables put in at the end."""

from collections.abc import Callable

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import helper, numpy_helper
from support.models import bln, with_random_statistics

from bln_serve.export import conversion, embedding, freezing, marking, saved_model
from bln_serve.export.conversion import Conversion
from bln_serve.export.custom_ops import DOMAIN, EMBEDDING, attributes_of, is_op
from bln_serve.export.marking import MarkedModel
from bln_serve.runtime import OnnxSession

IDS = np.random.default_rng(0).integers(0, 11, (4, 5))


def mark(model: keras.Model) -> MarkedModel:
    return marking.to_marked_onnx(saved_model.describe(model), freezing.freeze(model, None))


def convert(model: keras.Model) -> Conversion:
    return conversion.convert(saved_model.describe(model), freezing.freeze(model, None))


def looked_up(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if is_op(node, EMBEDDING)]


def words(dtype: str = "int32") -> keras.KerasTensor:
    return keras.Input((5,), dtype=dtype, name="words")


def through(layer: layers.Layer, dtype: str = "int32") -> keras.Model:
    x = words(dtype)
    return with_random_statistics(keras.Model(x, bln(4, "PPMM")(layer(x))))


def shared() -> keras.Model:
    x, layer = words(), layers.Embedding(11, 3)
    return keras.Model(x, layer(x) + layer(x[:, ::-1]))


def two_of_one_name() -> keras.Model:
    x = words()
    inner = [keras.Sequential([keras.Input((5,)), layers.Embedding(11, 3, name="same")]) for _ in range(2)]
    return keras.Model(x, inner[0](x) - inner[1](x))


def masked() -> keras.Model:
    x = words()
    return keras.Model(x, layers.LSTM(4)(layers.Embedding(11, 3, mask_zero=True)(x)))


def masked_by_the_plain_conversion() -> keras.Model:
    x = words()
    return keras.Model(x, layers.GlobalAveragePooling1D()(layers.Embedding(11, 3, mask_zero=True)(x)))


def answer_of(converted: Conversion, dtype: str = "int32") -> np.ndarray:
    (answer,) = OnnxSession(converted.model.SerializeToString(), threads=1).run({"words": IDS.astype(dtype)}).values()
    return answer


@pytest.mark.parametrize(
    ("build", "nodes", "tables"),
    [
        (lambda: through(layers.Embedding(11, 3)), 1, 1),
        (shared, 2, 1),
        (two_of_one_name, 2, 2),
        (masked, 1, 1),
        (masked_by_the_plain_conversion, 1, 1),
    ],
)
def test_each_call_is_one_node_and_each_table_is_there_once(
    build: Callable[[], keras.Model], nodes: int, tables: int
) -> None:
    model = build()
    marked = mark(model)
    found = looked_up(marked.model)
    assert len(found) == nodes
    assert {attributes_of(node)["table"] for node in found} == set(marked.tables)
    assert len(marked.tables) == tables
    converted = convert(model)
    assert [node.op_type for node in converted.model.graph.node].count("Gather") >= nodes
    assert np.abs(answer_of(converted) - model(IDS).numpy()).max() <= 1e-6  # sums of a few numbers below 1


def test_a_marked_model_has_no_table_and_the_model_that_ships_has_it_once() -> None:
    model = through(layers.Embedding(11, 3, name="e"))
    marked = mark(model)
    facts = {"layer": "e", "table": "e/embeddings", "input_dim": 11, "output_dim": 3}
    assert facts.items() <= attributes_of(looked_up(marked.model)[0]).items()
    assert "e/embeddings" not in {item.name for item in marked.model.graph.initializer}
    np.testing.assert_array_equal(marked.tables["e/embeddings"], model.get_layer("e").embeddings.numpy())
    shipped = [item for item in convert(model).model.graph.initializer if item.name == "e/embeddings"]
    np.testing.assert_array_equal(numpy_helper.to_array(*shipped), marked.tables["e/embeddings"])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint32", "float32"])
def test_ids_of_any_dtype(dtype: str) -> None:
    model = through(layers.Embedding(11, 3), dtype)
    converted = convert(model)
    assert looked_up(converted.marked)
    assert np.abs(answer_of(converted, dtype) - model(IDS.astype(dtype)).numpy()).max() <= 1e-5


def test_one_half_precision_layer_keeps_a_half_precision_table() -> None:
    model = through(layers.Embedding(11, 3, dtype="mixed_float16", name="e"))
    converted = convert(model)
    (table,) = (item for item in converted.model.graph.initializer if item.name == "e/embeddings")
    assert table.data_type == onnx.TensorProto.FLOAT16
    # Both read the same half-precision table and are exact up to the layer behind it, in float32.
    assert np.abs(answer_of(converted) - model(IDS).numpy()).max() <= 1e-5


class Doubled(layers.Embedding):
    def call(self, inputs):
        return 2 * super().call(inputs)


def with_lora() -> layers.Layer:
    layer = layers.Embedding(11, 3)
    layer.build()
    layer.enable_lora(2)
    layer.lora_embeddings_b.assign(np.ones((2, 3)))
    return layer


@pytest.mark.parametrize("make", [lambda: Doubled(11, 3), with_lora])
def test_an_embedding_that_computes_otherwise_is_left_to_the_plain_conversion(make: Callable[[], layers.Layer]) -> None:
    model = through(make())
    converted = convert(model)
    assert looked_up(converted.marked) == []
    assert np.abs(answer_of(converted) - model(IDS).numpy()).max() <= 1e-5


@pytest.mark.parametrize("shape", [("rows",), ("rows", 5), ("rows", 2, 3)])
def test_lowered_by_hand_it_is_a_look_up_over_axis_0(shape: tuple[str | int, ...]) -> None:
    table = np.random.default_rng(1).normal(size=(11, 3)).astype(np.float32)
    facts = {"layer": "e", "table": "words", "input_dim": 11, "output_dim": 3}
    node = helper.make_node(EMBEDDING, ["ids"], ["y"], name="e", domain=DOMAIN, **facts)
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [*shape, 3])
    other = helper.make_node("Relu", ["y"], ["z"])
    model = helper.make_model(helper.make_graph([node, other], "g", [ids], [y]), ir_version=10)
    model.opset_import[0].version = 18
    embedding.lower(model)
    embedding.inject(model, {"words": table})
    assert [each.op_type for each in model.graph.node] == ["Gather", "Relu"]
    onnx.checker.check_model(model, full_check=True)
    picked = np.random.default_rng(2).integers(0, 11, [4 if size == "rows" else size for size in shape])
    actual = OnnxSession(model.SerializeToString(), threads=1).run({"ids": picked})["y"]
    np.testing.assert_array_equal(actual, table[picked])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_table_is_written_row_by_row_whatever_its_order_in_memory(dtype: type) -> None:
    model, values = onnx.ModelProto(), np.asfortranarray(np.arange(6, dtype=dtype).reshape(2, 3))
    embedding.inject(model, {"t": values})
    (tensor,) = model.graph.initializer
    assert tensor.name == "t"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), values)
