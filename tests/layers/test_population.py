"""The population estimates are right after every step, whatever training does, against the float64 oracle."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, PopulationStatistics, bln_layers

M, SHAPE = 4, (3, 5)
RTOL = 2e-7  # of a float32 statistic; the running mean itself is kept in float64


def batches(count: int, rows: int = M, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(1.5, 2.0, (count, rows, *SHAPE)).astype(np.float32))


def trained(data: list[np.ndarray]) -> BatchLayerNormalization:
    layer = BatchLayerNormalization(M)
    for x in data:
        layer(x, training=True)
    return layer


def assert_estimates(layer: BatchLayerNormalization, data: list[np.ndarray]) -> None:
    for name, expected in reference.population_estimates(data, layer.batch_size).items():
        actual = layer.population[name].numpy()
        assert np.abs(actual - expected).max() <= RTOL * np.abs(expected).max(), name


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_right_after_any_number_of_steps(steps: int) -> None:
    data = batches(steps)
    assert_estimates(trained(data), data)


def test_a_partial_batch_updates_the_slots_it_has() -> None:
    data = [*batches(3), *batches(1, rows=2, seed=1), *batches(1, rows=1, seed=2)]
    layer = trained(data)
    assert_estimates(layer, data)
    assert layer.slot_steps.numpy().tolist() == [5, 4, 3, 3]
    assert (layer.mean_steps.numpy(), layer.variance_steps.numpy()) == (5, 4)


def test_at_m_1_no_variance_counts_as_estimated() -> None:
    layer = BatchLayerNormalization(1)
    for x in batches(3, rows=1):
        layer(x, training=True)
    assert (layer.mean_steps.numpy(), layer.variance_steps.numpy()) == (3, 0)
    assert (layer.population["batch_var"].numpy() == 1).all()


def test_at_m_1_training_on_outdates_what_was_calibrated() -> None:
    layer = BatchLayerNormalization(1)
    layer.build((1, *batches(1)[0].shape[1:]))
    layer.variance_steps.assign(7.0)
    layer(batches(1, rows=1)[0], training=False)
    assert layer.variance_steps.numpy() == 7
    layer(batches(1, rows=1)[0], training=True)
    assert layer.variance_steps.numpy() == 0


def test_an_offset_costs_no_precision_over_many_steps() -> None:
    layer = BatchLayerNormalization(M)
    step = tf.function(lambda x: layer(x, training=True))
    x = batches(1)[0] + 1000
    for _ in range(2000):
        step(x)
    expected = reference.batch_statistics(x)[0]
    assert np.abs(layer.population["batch_mean"].numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def test_inference_changes_nothing() -> None:
    layer = trained(batches(2))
    before = [weight.numpy() for weight in layer.weights]
    layer(batches(1)[0], training=False)
    assert all((weight.numpy() == value).all() for weight, value in zip(layer.weights, before, strict=True))


def test_a_frozen_layer_infers_and_changes_nothing() -> None:
    layer = trained(batches(2))
    layer.trainable = False
    x = batches(1, seed=3)[0]
    before = [weight.numpy() for weight in layer.weights]
    assert (layer(x, training=True).numpy() == layer(x, training=False).numpy()).all()
    assert all((weight.numpy() == value).all() for weight, value in zip(layer.weights, before, strict=True))


def test_more_rows_than_slots_are_refused_in_training() -> None:
    with pytest.raises(ValueError, match=r"Expected at most 4 rows .* Received: 5"):
        BatchLayerNormalization(M)(batches(1, rows=5)[0], training=True)


def model() -> keras.Model:
    inner = keras.Sequential([keras.Input(SHAPE), BatchLayerNormalization(M, name="inner")])
    x = keras.Input(SHAPE)
    y = BatchLayerNormalization(M, name="outer")(x)
    built = keras.Model(x, inner(y))
    built.compile("sgd", "mse", jit_compile=False)
    built.optimizer.learning_rate = 0.0
    return built


def test_bln_layers_are_found_at_any_depth() -> None:
    assert {layer.name for layer in bln_layers(model())} == {"inner", "outer"}


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_callback_keeps_the_last_epoch_alone_at_any_depth(epochs: int) -> None:
    data = batches(3)
    trainee = model()
    for epoch in range(epochs):
        shift = np.concatenate(data) + 10 * (epochs - 1 - epoch)
        trainee.fit(shift, shift, batch_size=M, shuffle=False, verbose=0, callbacks=[PopulationStatistics()], epochs=1)
    outer, inner = trainee.get_layer("outer"), next(x for x in bln_layers(trainee) if x.name == "inner")
    assert_estimates(outer, data)
    assert inner.mean_steps.numpy() == 3


def test_without_the_callback_the_estimate_runs_on() -> None:
    data = batches(3)
    trainee = model()
    x = np.concatenate(data)
    trainee.fit(x, x, batch_size=M, shuffle=False, verbose=0, epochs=2)
    assert trainee.get_layer("outer").mean_steps.numpy() == 6
    assert_estimates(trainee.get_layer("outer"), data + data)


def test_the_estimate_before_stays_until_the_next_epochs_first_step() -> None:
    layer = trained(batches(2))
    layer.start_new_estimate.assign(1.0)
    assert_estimates(layer, batches(2))
    assert layer.mean_steps.numpy() == 2
    fresh = batches(1, seed=9)
    layer(fresh[0], training=True)
    assert_estimates(layer, fresh)


def test_a_nan_is_gone_with_the_next_estimate() -> None:
    layer = trained([np.full((M, *SHAPE), np.nan, np.float32)])
    assert np.isnan(layer.population["batch_mean"].numpy()).all()
    layer.start_new_estimate.assign(1.0)
    data = batches(2)
    for x in data:
        layer(x, training=True)
    assert_estimates(layer, data)


def test_a_layer_used_twice_averages_over_its_uses() -> None:
    layer = BatchLayerNormalization(M)
    first, second = batches(2)
    layer(first, training=True)
    layer(second, training=True)
    assert layer.mean_steps.numpy() == 2
    assert_estimates(layer, [first, second])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_more_rows_than_slots_never_train_in_a_compiled_step(jit_compile: bool) -> None:
    trainee = model()
    trainee.compile("sgd", "mse", jit_compile=jit_compile)

    def stream():
        for rows in (M, 2 * M):
            x = np.ones((rows, *SHAPE), np.float32)
            yield x, x

    signature = (tf.TensorSpec((None, *SHAPE)), tf.TensorSpec((None, *SHAPE)))
    data = tf.data.Dataset.from_generator(stream, output_signature=signature)
    with pytest.raises(tf.errors.InvalidArgumentError):
        trainee.fit(data, shuffle=False, verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_compiled_fit_with_a_partial_last_batch(jit_compile: bool) -> None:
    data = [*batches(2), *batches(1, rows=3, seed=1)]
    trainee = model()
    trainee.compile("sgd", "mse", jit_compile=jit_compile)
    trainee.optimizer.learning_rate = 0.0
    x = np.concatenate(data)
    trainee.fit(x, x, batch_size=M, shuffle=False, verbose=0)
    assert_estimates(trainee.get_layer("outer"), data)


def test_two_replicas_give_the_mean_over_replicas_and_steps() -> None:
    program = """
import sys
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, PopulationStatistics
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    layer = BatchLayerNormalization(4)
    model = keras.Sequential([keras.Input((3, 5)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
x = np.random.default_rng(0).normal(1.5, 2, (24, 3, 5)).astype("float32")
model.fit(x, x, batch_size=8, shuffle=False, verbose=0, callbacks=[PopulationStatistics()])
expected = reference.population_estimates(np.split(x, 6), 4)
for name, value in expected.items():
    actual = layer.population[name].numpy()
    assert np.abs(actual - value).max() <= 2e-7 * np.abs(value).max(), (name, np.abs(actual - value).max())
assert layer.mean_steps.numpy() == 3
"""
    subprocess.run([sys.executable, "-c", program], check=True)
