"""Models of every kind around BLN layers of m = 4, all small: what a Keras model may be, and what may stand beside BLN.

Each builder takes a policy's code for the BLN layers and returns a model whose rows nothing else couples.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from bln_serve.layers import bln_layers

from .conversions import WORDS
from .models import bln, with_random_statistics

M, TIME, WIDTH = 4, 3, 6

Builder = Callable[[str], Any]
KINDS: dict[str, Builder] = {}
"""All of them, by name."""


def kind(build: Builder) -> Builder:
    """Enter a builder into `KINDS`, with seeded weights and statistics."""

    def seeded(policy: str) -> Any:
        keras.utils.set_random_seed(2209)
        return with_random_weights(with_random_statistics(build(policy)))

    KINDS[build.__name__] = seeded
    return build


def with_random_weights(model: Any) -> Any:
    """Move what Keras starts at 0 or 1, where many a mistake shows nothing: biases, scales, moving averages."""
    of_bln = {id(weight) for layer in bln_layers(model) for weight in layer.weights}
    generator = np.random.default_rng(5)
    for weight in model.weights:
        if id(weight) not in of_bln and weight.shape and np.ptp(values := weight.numpy()) == 0:
            weight.assign(values + generator.uniform(0.1, 0.6, values.shape))
    return model


# What a model may be


@kind
def functional(policy):
    x = keras.Input((WIDTH,), name="x")
    y = layers.Dense(5, activation="tanh")(bln(M, policy, "a")(x))
    return keras.Model(x, layers.Dense(2, name="y")(bln(M, policy, "b")(y)), name="functional")


@kind
def sequential(policy):
    made = [layers.Dense(5, activation="tanh"), bln(M, policy, "a"), layers.Dense(2), bln(M, policy, "b")]
    return keras.Sequential([keras.Input((WIDTH,), name="x"), *made], name="sequential")


@kind
def sequential_built_on_first_rows(policy):
    model = keras.Sequential([layers.Dense(5, activation="tanh"), bln(M, policy, "a"), layers.Dense(2)])
    model.build((None, WIDTH))
    return model


@kind
def nested(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    inmost = keras.Sequential([keras.Input((5,)), bln(M, policy, "c"), layers.Dense(4)], name="inmost")
    z = keras.Input((TIME * WIDTH,))
    inner = keras.Model(z, inmost(layers.Dense(5, activation="tanh")(bln(M, policy, "b")(z))), name="inner")
    return keras.Model(x, bln(M, policy, "d")(inner(layers.Flatten()(bln(M, policy, "a")(x)))), name="outer")


@kind
def shared_layer(policy):
    x, z = keras.Input((WIDTH,), name="x"), keras.Input((WIDTH,), name="z")
    shared = bln(M, policy, "shared")
    y = layers.Subtract()([shared(x), layers.Dense(WIDTH, activation="tanh")(shared(z))])
    return keras.Model([x, z], layers.Dense(2, name="y")(y), name="shared")


@kind
def shared_model(policy):
    x, z = keras.Input((WIDTH,), name="x"), keras.Input((WIDTH,), name="z")
    tower = keras.Sequential([keras.Input((WIDTH,)), layers.Dense(4, activation="tanh"), bln(M, policy, "tower")])
    return keras.Model({"x": x, "z": z}, layers.Dot(-1, name="likeness")([tower(x), tower(z)]), name="siamese")


@kind
def inputs_and_outputs_as_dicts(policy):
    x = {"numbers": keras.Input((WIDTH,), name="numbers"), "words": keras.Input((TIME,), dtype="int32", name="words")}
    words = bln(M, policy, "a")(layers.Embedding(WORDS, 4)(x["words"]))
    y = bln(M, policy, "b")(layers.Concatenate()([layers.Flatten()(words), x["numbers"]]))
    return keras.Model(x, {"score": layers.Dense(1)(y), "classes": layers.Dense(3)(y)}, name="dicts")


@kind
def inputs_and_outputs_as_lists(policy):
    x = [keras.Input((WIDTH,), name="one"), keras.Input((TIME, WIDTH), name="two")]
    y = layers.Add()([bln(M, policy, "b")(x[1]), layers.RepeatVector(TIME)(bln(M, policy, "a")(x[0]))])
    return keras.Model(x, [layers.Dense(2, name="steps")(y), layers.Dense(1, name="all")(layers.Flatten()(y))])


@kind
def residual(policy):
    x = keras.Input((8, 8, 3), name="x")
    y = layers.Conv2D(9, 3, padding="same", activation="relu")(x)
    z = layers.Conv2D(9, 3, padding="same")(bln(M, policy, "a")(y))
    y = layers.MaxPooling2D()(layers.Add()([y, bln(M, policy, "b")(z)]))
    y = layers.GlobalAveragePooling2D()(bln(M, policy, "c")(layers.SeparableConv2D(4, 3)(y)))
    return keras.Model(x, layers.Softmax()(bln(M, policy, "d")(y)), name="residual")


@kind
def policies_and_m_that_differ(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = bln(M, policy, "a")(layers.Dense(5, activation="tanh")(x))
    y = bln(M + 2, "PPMM", "b")(layers.Dense(4, activation="tanh")(layers.Flatten()(y)))
    return keras.Model(x, layers.Dense(2, name="y")(bln(25, policy, "c")(y)), name="different")


# Subclassed models


class Block(layers.Layer):
    """A layer of a person's own, with BLN inside."""

    def __init__(self, policy, width=5, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(width, activation="tanh"), bln(M, policy)

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.dense.units))

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


