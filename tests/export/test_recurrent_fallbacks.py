"""What no ONNX operator can be runs as the plain conversion makes it: right, and with a line that says so."""

from collections import Counter

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers
from support.recurrent import exported, with_random_weights

from bln_serve.export import embedding, recurrent, recurrent_layers
from bln_serve.export.custom_ops import RECURRENT
from bln_serve.export.marking import marked_nodes
from bln_serve.export.marks import Recorder
from bln_serve.runtime import OnnxSession

TIME, FEATURES, UNITS = 7, 4, 5
RTOL = 2e-6  # float32, as in test_recurrent
HALF_RTOL = 4e-3  # float16 has eleven bits, and seven steps round in another order: 1.2e-3 of max|y| measured


@keras.saving.register_keras_serializable("test_recurrent_fallbacks")
class Doubled(layers.GRU):
    def call(self, sequences, initial_state=None, mask=None, training=False):
        return 2 * super().call(sequences, initial_state, mask, training)


@keras.saving.register_keras_serializable("test_recurrent_fallbacks")
class HalvedCell(layers.SimpleRNNCell):
    def call(self, sequence, states, training=False):
        output, _ = super().call(sequence, states, training)
        return output / 2, [output / 2]


class Holder(layers.Layer):
    """Calls a recurrent layer itself."""

    def __init__(self, inner, **kwargs) -> None:
        super().__init__(**kwargs)
        self.inner = inner

    def build(self, shape) -> None:
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


class OwnModel(keras.Model):
    """A functional model whose call is its own."""

    def call(self, x, training=None, mask=None):
        return super().call(x, training=training) * 2


def sequential(*made, shape=(TIME, FEATURES), dtype: str = "float32") -> keras.Model:
    return keras.Sequential([keras.Input(shape, name="x", dtype=dtype), *made])


def masked(sequences):
    steps = keras.ops.any(sequences > 0.5, axis=-1)
    return layers.LSTM(UNITS, name="layer")(sequences, mask=steps)


def with_mask_argument() -> keras.Model:
    x = keras.Input((TIME, FEATURES), name="x")
    return keras.Model(x, masked(x))


def both(layer, **options) -> layers.Layer:
    return layers.Bidirectional(layer, name="layer", **options)


def inputs_of(callee, rows: int) -> dict[str, np.ndarray]:
    (spec,) = callee.signature.inputs
    generator = np.random.default_rng(rows)
    ids = np.issubdtype(spec.dtype, np.integer)
    shape = (rows, *spec.shape[1:])
    x = generator.integers(0, 9, shape) if ids else generator.normal(0, 1, shape)
    x[:, 2:4] = 0  # steps that Masking and an embedding's zero skip
    return {spec.name: x.astype(spec.dtype)}


def assert_plain(model: keras.Model, *notes: str, rtol: float = RTOL) -> onnx.ModelProto:
    callee, marked = exported(with_random_weights(model))
    assert marked.notes == notes
    lowered = recurrent.lower(marked.model)
    embedding.lower(lowered)
    embedding.inject(lowered, marked.tables)
    session = OnnxSession(lowered.SerializeToString(), threads=1)
    for rows in (1, 2, 25):
        x = inputs_of(callee, rows)
        actual = session.run(x)
        for name, value in callee(*x.values()).items():
            wanted = value.numpy().astype(float)
            np.testing.assert_allclose(actual[name], wanted, rtol=0, atol=rtol * np.abs(wanted).max())
    assert not any(node.op_type == RECURRENT for node in marked_nodes(marked.model))
    return lowered


PLAIN = "layer runs as the plain conversion makes it: "
CASES = {
    "masking": (lambda: sequential(layers.Masking(), layers.GRU(UNITS, name="layer")), "its input is masked"),
    "mask argument": (with_mask_argument, "its input is masked"),
    "masking, both ways": (
        lambda: sequential(layers.Masking(), both(layers.LSTM(UNITS, return_sequences=True))),
        "its input is masked",
    ),
    "masked, with dropout": (
        lambda: sequential(layers.Masking(), layers.LSTM(UNITS, name="layer", dropout=0.5, recurrent_dropout=0.5)),
        "its input is masked",
    ),
    "activation": (
        lambda: sequential(layers.LSTM(UNITS, name="layer", activation="silu")),
        "ONNX Runtime's operators cannot have the activation silu",
    ),
    "activation that overflows": (
        lambda: sequential(layers.Rescaling(100.0), layers.GRU(UNITS, name="layer", activation="softplus")),
        "ONNX Runtime's operators cannot have the activation softplus",
    ),
    "recurrent activation": (
        lambda: sequential(layers.LSTM(UNITS, name="layer", recurrent_activation="sparse_sigmoid")),
        "ONNX Runtime's operators cannot have the activation sparse_sigmoid",
    ),
    "activation backwards": (
        lambda: sequential(
            both(layers.LSTM(3), backward_layer=layers.LSTM(3, activation="selu", go_backwards=True)),
        ),
        "ONNX Runtime's operators cannot have the activation selu",
    ),
    "forward layer backwards": (
        lambda: sequential(both(layers.GRU(3, go_backwards=True), backward_layer=layers.GRU(3))),
        "its forward layer goes backwards",
    ),
    "subclass": (
        lambda: sequential(Doubled(UNITS, name="layer")),
        "its class Doubled may compute something else than ONNX's operators",
    ),
    "subclass, both ways": (
        lambda: sequential(both(Doubled(UNITS))),
        "its class Doubled may compute something else than ONNX's operators",
    ),
    "convolutions": (
        lambda: sequential(layers.ConvLSTM1D(3, 2, name="layer"), shape=(TIME, FEATURES, 2)),
        "its class ConvLSTM1D may compute something else than ONNX's operators",
    ),
    "own cell": (
        lambda: sequential(layers.RNN(HalvedCell(UNITS), name="layer")),
        "its cell HalvedCell may compute something else than ONNX's operators",
    ),
    "stacked cells": (
        lambda: sequential(layers.RNN([layers.LSTMCell(UNITS), layers.GRUCell(3)], name="layer")),
        "its cell StackedRNNCells may compute something else than ONNX's operators",
    ),
    "double precision": (
        lambda: sequential(layers.GRU(UNITS, name="layer", dtype="float64")),
        "ONNX Runtime's operators compute in float32, and it in float64",
    ),
}


