"""Training output, gradients and all 16 policies against the float64 oracle, at any rank, m and number of rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law
from support.models import with_random_statistics

from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization
from bln_serve.statistics import ALL_POLICIES

law = settings(law, max_examples=15)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
STEP = 1e-5  # of the central differences: their error is of the order STEP**2, and rounding / STEP
RTOL = 1e-6


def layer_for(shape, m: int, dtype: str) -> BatchLayerNormalization:
    layer = BatchLayerNormalization(m, dtype=dtype)
    layer.build((None, *shape))
    return with_random_statistics(layer, seed=m)


def oracle(layer: BatchLayerNormalization, policy: str, x, gamma, beta) -> np.ndarray:
    population = {name: variable.numpy() for name, variable in layer.population.items()}
    return reference.normalize(x, gamma, beta, m=layer.batch_size, policy=policy, population=population)


def assert_slopes_agree(layer: BatchLayerNormalization, x, generator, policy: str, training: bool) -> None:
    """Compare the gradients along one direction with the oracle's central difference there, for x, gamma and beta."""
    weights = [np.asarray(weight.numpy(), np.float64) for weight in (layer.gamma, layer.beta)]
    arguments = [x, *weights]
    dy = generator.normal(size=x.shape)
    with tf.GradientTape() as tape:
        inputs = tf.constant(x)
        tape.watch(inputs)
        loss = tf.reduce_sum(layer(inputs, training=training) * dy)
    gradients = tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])
    for index, gradient in enumerate(gradients):
        direction = generator.normal(size=arguments[index].shape)
        ends = []
        for step in (STEP, -STEP):
            moved = [value + step * direction if i == index else value for i, value in enumerate(arguments)]
            ends.append(np.sum(oracle(layer, policy, *moved) * dy))
        slope, actual = (ends[0] - ends[1]) / (2 * STEP), np.sum(gradient.numpy() * direction)
        largest = np.linalg.norm(gradient) * np.linalg.norm(direction) + 1e-3
        assert abs(actual - slope) <= RTOL * largest, index


@pytest.mark.parametrize("m", [1, 2, 3, 25])
def test_training_and_its_gradients_equal_the_oracle(m: int) -> None:
    @law
    @given(generators, shapes, st.integers(1, m))
    def holds(generator, shape, rows) -> None:
        x = generator.normal(0.3, 1.5, (rows, *shape))
        layer = layer_for(shape, m, "float64")
        y = layer(tf.constant(x), training=True).numpy()
        expected = oracle(layer, "MMMM", x, layer.gamma.numpy(), layer.beta.numpy())
        assert np.abs(y - expected).max() <= 1e-12 * np.abs(expected).max()
        assert_slopes_agree(layer, x, generator, "MMMM", training=True)

    holds()


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=str)
def test_gradients_flow_through_what_is_live_at_inference_and_through_nothing_else(policy) -> None:
    generator = np.random.default_rng(0)
    for shape in ((5,), (2, 3), (2, 2, 2, 3)):
        layer = layer_for(shape, 3, "float64")
        layer.policy = policy
        assert_slopes_agree(layer, generator.normal(0.3, 1.5, (3, *shape)), generator, policy.code, training=False)


@pytest.mark.parametrize("m", [1, 2, 3, 25])
def test_in_float32_output_and_gradient_are_those_of_float64_to_rounding(m: int) -> None:
    @law
    @given(generators, shapes)
    def holds(generator, shape) -> None:
        x, dy = generator.normal(0.3, 1.5, (2, m, *shape)).astype(np.float32)
        results = {}
        for dtype in ("float32", "float64"):
            layer = layer_for(shape, m, dtype)
            inputs = tf.cast(tf.constant(x), dtype)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = layer(inputs, training=True)
                loss = tf.reduce_sum(y * tf.cast(dy, dtype))
            results[dtype] = {"output": y.numpy(), "gradient": tape.gradient(loss, inputs).numpy()}
        # Where values lie close together a gradient is the difference of terms as steep as epsilon allows, and what is
        # left of them is rounded relative to these.
        steepest = np.abs(dy).max() * 1.5 / np.sqrt(reference.EPSILON)
        for name, scale in (("output", 1.0), ("gradient", steepest)):
            actual, expected = results["float32"][name], results["float64"][name]
            assert np.abs(actual - expected).max() <= 2e-6 * max(np.abs(expected).max(), scale)

    holds()


@pytest.mark.parametrize("training", [False, True])
def test_the_comparison_of_slopes_can_fail(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    layer = layer_for((4,), 3, "float64")
    monkeypatch.setattr(keras.ops, "mean", lambda x, **options: tf.stop_gradient(tf.reduce_mean(x, **options)))
    generator = np.random.default_rng(0)
    layer.policy = ALL_POLICIES[-1]
    with pytest.raises(AssertionError):
        assert_slopes_agree(layer, generator.normal(size=(3, 4)), generator, "MMMM", training)
