"""Files and copies: every way Keras has to write a model down gives the same numbers back, and training goes on."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.models import bln, with_random_statistics

from bln_serve.layers import BatchLayerNormalization, PopulationStatistics, bln_layer, bln_layers

M = 4
RNG = np.random.default_rng(31)
X, Y = RNG.normal(0.5, 2, (16, 6)).astype(np.float32), RNG.normal(size=(16, 1)).astype(np.float32)


def model() -> keras.Model:
    """Return a compiled model with BLN at two depths, used twice, and under the reference's name."""
    keras.utils.set_random_seed(4)
    x = keras.Input((6,))
    shared = bln(M, "PMPM", "shared")
    inner = keras.Sequential([keras.Input((6,)), bln_layer(True, M, False, True, True, False, epsilon=0.01)])
    built = keras.Model(x, layers.Dense(1)(shared(inner(layers.Dense(6)(shared(x))))))
    built.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    return built


def train(trainee: keras.Model, first: int, last: int) -> None:
    for start in range(first, last, M):
        trainee.train_on_batch(X[start : start + M], Y[start : start + M])


def state(trainee: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in (*trainee.weights, *trainee.optimizer.variables)]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def of_the_same_layers(one: keras.Model, other: keras.Model) -> bool:
    configs = [[(type(layer), layer.get_config()) for layer in bln_layers(item)] for item in (one, other)]
    return configs[0] == configs[1]


@pytest.mark.parametrize("seen", [1, 3])
def test_a_keras_file_of_the_middle_of_training_goes_on_with_the_same_numbers(tmp_path: Path, seen: int) -> None:
    whole = model()
    train(whole, 0, seen * M)
    whole.save(tmp_path / "half.keras")
    resumed = keras.saving.load_model(tmp_path / "half.keras", safe_mode=True)
    assert of_the_same_layers(whole, resumed)
    assert_same(state(resumed), state(whole))
    for trainee in (whole, resumed):
        train(trainee, seen * M, 16)
    assert_same(state(resumed), state(whole))


def test_fits_resumed_from_a_file_give_the_numbers_of_an_uninterrupted_fit(tmp_path: Path) -> None:
    options = {"batch_size": M, "shuffle": False, "verbose": 0}
    whole, first = model(), model()
    whole.fit(X, Y, epochs=3, callbacks=[PopulationStatistics()], **options)
    first.fit(X, Y, epochs=1, callbacks=[PopulationStatistics()], **options)
    first.save(tmp_path / "first.keras")
    resumed = keras.saving.load_model(tmp_path / "first.keras")
    resumed.fit(X, Y, initial_epoch=1, epochs=3, callbacks=[PopulationStatistics()], **options)
    assert_same(state(resumed), state(whole))


def test_a_weights_file_gives_weights_estimates_and_optimizer_back(tmp_path: Path) -> None:
    trained = model()
    train(trained, 0, 12)
    trained.save_weights(tmp_path / "model.weights.h5")
    fresh = model()
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same(state(fresh), state(trained))
    for trainee in (fresh, trained):
        train(trainee, 12, 16)
    assert_same(state(fresh), state(trained))


COPIES = {
    "clone_model": keras.models.clone_model,
    "from_config": lambda model: keras.Model.from_config(model.get_config()),
    "to_json": lambda model: keras.models.model_from_json(model.to_json()),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=list(COPIES))
def test_a_copy_by_config_has_the_same_layers_new_weights_and_takes_the_old_ones(copy) -> None:
    original = with_random_statistics(model())
    copied = copy(original)
    assert of_the_same_layers(copied, original)
    assert all((layer.mean_steps.numpy() == 0).all() for layer in bln_layers(copied))
    copied.set_weights(original.get_weights())
    np.testing.assert_array_equal(copied(X[:M]), original(X[:M]))
    copied.compile("adam", "mse", run_eagerly=True)
    train(copied, 0, M)
    assert not np.array_equal(copied.get_weights()[0], original.get_weights()[0])


@pytest.mark.parametrize("kind", ["own name", "reference's name"])
def test_a_layer_from_its_config_is_the_same_layer(kind: str) -> None:
    layer = (
        BatchLayerNormalization(7, False, True, True, False, epsilon=0.5, name="mine", dtype="mixed_bfloat16")
        if kind == "own name"
        else bln_layer(False, 7, False, True, True, False, epsilon=0.5, name="mine", dtype="mixed_bfloat16")
    )
    copied = type(layer).from_config(layer.get_config())
    assert copied.get_config() == layer.get_config()
    assert (copied.batch_size, copied.policy.code, copied.epsilon) == (7, "MPPM", 0.5)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert (type(again), again.get_config()) == (type(layer), layer.get_config())


def test_weights_of_another_batch_size_are_refused(tmp_path: Path) -> None:
    x = keras.Input((6,))
    keras.Model(x, BatchLayerNormalization(4, name="bln")(x)).save_weights(tmp_path / "four.weights.h5")
    with (
        pytest.warns(UserWarning, match="Skipping nested container"),  # Keras tries the containers of a model as well
        pytest.raises(ValueError, match=r"(?s)shape.*\(5, 1\)"),
    ):
        keras.Model(x, BatchLayerNormalization(5, name="bln")(x)).load_weights(tmp_path / "four.weights.h5")
