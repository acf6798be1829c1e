"""`feature_slots="pool"`: the stored feature statistics of all slots, averaged, serve every row."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.models import bln, one_layer

from bln_serve import reference
from bln_serve.layers import BatchLayerNormalization, bln_layer, bln_layers, with_statistics
from bln_serve.layers.pooling import pooled, pooled_in_graph
from bln_serve.statistics import ALL_POLICIES

M = 4
STEPS = np.array([5.0, 3.0, 2.0, 0.0])  # the last slot was never updated
SHAPES = [(6,), (3, 5), (2, 3, 4), (2, 2, 3, 4)]
BY_SLOT = [policy.code for policy in ALL_POLICIES if policy.stored_by_slot]
ALONE = ["PPPP", "PPPM", "PPMP"]
RTOL = 2e-6  # of the largest answer: a handful of float32 roundings
RNG = np.random.default_rng(17)

ranks = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank{len(shape) + 1}")


def pooled_model(shape: tuple[int, ...], policy: str, m: int = M, steps: np.ndarray = STEPS) -> keras.Model:
    model = one_layer(shape, m, policy)
    layer = model.layers[-1]
    layer.slot_steps.assign(steps)
    layer.feature_slots = "pool"
    return model


def average(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean over the slots, slot by slot."""
    total = np.zeros_like(table[:1])
    for slot, weight in enumerate(weights):
        total = total + weight * table[slot : slot + 1]
    return total / weights.sum()


def expected(layer: BatchLayerNormalization, x: np.ndarray, weights: np.ndarray = STEPS) -> np.ndarray:
    population = {name: variable.numpy() for name, variable in layer.population.items()}
    population |= {name: average(table, weights) for name, table in population.items() if name.startswith("feature")}
    gamma, beta, policy = layer.gamma.numpy(), layer.beta.numpy(), layer.policy.code
    return reference.normalize(x, gamma, beta, m=layer.batch_size, policy=policy, population=population)


def rows_of(shape: tuple[int, ...], rows: int) -> np.ndarray:
    return RNG.normal(0.3, 1.5, (rows, *shape)).astype(np.float32)


def off_by(actual: object, y: np.ndarray) -> float:
    actual = np.asarray(actual)
    assert actual.shape == y.shape
    return float(np.abs(actual - y).max() / np.abs(y).max())


@ranks
@pytest.mark.parametrize("policy", BY_SLOT)
def test_inference_equals_the_oracle_for_any_number_of_rows(policy: str, shape: tuple[int, ...]) -> None:
    model = pooled_model(shape, policy)
    for rows in (1, M - 1, M, M + 1, 3 * M):
        x = rows_of(shape, rows)
        assert off_by(model(x), expected(model.layers[-1], x)) <= RTOL, rows


@pytest.mark.parametrize("wrong", [np.ones(M), np.array([5.0, 3.0, 2.0, 1.0]), STEPS[::-1]], ids=str)
def test_other_weights_of_the_slots_are_beyond_the_tolerance(wrong: np.ndarray) -> None:
    model, x = pooled_model((3, 5), "PPPP"), rows_of((3, 5), M)
    assert off_by(model(x), expected(model.layers[-1], x, wrong)) > 1000 * RTOL


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["PPPP", "PPPM", "MMPP"])
def test_a_graph_takes_any_number_of_rows_with_and_without_xla(policy: str, jit_compile: bool) -> None:
    model = pooled_model((3, 5), policy)
    signature = [tf.TensorSpec((None, 3, 5))]
    graph = tf.function(lambda x: model(x, training=False), input_signature=signature, jit_compile=jit_compile)
    for rows in (1, M, 3 * M):
        x = rows_of((3, 5), rows)
        assert off_by(graph(x), expected(model.layers[-1], x)) <= RTOL
    assert graph.experimental_get_tracing_count() == 1


def test_a_graph_reads_the_slots_as_they_are_when_it_runs() -> None:
    model, x = pooled_model((6,), "PPPP"), rows_of((6,), 9)
    layer = model.layers[-1]
    graph = tf.function(lambda x: model(x, training=False))
    before = graph(x)
    layer.slot_steps.assign(STEPS[::-1])
    assert off_by(graph(x), expected(layer, x, STEPS[::-1])) <= RTOL
    assert off_by(graph(x), before.numpy()) > 1000 * RTOL


@ranks
@pytest.mark.parametrize("policy", ALONE)
def test_a_row_gives_the_same_answer_bit_for_bit_alone_in_company_and_in_any_place(policy: str, shape) -> None:
    model, x = pooled_model(shape, policy), rows_of(shape, 2 * M + 1)
    together = model(x).numpy()
    np.testing.assert_array_equal(np.concatenate([model(row[None]).numpy() for row in x]), together)
    np.testing.assert_array_equal(model(x[::-1].copy()).numpy()[::-1], together)


