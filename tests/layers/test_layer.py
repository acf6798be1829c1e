"""The layer as Keras users meet it: saving, loading, shapes, dtypes, masks, errors and the reference's names."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from support.models import one_layer, with_random_statistics

import bln_serve.layers
from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, bln_callback, bln_layer
from bln_serve.statistics import ALL_POLICIES

RNG = np.random.default_rng(5)


def expected(layer: BatchLayerNormalization, x: np.ndarray) -> np.ndarray:
    return reference.normalize(
        x,
        layer.gamma.numpy(),
        layer.beta.numpy(),
        m=layer.batch_size,
        policy=layer.policy.code,
        population={name: variable.numpy() for name, variable in layer.population.items()},
    )


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4), (2, 2, 3, 4)], ids=lambda shape: f"rank{len(shape) + 1}")
def test_inference_equals_the_oracle(policy, shape) -> None:
    model = one_layer(shape, m=4, policy=policy.code)
    layer = model.layers[-1]
    for rows in (1, 3, 4) if policy.stored_by_slot else (1, 4, 7):
        x = RNG.normal(0.3, 1.5, (rows, *shape)).astype(np.float32)
        y = expected(layer, x)
        assert np.abs(model(x).numpy() - y).max() <= 2e-6 * np.abs(y).max()


def test_the_weights_have_the_names_users_look_for() -> None:
    layer = BatchLayerNormalization(4)
    layer.build((None, 3))
    assert [weight.name for weight in layer.trainable_weights] == ["gamma", "beta"]
    assert layer.gamma.shape == (3,)


def test_a_keras_file_loads_without_custom_objects_in_another_process(tmp_path: Path) -> None:
    model = one_layer((3, 5), m=4, policy="MPPM")
    x = RNG.normal(size=(4, 3, 5)).astype(np.float32)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=model.predict(x, verbose=0))
    program = (
        "import sys, keras, numpy as np, bln_serve.layers\n"
        "model = keras.saving.load_model(sys.argv[1], safe_mode=True)\n"
        "data = np.load(sys.argv[2])\n"
        "assert model.layers[-1].policy.code == 'MPPM'\n"
        "np.testing.assert_array_equal(model.predict(data['x'], verbose=0), data['y'])\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.keras", tmp_path / "data.npz"], check=True)


def test_training_resumed_from_a_file_gives_the_same_numbers(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(1)(BatchLayerNormalization(4)(keras.layers.Dense(3)(x))))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    data, truth = RNG.normal(size=(8, 6)).astype(np.float32), RNG.normal(size=(8, 1)).astype(np.float32)
    model.train_on_batch(data[:4], truth[:4])
    model.save(tmp_path / "half.keras")
    resumed = keras.saving.load_model(tmp_path / "half.keras")
    for trainee in (model, resumed):
        trainee.train_on_batch(data[4:], truth[4:])
    for one, other in zip(model.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_the_output_has_the_compute_dtype_and_the_statistics_do_not(dtype: str) -> None:
    layer = BatchLayerNormalization(4, False, False, dtype=dtype)
    x = RNG.normal(1000, 1, (4, 6)).astype(np.float64)
    x = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, layer.compute_dtype)), np.float64)
    y = layer(keras.ops.cast(x, layer.compute_dtype), training=False)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    truth = expected(layer, x)
    # The output's own rounding: half a unit in the last place of 1, doubled.
    limit = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-12}[layer.compute_dtype]
    assert np.abs(np.asarray(keras.ops.cast(y, "float64")) - truth).max() <= limit * np.abs(truth).max()


def test_a_mask_passes_on() -> None:
    tokens = keras.Input((5,), dtype="int32")
    words = keras.layers.Embedding(10, 4, mask_zero=True)(tokens)
    assert BatchLayerNormalization(4)(words)._keras_mask is not None


def test_more_rows_than_slots_are_refused_when_the_number_is_known() -> None:
    layer = with_random_statistics(one_layer((3,), 4, "MMPP")).layers[-1]
    with pytest.raises(ValueError, match=r"Expected at most 4 rows in layer 'bln', which has 4 slots.* Received: 5"):
        layer(np.zeros((5, 3), np.float32))


def test_more_rows_than_slots_are_refused_inside_a_graph() -> None:
    import tensorflow as tf

    model = one_layer((3,), 4, "MMPP")
    graph = tf.function(lambda x: model(x, training=False), input_signature=[tf.TensorSpec((None, 3))])
    assert graph(np.zeros((4, 3), np.float32)).shape == (4, 3)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"Expected at most 4 rows in layer .*bln.*, which has 4 slots"
    ):
        graph(np.zeros((5, 3), np.float32))


@pytest.mark.parametrize("m", [0, -1, 2.5, True])
def test_a_batch_size_that_is_none_is_refused(m: object) -> None:
    with pytest.raises(ValueError, match="Expected batch_size to be a whole number of at least 1"):
        BatchLayerNormalization(m)


@pytest.mark.parametrize("shape", [(None,), (None, None, 3)])
def test_an_unknown_dimension_is_refused(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"all known but the first.*Received: shape"):
        BatchLayerNormalization(4).build(shape)


def test_the_references_example_works_with_its_names() -> None:
    layer = bln_layer(stateful=True, batchsize=4, batch_moving_mean=False, batch_moving_var=False)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5), layer, keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=False)
    x, y = RNG.normal(size=(12, 3)).astype(np.float32), RNG.normal(size=(12, 1)).astype(np.float32)
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[bln_callback()], verbose=0)
    assert layer.policy.code == "MMMM"
    assert layer.mean_steps.numpy() == 3


def test_the_references_arguments_may_be_positional_and_survive_saving(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), bln_layer(True, 4, False, True, True, False)])
    model.save(tmp_path / "model.keras")
    layer = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
    assert (type(layer), layer.batch_size, layer.policy.code, layer.stateful) == (bln_layer, 4, "MPPM", True)


def test_everything_named_in_all_is_there() -> None:
    assert all(hasattr(bln_serve.layers, name) for name in bln_serve.layers.__all__)
