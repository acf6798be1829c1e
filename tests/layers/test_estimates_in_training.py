"""The population estimates at any moment of a training: however it is fed, stopped, interrupted, saved and resumed."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, PopulationStatistics, bln_layers

M, SHAPE = 4, (3, 5)
RTOL = 2e-7  # of a float32 statistic; the running mean itself is kept in float64
DATA = list(np.random.default_rng(0).normal(1.5, 2.0, (12, M, *SHAPE)).astype(np.float32))


def trainee(**arguments) -> keras.Model:
    """Return a model that learns nothing, so that its BLN layer sees the data of every epoch as it is."""
    model = keras.Sequential([keras.Input(SHAPE), BatchLayerNormalization(M, name="bln")])
    model.compile(keras.optimizers.SGD(0.0), "mse", **{"jit_compile": False, **arguments})
    return model


def fit(model: keras.Model, batches, *callbacks, epochs: int = 1, **arguments) -> None:
    x = np.concatenate(batches)
    callbacks = [PopulationStatistics(), *callbacks]
    model.fit(x, x, batch_size=M, shuffle=False, verbose=0, epochs=epochs, callbacks=callbacks, **arguments)


def assert_estimates(model: keras.Model, batches) -> None:
    (layer,) = bln_layers(model)
    assert layer.mean_steps.numpy() == len(batches)
    for name, expected in reference.population_estimates(batches, M).items():
        assert np.abs(layer.population[name].numpy() - expected).max() <= RTOL * np.abs(expected).max(), name


class AfterBatch(keras.callbacks.Callback):
    """Does something to the model after one batch of an epoch."""

    def __init__(self, index: int, action) -> None:
        super().__init__()
        self.index, self.action = index, action

    def on_train_batch_end(self, batch, logs=None) -> None:
        if batch == self.index:
            self.action(self.model)


def test_right_after_every_step_of_every_epoch() -> None:
    seen = []

    def check(model) -> None:
        seen.append(None)
        assert_estimates(model, DATA[: (len(seen) - 1) % 5 + 1])

    fit(trainee(run_eagerly=True), DATA[:5], *(AfterBatch(index, check) for index in range(5)), epochs=2)
    assert len(seen) == 10


@pytest.mark.parametrize(("steps", "steps_per_execution"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (3, 3)])
def test_few_steps_an_epoch_with_several_in_one_execution(steps: int, steps_per_execution: int) -> None:
    model = trainee(steps_per_execution=steps_per_execution)
    fit(model, DATA[:steps], epochs=2)
    assert_estimates(model, DATA[:steps])


@pytest.mark.parametrize("steps_per_execution", [2, 3])
def test_several_steps_in_one_execution_with_a_partial_last_batch(steps_per_execution: int) -> None:
    model = trainee(steps_per_execution=steps_per_execution)
    batches = [*DATA[:6], DATA[6][:3]]
    fit(model, batches, epochs=2)
    assert_estimates(model, batches)


@pytest.mark.parametrize("rows", [None, M])
def test_an_unknown_number_of_steps(rows: int | None) -> None:
    model = trainee()
    batches = [*DATA[:5], DATA[5] if rows else DATA[5][:2]]
    signature = (tf.TensorSpec((rows, *SHAPE)),) * 2

    def stream():
        for x in batches:
            yield x, x

    data = tf.data.Dataset.from_generator(stream, output_signature=signature)
    with pytest.warns(UserWarning, match="Your input ran out of data"):  # Keras says so of whatever has no length
        model.fit(data, epochs=2, shuffle=False, verbose=0, callbacks=[PopulationStatistics()])
    assert_estimates(model, batches)
    with pytest.warns(UserWarning, match="Your input ran out of data"):
        model.fit(((x, x) for x in DATA[:3]), verbose=0, shuffle=False, callbacks=[PopulationStatistics()])
    assert_estimates(model, DATA[:3])


def test_stopped_in_the_middle_of_an_epoch_and_fitted_again() -> None:
    model = trainee()
    fit(model, DATA[:6], AfterBatch(2, lambda model: setattr(model, "stop_training", True)), epochs=3)
    assert_estimates(model, DATA[:3])
    fit(model, DATA[6:10])
    assert_estimates(model, DATA[6:10])


def test_early_stopping_brings_the_best_epochs_estimates_back() -> None:
    model = trainee()
    stop = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=1, restore_best_weights=True)
    validation = [np.concatenate(DATA[10:])] * 2
    kept = []

    def remember(epoch, logs=None) -> None:
        kept.append([weight.numpy() for weight in model.weights])

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=remember), stop]
    fit(model, DATA[:3], *callbacks, epochs=5, validation_data=validation)
    assert len(kept) == 2
    assert_estimates(model, DATA[:3])
    for weight, best in zip(model.weights, kept[0], strict=True):
        np.testing.assert_array_equal(weight.numpy(), best)


def test_an_exception_in_the_middle_of_an_epoch_and_fitted_again() -> None:
    model = trainee()

    def fail(_model) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, DATA[:6], AfterBatch(3, fail))
    assert_estimates(model, DATA[:4])
    fit(model, DATA[5:8])
    assert_estimates(model, DATA[5:8])


def test_a_step_that_is_refused_leaves_the_estimates_as_they_were() -> None:
    model = trainee()
    fit(model, DATA[:2])
    graph = tf.function(lambda x: model(x, training=True), input_signature=[tf.TensorSpec((None, *SHAPE))])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Expected at most 4 rows"):
        graph(np.concatenate(DATA[:2]))
    assert_estimates(model, DATA[:2])


def test_several_fits_each_start_anew_and_without_the_callback_go_on() -> None:
    model = trainee()
    fit(model, DATA[:3])
    fit(model, DATA[3:8])
    assert_estimates(model, DATA[3:8])
    x = np.concatenate(DATA[8:10])
    model.fit(x, x, batch_size=M, shuffle=False, verbose=0)
    assert_estimates(model, DATA[3:10])


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_train_on_batch_with_evaluate_and_predict_in_between(run_eagerly: bool) -> None:
    model = trainee(run_eagerly=run_eagerly)
    for index, x in enumerate(DATA[:4]):
        model.train_on_batch(x, x)
        model.evaluate(DATA[8], DATA[8], verbose=0)
        model.predict(DATA[9], verbose=0)
        model.test_on_batch(DATA[10], DATA[10])
        assert_estimates(model, DATA[: index + 1])


def test_validation_within_fit_is_not_part_of_the_estimate() -> None:
    model = trainee()
    fit(model, DATA[:3], epochs=2, validation_data=(np.concatenate(DATA[8:]),) * 2)
    assert_estimates(model, DATA[:3])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_gradient_tape_loop(jit_compile: bool) -> None:
    model = trainee()

    @tf.function(jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables))

    model.optimizer.build(model.trainable_variables)
    for x in [*DATA[:4], DATA[4][:2]]:
        step(x)
    assert_estimates(model, [*DATA[:4], DATA[4][:2]])


def test_a_checkpoint_of_the_middle_of_an_epoch_is_right_and_goes_on(tmp_path: Path) -> None:
    model = trainee()
    pattern = str(tmp_path / "{epoch}-{batch}.keras")
    fit(model, DATA[:7], keras.callbacks.ModelCheckpoint(pattern, save_freq=3))
    resumed = keras.saving.load_model(tmp_path / "1-3.keras")
    assert_estimates(resumed, DATA[:3])
    for x in DATA[3:7]:
        resumed.train_on_batch(x, x)
    for one, other in zip(model.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


# 100,000 steps in one compiled loop, against sums in float64.
STEPS = 100_000


@pytest.fixture(scope="module")
def long_training():
    """Return a function that trains a layer on (STEPS, M, 3) and returns it: compiled once."""
    layer = BatchLayerNormalization(M)
    layer.build((None, 3))

    @tf.function(jit_compile=True)
    def steps(data):
        for index in tf.range(STEPS):
            layer(data[index], training=True)

    def train(data: np.ndarray) -> BatchLayerNormalization:
        layer.start_new_estimate.assign(1.0)
        steps(data)
        return layer

    return train


@pytest.mark.parametrize("kind", ["constant", "constant and far from 0", "iid", "trending", "trending up from 0"])
def test_after_100_000_steps(long_training, kind: str) -> None:
    generator = np.random.default_rng(1)
    noise = generator.normal(0.7, 2.0, (STEPS, M, 3))
    trend = np.linspace(0, 1, STEPS)[:, None, None]
    data = {
        "constant": np.broadcast_to(noise[0], noise.shape),
        "constant and far from 0": np.broadcast_to(noise[0] + 1000, noise.shape),
        "iid": noise,
        "trending": noise + 100 * trend,
        "trending up from 0": noise * trend,
    }[kind].astype(np.float32)
    layer = long_training(data)
    assert layer.mean_steps.numpy() == STEPS
    exact = data.astype(np.float64)
    expected = {
        "batch_mean": exact.mean(axis=1, keepdims=True).mean(axis=0),
        "batch_var": exact.var(axis=1, keepdims=True, ddof=1).mean(axis=0),
        "feature_mean": exact.mean(axis=2, keepdims=True).mean(axis=0),
        "feature_var": exact.var(axis=2, keepdims=True).mean(axis=0) * M / (M - 1),
    }
    for name, value in expected.items():
        difference = np.abs(layer.population[name].numpy() - value).max()
        assert difference <= 1e-6 * np.abs(value).max(), f"{name}: {difference / np.abs(value).max():.1e}"