@pytest.mark.parametrize("policy", ALONE)
def test_where_slots_are_kept_a_row_in_another_place_is_seen(policy: str) -> None:
    model, x = pooled_model((6,), policy), rows_of((6,), M)
    model.layers[-1].feature_slots = "keep"
    assert off_by(model(x[::-1].copy()).numpy()[::-1], model(x).numpy()) > 1000 * RTOL


def test_trained_on_partial_batches_it_is_the_mean_over_every_row_that_was_seen() -> None:
    layer = BatchLayerNormalization(M, feature_moving_mean=True, feature_moving_var=True, feature_slots="pool")
    batches = [RNG.normal(place, 1 + place, (rows, 3, 5)).astype(np.float32) for place, rows in enumerate((4, 4, 3, 1))]
    for batch in batches:
        layer(batch, training=True)
    seen = np.concatenate(batches)
    means, variances = reference.feature_statistics(seen)
    steps = layer.slot_steps.numpy()
    assert steps.tolist() == [4, 3, 3, 2]
    expected = {"feature_mean": means.mean(axis=0), "feature_var": variances.mean(axis=0) * M / (M - 1)}
    for name, value in expected.items():
        stored = layer.population[name].numpy()
        # A row's own statistics are float32: a few roundings of 6e-8.
        np.testing.assert_allclose(pooled(stored, steps)[0], value, rtol=1e-6, atol=1e-6)
        assert np.abs(stored.mean(axis=0) - value).max() > 1e-2  # every slot alike is not that mean


@pytest.mark.parametrize("steps", [STEPS, np.full(M, 7.0), np.array([0.0, 0.0, 1.0, 0.0]), np.zeros(M)], ids=str)
def test_the_graph_and_numpy_make_the_same_average(steps: np.ndarray) -> None:
    stored = RNG.normal(0, 1e3, (M, 3, 1))
    weights = steps if steps.any() else np.ones(M)
    for actual in (pooled(stored, steps), np.asarray(pooled_in_graph(tf.constant(stored), tf.constant(steps)))):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, average(stored, weights), rtol=1e-14, atol=1e-12, strict=True)


@pytest.mark.parametrize("held", [np.nan, np.inf, 1e300])
def test_a_slot_that_was_never_updated_weighs_nothing_whatever_it_holds(held: float) -> None:
    model, x = pooled_model((6,), "PPPP"), rows_of((6,), 9)
    layer, before = model.layers[-1], model(x).numpy()
    for name in ("feature_mean", "feature_var"):
        stored = layer.population[name].numpy()
        stored[STEPS == 0] = held
        layer.population[name].assign(stored)
        assert np.isfinite(pooled(stored, STEPS)).all()
    np.testing.assert_array_equal(model(x).numpy(), before)


def test_where_no_slot_was_ever_updated_it_is_the_initial_values() -> None:
    layer = BatchLayerNormalization(M, True, True, True, True, feature_slots="pool")
    x = rows_of((5,), 9)
    initial = {"batch_mean": 0.0, "batch_var": 1.0, "feature_mean": 0.0, "feature_var": 1.0}
    population = {name: np.full((1, 1), value) for name, value in initial.items()}
    y = reference.normalize(x, np.ones(5), np.zeros(5), m=M, policy="PPPP", population=population)
    assert off_by(layer(x), y) <= RTOL


def test_the_average_is_taken_in_float64() -> None:
    layer = BatchLayerNormalization(2, True, True, True, True, feature_slots="pool")
    layer.build((None, 3))
    layer.slot_steps.assign([1.0, 1.0])
    layer.population["feature_mean"].assign([[1e9 + 1], [-1e9]])  # in float32 their sum is 0
    x = rows_of((3,), 2)
    assert off_by(layer(x), expected(layer, x, np.ones(2))) <= RTOL
    layer.population["feature_mean"].assign([[1e9], [-1e9]])
    assert off_by(layer(x), expected(layer, x, np.ones(2))) <= RTOL


@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES])
def test_at_m_1_nothing_changes(policy: str) -> None:
    model, x = one_layer((3, 5), 1, policy), rows_of((3, 5), 6)
    for steps in ([4.0], [0.0]):
        answers = []
        for slots in ("keep", "pool"):
            model.layers[-1].feature_slots = slots
            model.layers[-1].slot_steps.assign(steps)
            answers.append(model(x).numpy())
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES if not policy.stored_by_slot])
def test_without_stored_feature_statistics_nothing_changes(policy: str) -> None:
    model, x = pooled_model((3, 5), policy), rows_of((3, 5), 6)
    answer = model(x).numpy()
    model.layers[-1].feature_slots = "keep"
    np.testing.assert_array_equal(model(x).numpy(), answer)


