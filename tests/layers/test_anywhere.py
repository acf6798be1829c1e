"""The layer wherever Keras has layers: every kind of model, every way to say `training`, every precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.models import bln, one_layer

from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, PopulationStatistics, bln_layer, bln_layers

M = 4
RNG = np.random.default_rng(21)
X = RNG.normal(1.0, 2.0, (12, 6)).astype(np.float32)


# What `training` may be


@pytest.mark.parametrize("training", [True, 1, np.bool_(True), np.True_, tf.constant(True), tf.constant(1)], ids=repr)
def test_training_may_be_said_in_any_way(training) -> None:
    layer = BatchLayerNormalization(M)
    y = layer(X[:M], training=training)
    assert layer.mean_steps.numpy() == 1
    np.testing.assert_array_equal(y, layer(X[:M], training=True))


@pytest.mark.parametrize("training", [None, False, 0, np.bool_(False), tf.constant(False)], ids=repr)
def test_inference_may_be_said_in_any_way_or_not_at_all(training) -> None:
    layer = BatchLayerNormalization(M)
    y = layer(X[:M], training=training)
    assert layer.mean_steps.numpy() == 0
    np.testing.assert_array_equal(y, layer(X[:M]))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_one_graph_holds_both_ways_and_updates_in_training_alone(jit_compile: bool) -> None:
    layer = BatchLayerNormalization(M)
    layer.build((None, 6))

    @tf.function(jit_compile=jit_compile)
    def call(x, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return y, tape.gradient(y, x)

    x = tf.constant(X[:M])
    for training in (False, True, False, True):
        steps = layer.mean_steps.numpy()
        y, gradient = call(x, tf.constant(training))
        assert layer.mean_steps.numpy() == steps + training
        with tf.GradientTape() as tape:
            tape.watch(x)
            expected = reference_layer(layer)(x, training=training)
        if training:
            np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
            np.testing.assert_allclose(gradient, tape.gradient(expected, x), rtol=0, atol=2e-6)
    assert call.experimental_get_tracing_count() == 1


def reference_layer(layer: BatchLayerNormalization) -> BatchLayerNormalization:
    fresh = BatchLayerNormalization.from_config(layer.get_config())
    fresh.build((None, 6))
    fresh.set_weights(layer.get_weights())
    return fresh


@pytest.mark.parametrize("training", [np.True_, np.False_])
def test_a_numpy_bool_within_a_graph_is_a_constant(training) -> None:
    layer = BatchLayerNormalization(M)
    layer.build((None, 6))
    graph = tf.function(lambda x: layer(x, training=training))
    graph(X[:M])
    assert layer.mean_steps.numpy() == training
    assert not any("If" in operation.type for operation in graph.get_concrete_function(X[:M]).graph.get_operations())


def test_training_may_be_an_input_of_the_model() -> None:
    x, training = keras.Input((6,)), keras.Input(batch_shape=(), dtype="bool")
    layer = BatchLayerNormalization(M)
    model = keras.Model([x, training], layer(x, training=training))
    for value, steps in ((False, 0), (True, 1), (False, 1)):
        model([tf.constant(X[:M]), tf.constant(value)])
        assert layer.mean_steps.numpy() == steps


def test_a_frozen_layer_infers_whatever_the_tensor_says() -> None:
    layer = BatchLayerNormalization(M, trainable=False)
    y = tf.function(lambda x, training: layer(x, training=training))(X[:M], tf.constant(True))
    assert layer.mean_steps.numpy() == 0
    np.testing.assert_array_equal(y, layer(X[:M]))


# Where it may be in a model


class Subclassed(keras.Model):
    """BLN as an attribute, in lists, a tuple and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = bln(M, "PPMM", "attribute")
        self.listed = [layers.Dense(5), (bln(M, "PPMM", "in_a_tuple"),)]
        self.named = {"inner": {"deep": [bln(M, "PPMM", "deep")]}}

    def call(self, inputs, training=None):
        return self.named["inner"]["deep"][0](self.listed[1][0](self.listed[0](self.first(inputs))))


def functional() -> keras.Model:
    x = keras.Input((6,))
    shared = bln(M, "PPMM", "shared")
    return keras.Model(x, shared(layers.Dense(6)(shared(x))))


def nested() -> keras.Model:
    inmost = keras.Sequential([keras.Input((6,)), bln(M, "PPMM", "inmost")])
    inner = keras.Sequential([keras.Input((6,)), inmost, bln(M, "PPMM", "inner")])
    return keras.Sequential([keras.Input((6,)), layers.Dense(6), inner, bln(M, "PPMM", "outer")])