class Plain(keras.Model):
    def __init__(self, policy):
        super().__init__(name="plain")
        self.block, self.norm, self.out = Block(policy), bln(M, policy), layers.Dense(2)

    def call(self, x, training=None):
        return self.out(layers.Flatten()(self.block(self.norm(x, training=training), training=training)))


class Recurrent(keras.Model):
    def __init__(self, policy):
        super().__init__(name="recurrent")
        self.lstm, self.norm, self.out = layers.LSTM(5, return_sequences=True), bln(M, policy), layers.GRU(2)

    def call(self, x):
        return self.out(self.norm(self.lstm(x)))


class Several(keras.Model):
    def __init__(self, policy):
        super().__init__(name="several")
        self.norms, self.out = [bln(M, policy, "a"), bln(M, policy, "b")], layers.Dense(2)

    def call(self, x):
        one, two = (x["one"], x["two"]) if isinstance(x, dict) else x
        y = layers.Concatenate()([self.norms[0](one), layers.Flatten()(self.norms[1](two))])
        return {"score": self.out(y), "all": y}


class Around(keras.Model):
    """A functional model with a call of its own around it."""

    def call(self, x, training=None, mask=None):
        return 2.0 * super().call(x, training=training)


def called(model, *shapes, names=()):
    x = [ops.ones((M, *shape)) for shape in shapes]
    model(dict(zip(names, x, strict=True)) if names else x if len(x) > 1 else x[0])
    return model


@kind
def subclassed(policy):
    return called(Plain(policy), (TIME, WIDTH))


@kind
def subclassed_recurrent(policy):
    return called(Recurrent(policy), (TIME, WIDTH))


@kind
def subclassed_on_a_dict(policy):
    return called(Several(policy), (WIDTH,), (TIME, WIDTH), names=("one", "two"))


@kind
def subclassed_on_a_list(policy):
    return called(Several(policy), (WIDTH,), (TIME, WIDTH))


@kind
def subclassed_inside_functional(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    return keras.Model(x, bln(M, policy, "last")(Plain(policy)(x)), name="outer")


@kind
def subclass_of_functional(policy):
    x = keras.Input((WIDTH,), name="x")
    return Around(x, bln(M, policy, "a")(layers.Dense(5)(x)), name="around")


@kind
def custom_layer(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(Block(policy)(x))), name="custom")


# What may go in


def _of_dtype(dtype):
    def build(policy):
        x = keras.Input((TIME, WIDTH), dtype=dtype, name="x")
        y = bln(M, policy, "b")(layers.Dense(5, activation="tanh")(layers.Flatten()(bln(M, policy, "a")(x))))
        return keras.Model(x, layers.Dense(2, name="y")(y), name=f"on_{dtype}")

    build.__name__ = f"bln_on_{dtype}"
    return build


for _dtype in ("int32", "int64", "float16", "bool"):
    kind(_of_dtype(_dtype))


@kind
def words_of_64_bits(policy):
    x = keras.Input((TIME,), dtype="int64", name="words")
    y = bln(M, policy, "a")(layers.Embedding(WORDS, WIDTH)(x))
    return keras.Model(x, layers.Dense(2, name="y")(layers.Flatten()(y)))


@kind
def flags_among_numbers(policy):
    x, flags = keras.Input((WIDTH,), name="x"), keras.Input((WIDTH,), dtype="bool", name="flags")
    y = bln(M, policy, "a")(ops.where(flags, x, -x))
    return keras.Model([x, flags], {"y": layers.Dense(2)(y), "both": ops.logical_and(flags, y > 0)})


@kind
def in_double_precision(policy):
    x = keras.Input((TIME, WIDTH), dtype="float64", name="x")
    norm = bln(M, policy, "a")
    norm.dtype_policy = keras.DTypePolicy("float64")
    return keras.Model(x, layers.Dense(2, dtype="float64")(norm(x)), name="double")


# What may stand beside BLN