def test_training_is_untouched_and_still_takes_no_more_rows_than_slots() -> None:
    kept, other = (
        BatchLayerNormalization(M, True, True, True, True, feature_slots=slots) for slots in ("keep", "pool")
    )
    for rows in (M, M - 1):
        x = rows_of((5,), rows)
        np.testing.assert_array_equal(kept(x, training=True), other(x, training=True))
    for one, two in zip(kept.weights, other.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert not np.array_equal(kept(x), other(x))
    with pytest.raises(ValueError, match=r"Expected at most 4 rows in layer .* Received: 5"):
        other(rows_of((5,), M + 1), training=True)
    with pytest.raises(ValueError, match=r"Expected at most 4 rows in layer .* Received: 5"):
        kept(rows_of((5,), M + 1))


def test_a_frozen_layer_infers_any_number_of_rows_also_when_asked_to_train() -> None:
    layer = pooled_model((6,), "PPPP").layers[-1]
    layer.trainable = False
    x = rows_of((6,), 3 * M)
    assert off_by(layer(x, training=True), expected(layer, x)) <= RTOL


@pytest.mark.parametrize("dtype", ["float64", "mixed_float16", "mixed_bfloat16"])
def test_other_dtypes(dtype: str) -> None:
    layer = BatchLayerNormalization(M, True, True, True, True, feature_slots="pool", dtype=dtype)
    layer.build((None, 5))
    layer.population["feature_mean"].assign(RNG.normal(size=(M, 1)))
    layer.population["feature_var"].assign(RNG.uniform(0.5, 2, (M, 1)))
    layer.slot_steps.assign(STEPS)
    x = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(rows_of((5,), 9), layer.compute_dtype)), np.float64)
    y = layer(keras.ops.cast(x, layer.compute_dtype))
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    # The output's own rounding: half a unit in the last place of 1, doubled.
    limit = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-12}[layer.compute_dtype]
    assert off_by(keras.ops.cast(y, "float64"), expected(layer, x)) <= limit


def test_setting_it_acts_at_once_and_in_predict_after_a_new_trace() -> None:
    model, x = one_layer((6,), M, "PPPP"), rows_of((6,), M)
    layer = model.layers[-1]
    by_slot = model.predict(x, verbose=0)
    layer.feature_slots = "pool"
    model.predict_function = None
    weights = layer.slot_steps.numpy()
    assert off_by(model.predict(x, verbose=0), expected(layer, x, weights)) <= RTOL
    layer.feature_slots = "keep"
    np.testing.assert_allclose(model(x), by_slot, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", ["pooled", "", None, True, "POOL"])
def test_another_value_is_refused_in_the_constructor_and_later(value: object) -> None:
    message = r"Expected feature_slots to be 'keep' or 'pool'\. Received: "
    with pytest.raises(ValueError, match=message):
        BatchLayerNormalization(M, feature_slots=value)
    layer = BatchLayerNormalization(M, feature_slots="pool")
    with pytest.raises(ValueError, match=message):
        layer.feature_slots = value
    assert layer.feature_slots == "pool"


@pytest.mark.parametrize("slots", ["keep", "pool"])
def test_a_config_holds_it_and_one_from_before_keeps_the_slots(slots: str) -> None:
    for layer in (BatchLayerNormalization(M, feature_slots=slots), bln_layer(True, M, feature_slots=slots)):
        config = layer.get_config()
        assert config["feature_slots"] == slots
        assert type(layer).from_config(config).feature_slots == slots
        del config["feature_slots"]
        assert type(layer).from_config(config).feature_slots == "keep"


def test_a_keras_file_and_a_copy_under_another_policy_keep_it(tmp_path: Path) -> None:
    x = keras.Input((6,))
    layers = [bln(M, "PPPP", "pooled"), bln(M, "PPPM", "kept")]
    layers[0].feature_slots = "pool"
    model = keras.Model(x, layers[1](layers[0](x)))
    layers[0].slot_steps.assign(STEPS)
    layers[0].population["feature_mean"].assign(RNG.normal(size=(M, 1)))
    model.save(tmp_path / "model.keras")
    rows = rows_of((6,), M)
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert [layer.feature_slots for layer in bln_layers(loaded)] == ["pool", "keep"]
    np.testing.assert_array_equal(loaded(rows), model(rows))
    copied = with_statistics(model, "PPMP")
    assert [layer.feature_slots for layer in bln_layers(copied)] == ["pool", "keep"]