def unbuilt() -> keras.Model:
    return keras.Sequential([layers.Dense(5), BatchLayerNormalization(M), layers.Dense(2)])


def of_the_reference() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), bln_layer(True, M), layers.Dense(2)])


def time_distributed() -> keras.Model:
    wrapped = layers.TimeDistributed(BatchLayerNormalization(M))
    return keras.Sequential([keras.Input((6,)), layers.Reshape((3, 2)), wrapped])


USES = {"shared": 2, "time_distributed": 3}  # of a layer in one step


EAGER, GRAPH, XLA = {"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}
KINDS = [functional, nested, Subclassed, unbuilt, of_the_reference, time_distributed]


@pytest.mark.parametrize(
    ("make", "how"),
    [*((make, GRAPH) for make in KINDS), (nested, EAGER), (nested, XLA), (unbuilt, EAGER), (time_distributed, XLA)],
)
def test_every_layer_of_every_kind_of_model_is_trained_and_starts_anew_each_epoch(make, how) -> None:
    model = make()
    model.compile("sgd", lambda truth, y: keras.ops.mean(keras.ops.square(y)), **how)
    model.fit(X, X, batch_size=M, epochs=2, verbose=0, callbacks=[PopulationStatistics()])
    found = bln_layers(model)
    assert found
    for layer in found:
        uses = USES["shared"] if layer.name == "shared" else USES.get(make.__name__, 1)
        assert layer.mean_steps.numpy() == 3 * uses
        assert np.isfinite(layer.population["batch_var"].numpy()).all()


def test_each_time_step_is_one_use() -> None:
    model = time_distributed()
    model(X[:M], training=True)
    (layer,) = bln_layers(model)
    uses = list(X[:M].reshape(M, 3, 2).swapaxes(0, 1))
    for name, expected in reference.population_estimates(uses, M).items():
        np.testing.assert_allclose(layer.population[name].numpy(), expected, rtol=1e-6, atol=1e-7)
    wrapper = layers.TimeDistributed(BatchLayerNormalization(M))
    assert wrapper.compute_output_shape((None, 3, 2)) == (None, 3, 2)


def test_a_mask_reaches_the_layer_behind_and_the_loss() -> None:
    x = RNG.normal(size=(M, 5, 3)).astype(np.float32)
    x[:, 3:] = 0
    model = keras.Sequential([keras.Input((5, 3)), layers.Masking(), bln(M, "PPMM", "bln"), layers.LSTM(2)])
    direct = keras.Sequential([keras.Input((5, 3)), layers.Masking(), bln(M, "PPMM", "bln")])
    assert (np.asarray(direct(x)._keras_mask) == [[True] * 3 + [False] * 2] * M).all()
    moved = x.copy()
    before = model(x).numpy()
    model.layers[1].gamma.assign([1, 1, 1])
    normalised = direct(x).numpy()
    normalised[:, 3:] = 99  # behind the mask: the LSTM does not see it
    after = model.layers[-1](tf.constant(normalised), mask=tf.constant([[True] * 3 + [False] * 2] * M))
    np.testing.assert_allclose(before, after, atol=1e-6)
    assert (moved == x).all()


# Precision


@pytest.mark.parametrize(
    ("dtype", "jit_compile"),
    [
        ("mixed_float16", False),
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        ("float64", False),
        ("float16", False),
    ],
)
def test_a_model_of_any_precision_trains(dtype: str, jit_compile: bool) -> None:
    options = {"dtype": keras.dtype_policies.get(dtype)}
    hidden = [layers.Dense(5, **options), BatchLayerNormalization(M, **options), layers.Dense(2, **options)]
    model = keras.Sequential([keras.Input((6,), dtype="float64" if dtype == "float64" else "float32"), *hidden])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    history = model.fit(X, X[:, :2], batch_size=M, epochs=2, verbose=0, callbacks=[PopulationStatistics()])
    assert np.isfinite(history.history["loss"]).all()
    (layer,) = bln_layers(model)
    assert layer.mean_steps.numpy() == 3
    assert keras.backend.standardize_dtype(layer.population["batch_mean"].dtype) == "float64"
    assert keras.backend.standardize_dtype(layer(X[:M, :5]).dtype) == layer.compute_dtype


def test_whole_numbers_are_normalised_as_their_values() -> None:
    layer = one_layer((3,), M, "MMMM").layers[-1]
    whole = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(layer(whole), layer(whole.astype(np.float32)))