@kind
def beside_batch_normalization_and_noise(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.Dropout(0.5)(layers.BatchNormalization()(bln(M, policy, "a")(x)))
    y = layers.GaussianNoise(0.3)(layers.SpatialDropout1D(0.5)(layers.Dense(5, activation="gelu")(y)))
    return keras.Model(x, bln(M, policy, "b")(layers.BatchNormalization()(layers.Flatten()(y))))


@kind
def beside_other_normalizations(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.LayerNormalization()(bln(M, policy, "a")(layers.LayerNormalization()(x)))
    y = layers.GroupNormalization(2)(layers.UnitNormalization()(bln(M, policy, "b")(y)))
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "c")(layers.RMSNormalization()(y))))


@kind
def between_attention(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.MultiHeadAttention(2, 3)(bln(M, policy, "a")(x), x)
    y = bln(M, policy, "b")(layers.Add()([x, y]))
    y = layers.Concatenate()([layers.Attention()([y, x]), layers.AdditiveAttention()([y, x])])
    y = layers.GroupQueryAttention(3, 2, 1)(y, y, use_causal_mask=True)
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "c")(y)), name="attention")


@kind
def behind_masking(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.Masking(0.0)(ops.where(x[:, :, :1] > 1.0, 0.0, x))
    y = layers.LSTM(4, return_sequences=True, name="lstm")(y)
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "a")(y)), name="masking")


@kind
def behind_a_masked_embedding(policy):
    x = keras.Input((TIME,), dtype="int32", name="words")
    y = layers.Embedding(WORDS, WIDTH, mask_zero=True)(x)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    return keras.Model(x, bln(M, policy, "a")(layers.GlobalAveragePooling1D()(y)), name="masked_words")


@kind
def inside_time_distributed(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.TimeDistributed(bln(M, policy, "a"))(layers.TimeDistributed(layers.Dense(5, activation="tanh"))(x))
    return keras.Model(x, layers.Dense(2)(y), name="time_distributed")


@kind
def a_model_inside_time_distributed(policy):
    x = keras.Input((TIME, 6, 6, 2), name="x")
    inner = [layers.Conv2D(4, 3, activation="relu"), bln(M, policy, "a"), layers.Flatten(), layers.Dense(5)]
    y = layers.TimeDistributed(keras.Sequential([keras.Input((6, 6, 2)), *inner]))(x)
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "b")(y)), name="video")


@kind
def between_recurrent_layers(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.LSTM(5, return_sequences=True, recurrent_dropout=0.2)(x)
    y = layers.Bidirectional(layers.GRU(3, return_sequences=True))(bln(M, policy, "a")(y))
    y = layers.SimpleRNN(4, return_sequences=True)(bln(M, policy, "b")(y))
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "c")(y[:, -1])), name="recurrent")


@kind
def between_convolutions_over_time(policy):
    x = keras.Input((8, WIDTH), name="x")
    y = bln(M, policy, "a")(layers.Conv1D(12, 3, padding="causal", dilation_rate=2)(x))
    y = layers.Conv1DTranspose(4, 3)(layers.PReLU()(y))
    y = layers.ZeroPadding1D(1)(layers.UpSampling1D(2)(bln(M, policy, "b")(y)))
    return keras.Model(x, layers.Permute((2, 1))(layers.AveragePooling1D(2)(y)), name="over_time")


@kind
def images_transposed(policy):
    x = keras.Input((6, 6, 3), name="x")
    y = bln(M, policy, "a")(layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x))
    y = layers.Conv2D(5, 3, groups=1, padding="same")(layers.Permute((2, 1, 3))(bln(M, policy, "b")(y)))
    return keras.Model(x, bln(M, policy, "c")(layers.DepthwiseConv2D(3)(y)), name="images")


@kind
def preprocessing(policy):
    x = keras.Input((6, 6, 3), dtype="uint8", name="x")
    y = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 1.0, 2.0])(layers.Rescaling(1 / 10.0, -1)(x))
    y = layers.CenterCrop(4, 4)(layers.Resizing(5, 5)(y))
    return keras.Model(x, layers.Flatten()(bln(M, policy, "a")(y)), name="preprocessing")


# Time folded into the rows


def folded(x):
    return ops.reshape(x, (-1, x.shape[-1]))


def unfolded(x):
    return ops.reshape(x, (-1, TIME, x.shape[-1]))


@keras.saving.register_keras_serializable("kinds")
class Folded(layers.Layer):
    """BLN over all steps of all rows."""

    def __init__(self, policy, **kwargs):
        super().__init__(**kwargs)
        self.norm = bln(TIME * M, policy)

    def build(self, shape):
        self.norm.build((None, shape[-1]))

    def call(self, x):
        return unfolded(self.norm(folded(x)))


@kind
def time_folded_into_rows(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    y = bln(TIME * M, policy, "a")(layers.Dense(5, activation="tanh")(folded(x)))
    return keras.Model(x, layers.Dense(2)(bln(M, policy, "b")(layers.Flatten()(unfolded(y)))), name="folded")


@kind
def time_folded_inside_a_layer(policy):
    x = keras.Input((TIME, WIDTH), name="x")
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(Folded(policy)(x))), name="folded_inside")