@pytest.mark.parametrize(("build", "reason"), CASES.values(), ids=CASES)
def test_plain_with_a_note(build, reason: str) -> None:
    assert_plain(build(), PLAIN + reason)


def test_half_precision() -> None:
    model = sequential(layers.GRU(UNITS, name="layer", dtype="mixed_float16"))
    reason = "ONNX Runtime's operators compute in float32, and it in float16"
    lowered = assert_plain(model, PLAIN + reason, rtol=HALF_RTOL)
    assert Counter(node.op_type for node in lowered.graph.node)["Loop"] == 1


def test_an_embedding_that_masks() -> None:
    model = sequential(
        layers.Embedding(9, 3, mask_zero=True), layers.LSTM(UNITS, name="layer"), shape=(TIME,), dtype="int32"
    )
    assert_plain(model, PLAIN + "its input is masked")


def test_a_mask_that_reaches_two_layers_is_noted_for_both() -> None:
    first = layers.GRU(3, return_sequences=True, name="first")
    notes = [f"{name} runs as the plain conversion makes it: its input is masked" for name in ("first", "second")]
    assert_plain(sequential(layers.Masking(), first, layers.GRU(3, name="second")), *notes)


def refused(layer, x, **kwargs) -> str:
    layer.build(x.shape)
    recorder = Recorder()
    made = recurrent_layers.call(layer, (x,), kwargs, recorder)
    assert isinstance(made, recurrent_layers.Fallback)
    assert not recorder.calls
    return made.reason


def test_a_stateful_layer() -> None:
    assert refused(layers.GRU(3, stateful=True), tf.zeros((2, TIME, FEATURES))) == "it is stateful"


def test_no_time_steps() -> None:
    reason = refused(layers.GRU(3), tf.zeros((2, 0, FEATURES)))
    assert reason.startswith("its input has the shape (2, 0, 4), not (rows, time steps, features)")


def test_an_initial_state_with_rows_of_its_own() -> None:
    reason = refused(layers.LSTM(3), tf.zeros((2, TIME, FEATURES)), initial_state=[tf.zeros((1, 3)), tf.zeros((1, 3))])
    assert reason == "its initial states have the shapes [(1, 3), (1, 3)], not [(2, 3), (2, 3)]"


def test_bfloat16() -> None:
    reason = refused(layers.GRU(3, dtype="mixed_bfloat16"), tf.zeros((2, TIME, FEATURES)))
    assert reason == "ONNX Runtime's operators compute in float32, and it in bfloat16"


def test_another_layer_is_nobodys_business_here() -> None:
    assert recurrent_layers.call(layers.Dense(3), (tf.zeros((2, 3)),), {}, Recorder()) is None


def unmarked(model: keras.Model) -> list[str]:
    """As the marking finds them: it is asked about each layer of the graph, also of nested models."""
    nested = [inner for inner in model.layers if type(inner) in (keras.Sequential, keras.Model, type(model))]
    asked = [layer for each in (model, *nested) for layer in each.layers if layer not in nested]
    return recurrent_layers.unmarked(model, asked)


def inside(layer: str, holder: str) -> str:
    return f"{layer} runs as the plain conversion makes it: {holder} calls it itself, where it cannot be marked"


def test_a_layer_inside_another_one_is_noted() -> None:
    wrapped = layers.TimeDistributed(layers.LSTM(3, name="inner"), name="each_step")
    assert unmarked(sequential(wrapped, shape=(3, TIME, FEATURES))) == [inside("inner", "each_step")]
    held = Holder(both(layers.GRU(3)), name="holder")
    assert unmarked(sequential(held)) == [inside("layer", "holder")]
    model = sequential(layers.TimeDistributed(sequential(layers.LSTM(3, name="deep")), name="each"), shape=(3, 7, 4))
    assert unmarked(model) == [inside("deep", model.layers[0].layer.name)]


def test_a_layer_that_is_also_called_inside_another_one_is_noted() -> None:
    x = keras.Input((TIME, FEATURES), name="x")
    shared = layers.GRU(3, name="shared")
    shared.build((None, TIME, FEATURES))
    assert unmarked(keras.Model(x, shared(x) + Holder(shared, name="holder")(x))) == [inside("shared", "holder")]


def test_every_layer_of_a_model_with_a_call_of_its_own_is_noted() -> None:
    x = keras.Input((TIME, FEATURES), name="x")
    model = OwnModel(x, layers.GRU(3, name="gru")(x), name="own")
    assert recurrent_layers.unmarked(model, []) == [inside("gru", "own")]


def test_layers_of_the_graph_and_of_nested_models_are_not_noted() -> None:
    nested = sequential(both(layers.LSTM(3, return_sequences=True)), layers.RNN(layers.GRUCell(4)))
    assert unmarked(sequential(layers.GRU(FEATURES, return_sequences=True), nested)) == []
