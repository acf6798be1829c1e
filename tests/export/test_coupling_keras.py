"""Row coupling of what the converter makes of Keras layers: loops, attention, masks. What is safe must be proved so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf2onnx
from keras import layers, ops
from support.models import bln, with_random_statistics
from support.row_probe import contradictions, observe, states

from bln_serve.export import freezing, marking, saved_model
from bln_serve.export.coupling import analyse
from bln_serve.statistics import RowCoupling


def x(*shape: int) -> Any:
    return keras.Input(shape or (5, 6), name="x")


def tokens() -> Any:
    return keras.Input((5,), dtype="int32", name="x")


def converted(model: keras.Model) -> onnx.ModelProto:
    """Convert a model as it is, without marking anything."""
    spec = tf.TensorSpec((None, *model.inputs[0].shape[1:]), model.inputs[0].dtype, name="x")
    call = tf.function(lambda each: model(each, training=False), input_signature=[spec])
    return tf2onnx.convert.from_function(call, input_signature=[spec], opset=18)[0]


def marked(model: keras.Model) -> onnx.ModelProto:
    frozen = freezing.freeze(with_random_statistics(model), None)
    return marking.to_marked_onnx(saved_model.describe(model), frozen).model


def recurrent() -> keras.Model:
    image = x()
    y = layers.Bidirectional(layers.GRU(4, return_sequences=True))(image)
    y = layers.LSTM(3, return_sequences=True, recurrent_dropout=0.2)(y)
    return keras.Model(image, layers.SimpleRNN(3)(y))


def masked() -> keras.Model:
    words = tokens()
    y = layers.Embedding(20, 4, mask_zero=True)(words)
    y = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(y)
    return keras.Model(words, layers.Dense(2)(layers.GRU(3)(y)))


def attention() -> keras.Model:
    y = start = x()
    y = layers.LayerNormalization()(layers.Add()([y, layers.MultiHeadAttention(2, 3)(y, y)]))
    y = layers.MultiHeadAttention(2, 4)(y, y, use_causal_mask=True)
    return keras.Model(start, layers.Softmax()(layers.Attention()([y, y])))


def convolutional() -> keras.Model:
    image = x(8, 8, 4)
    y = layers.MaxPooling2D()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(image)))
    y = layers.UpSampling2D()(layers.GroupNormalization(2)(layers.DepthwiseConv2D(3)(layers.ZeroPadding2D()(y))))
    y = layers.Conv2DTranspose(3, 3, strides=2)(y)
    return keras.Model(image, layers.UnitNormalization()(layers.GlobalAveragePooling2D()(y)))


def distributed() -> keras.Model:
    frames = x(3, 6, 6, 2)
    y = layers.TimeDistributed(layers.Conv2D(3, 3))(frames)
    y = layers.TimeDistributed(layers.Flatten())(y)
    return keras.Model(
        frames, layers.Reshape((4, -1))(layers.Permute((2, 1))(layers.TimeDistributed(layers.Dense(4))(y)))
    )


def convolutional_loop() -> keras.Model:
    frames = x(3, 6, 2)
    return keras.Model(frames, layers.ConvLSTM1D(2, 2)(frames))


SAFE = (recurrent, masked, attention, convolutional, distributed, convolutional_loop)
COUPLED: dict[str, Callable[[Any], Any]] = {
    "less the mean of the rows": lambda y: y - ops.mean(y, axis=0, keepdims=True),
    "softmax over the rows": lambda y: ops.softmax(y, axis=0),
    "rows rolled": lambda y: ops.roll(y, 1, axis=0),
    "every row times every other": lambda y: ops.matmul(ops.matmul(y[:, 0], ops.transpose(y[:, 0])), y[:, 0]),
}


@pytest.mark.parametrize("build", SAFE)
def test_what_treats_rows_alone_is_proved_through_the_converter(build: Callable[[], keras.Model]) -> None:
    keras.utils.set_random_seed(0)
    model = converted(build())
    found = analyse(model)
    assert (found.row_coupling, found.outputs_without_rows) == (RowCoupling.INDEPENDENT, ()), found
    random = np.random.default_rng(0)
    value = model.graph.input[0]
    shape = [4, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])]
    is_token = value.type.tensor_type.elem_type == onnx.TensorProto.INT32
    drawn = [
        random.integers(0, 20, shape).astype(np.int32) if is_token else random.normal(size=shape).astype(np.float32)
        for _ in range(2)
    ]
    rows, runs = observe(model, {value.name: drawn[0]}, {value.name: drawn[1]})
    claims = {value.name: states(model)[value.name] for value in model.graph.output}
    assert len(runs) == 10
    assert not list(contradictions(claims, rows, runs))


@pytest.mark.parametrize("change", COUPLED.values(), ids=COUPLED)
def test_what_couples_rows_is_seen_through_the_converter(change: Callable[[Any], Any]) -> None:
    start = x()
    assert analyse(converted(keras.Model(start, change(layers.Dense(4)(start))))).row_coupling is RowCoupling.MINI_BATCH


def masked_with_bln(policy: str) -> keras.Model:
    words = tokens()
    y = layers.LSTM(8, return_sequences=True)(layers.Embedding(20, 4, mask_zero=True)(words))
    y = layers.LSTM(4)(bln(4, policy, "bln1")(y))
    return keras.Model(words, layers.Dense(3)(bln(4, policy, "bln2")(y)))


@pytest.mark.parametrize(
    ("policy", "coupling", "reason"),
    [
        ("PPMM", RowCoupling.INDEPENDENT, "every operation treats each row alone"),
        ("PPPM", RowCoupling.POSITIONAL, "bln1: feature mean is stored by slot"),
        ("MPMM", RowCoupling.MINI_BATCH, "bln1: batch mean is live"),
    ],
)
def test_a_masked_model_couples_as_its_layers_do(policy: str, coupling: RowCoupling, reason: str) -> None:
    found = analyse(marked(masked_with_bln(policy)))
    assert (found.row_coupling, found.reason) == (coupling, reason)
    assert sorted(found.layer_rows.values()) == [1, 1]


def test_a_layer_behind_a_fold_has_as_many_rows_as_there_are_steps() -> None:
    start = x()
    y = ops.reshape(bln(4, "MMMM", "folded")(ops.reshape(start, (-1, 6))), (-1, 5, 6))
    found = analyse(marked(keras.Model(start, y)))
    assert list(found.layer_rows.values()) == [5]
    assert found.reason == "folded: batch mean and batch variance are live"


@pytest.mark.parametrize(
    ("name", "coupling"),
    [
        ("digits_cnn", RowCoupling.INDEPENDENT),
        ("digits_rnn", RowCoupling.MINI_BATCH),
        ("tiny_mpmm", RowCoupling.MINI_BATCH),
        ("tiny_pppp", RowCoupling.POSITIONAL),
        ("tiny_two_inputs", RowCoupling.INDEPENDENT),
    ],
)
def test_a_recorded_artifact_is_proved_to_couple_as_its_manifest_says(
    golden_artifacts: Path, name: str, coupling: RowCoupling
) -> None:
    found = analyse(onnx.load(golden_artifacts / name / "1" / "model.onnx"))
    assert (found.row_coupling, found.outputs_without_rows) == (coupling, ())
