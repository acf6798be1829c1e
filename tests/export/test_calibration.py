"""Calibration against NumPy: what each layer stores is what its rows say, and each layer meets calibrated ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.models import RecurrentCell, bln, tiny, with_random_statistics

import bln_serve
from bln_serve import reference
from bln_serve.errors import UnsupportedModelError, UsageError
from bln_serve.export import calibration, data, estimates, export, freezing, saved_model
from bln_serve.layers import bln_layers
from bln_serve.statistics import ALL_POLICIES, STATISTICS

M, ROWS = 5, 43  # 8 mini-batches, and 3 rows that are left out
X = np.random.default_rng(11).normal(1.0, 2.0, size=(ROWS, 6, 4)).astype(np.float32)
# Keras computes in float32, of which a mean of 40 rows of magnitude 1 keeps 7 digits; the oracle in float64.
RTOL, ATOL = 2e-5, 2e-6

Stored = dict[str, np.ndarray]


def calibrated(model: keras.Model, policy: str, x: np.ndarray = X, rows: int = M) -> list[Stored]:
    callee = saved_model.describe(model)
    read = data.read(x, callee.signature, targets=False)
    frozen = calibration.calibrate(callee, freezing.with_policies(model, policy), read, rows)
    return [{name: item.stored[f"population_{name}"] for name in STATISTICS} for item in frozen if item.stored]


def by_hand(mini_batches: list[np.ndarray], m: int = M) -> Stored:
    """Return what a layer that these inputs reach has to store."""
    x = np.concatenate(mini_batches)
    stored = dict(zip(("batch_mean", "batch_var"), reference.batch_statistics(x), strict=True))
    features = [reference.feature_statistics(each) for each in mini_batches]
    return stored | {
        "feature_mean": np.mean([mean for mean, _ in features], axis=0),
        "feature_var": np.mean([var for _, var in features], axis=0),
    }


def dense(x: np.ndarray, layer: keras.layers.Dense) -> np.ndarray:
    return np.tanh(x @ layer.kernel.numpy().astype(np.float64) + layer.bias.numpy())


def expected(model: keras.Model, policy: str) -> Iterator[Stored]:
    """Calibrate the model of `support.models.tiny` in NumPy, layer by layer."""
    first, second, _ = (layer for layer in model.layers if isinstance(layer, layers.Dense))
    batches = [dense(each, first) for each in np.split(X[: ROWS - ROWS % M].astype(np.float64), ROWS // M)]
    stored = by_hand(batches)
    yield stored
    one = bln_layers(model)[0]
    answers = [
        reference.normalize(each, one.gamma.numpy(), one.beta.numpy(), m=M, policy=policy, population=stored)
        for each in batches
    ]
    yield by_hand([dense(each.reshape(M, -1), second) for each in answers])


@pytest.mark.parametrize("policy", [str(policy) for policy in ALL_POLICIES if policy.stored])
def test_each_layer_stores_what_numpy_finds_under_the_policy(policy: str) -> None:
    model = tiny(policy, M, "tiny")
    for layer, wanted in zip(calibrated(model, policy), expected(model, policy), strict=True):
        for name in STATISTICS:
            np.testing.assert_allclose(layer[name], wanted[name], rtol=RTOL, atol=ATOL, err_msg=name)


def test_the_oracle_tells_the_policies_apart() -> None:
    """The second layer's statistics depend on what the first answers: another policy, or none calibrated, shows."""
    model = tiny("PPMM", M, "tiny")
    _, second = calibrated(model, "PPMM")
    _, other = expected(model, "PMMM")
    assert np.abs(second["batch_mean"] - other["batch_mean"]).max() > 100 * ATOL
    before = bln_layers(model)[1].population["batch_mean"].numpy()
    assert np.abs(second["batch_mean"] - before).max() > 100 * ATOL


def test_the_variance_is_over_all_rows_and_not_the_mean_of_the_mini_batches() -> None:
    x = np.repeat(np.arange(4.0, dtype=np.float32), M)[:, None] * np.ones((1, 3), np.float32)  # constant in each
    inputs = keras.Input((3,))
    model = with_random_statistics(keras.Model(inputs, bln(M, "PPMM", "bln")(inputs)))
    (stored,) = calibrated(model, "PPMM", x)
    np.testing.assert_allclose(stored["batch_var"], np.full((1, 3), np.var(np.arange(4.0))), rtol=1e-6)


def test_an_offset_a_million_times_the_deviation_costs_no_digits() -> None:
    # Exact in float32: multiples of 1/16 near 2**18.
    x = 2.0**18 + np.random.default_rng(5).integers(0, 32, size=(50, 3)) / 16
    inputs = keras.Input((3,))
    model = with_random_statistics(keras.Model(inputs, bln(M, "PPMM", "bln")(inputs)))
    (stored,) = calibrated(model, "PPMM", x.astype(np.float32))
    np.testing.assert_allclose(stored["batch_var"], x.var(axis=0, keepdims=True), rtol=1e-9)


def test_the_model_is_as_it_was() -> None:
    model = tiny("PPMM", M, "tiny")
    before = [estimates.read(layer) for layer in bln_layers(model)]
    calibrated(model, "MMPP")
    assert [str(layer.policy) for layer in bln_layers(model)] == ["PPMM", "PPMM"]
    for layer, was in zip(bln_layers(model), before, strict=True):
        for name, value in estimates.read(layer).items():
            np.testing.assert_array_equal(value, was[name])


def test_a_layer_used_twice_counts_the_rows_of_both_uses() -> None:
    inputs = keras.Input((3,))
    shared = bln(M, "PPMM", "bln")
    model = with_random_statistics(keras.Model(inputs, layers.Add()([shared(inputs), shared(inputs * 2.0)])))
    x = X[:40, 0, :3]
    (stored,) = calibrated(model, "PPMM", x)
    both = np.concatenate([x, 2.0 * x]).astype(np.float64)
    np.testing.assert_allclose(stored["batch_mean"], both.mean(axis=0, keepdims=True), rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(stored["batch_var"], both.var(axis=0, keepdims=True), rtol=RTOL)


def single_rows(policy: str) -> keras.Model:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(bln(1, policy, "bln")(inputs)), name="single")
    return with_random_statistics(model)


@pytest.mark.parametrize("policy", ["PPMM", "PPPP", "PMPP"])
def test_at_m_1_every_row_counts_and_both_variances_become_usable(policy: str, tmp_path: Path) -> None:
    model = single_rows(policy)
    (layer,) = bln_layers(model)
    layer.population_batch_var.assign(np.full(layer.population_batch_var.shape, np.nan))
    x = np.random.default_rng(2).normal(3.0, 2.0, size=(300, 3)).astype(np.float32)  # more than one run of 256 holds
    artifact = export(model, tmp_path, calibrate=x)
    (stored,) = calibrated(model, policy, x, rows=1)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(stored["batch_mean"], wide.mean(axis=0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(stored["batch_var"], wide.var(axis=0, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(stored["feature_mean"], wide.mean().reshape(1, 1), rtol=1e-6)
    np.testing.assert_allclose(stored["feature_var"], wide.var(axis=1).mean().reshape(1, 1), rtol=1e-6)
    assert artifact.manifest.stored_statistics.origin == "calibrated"
    assert np.isfinite(bln_serve.load(artifact.path).predict(x)).all()


def layer_alone(m: int, policy: str) -> keras.Model:
    inputs = keras.Input((3,))
    return with_random_statistics(keras.Model(inputs, bln(m, policy, "bln")(inputs)))


@pytest.mark.parametrize("rows", [5, 20])
def test_pooled_slots_take_mini_batches_of_any_size(rows: int) -> None:
    model, x = layer_alone(M, "PPPP"), X[:40, 0, :3]
    callee = saved_model.describe(model)
    frozen = freezing.with_policies(model, "PPPP", "pool")
    (item,) = calibration.calibrate(callee, frozen, data.read(x, callee.signature, targets=False), rows)
    assert item.stored is not None
    mean, var = reference.feature_statistics(x.astype(np.float64))
    for name, wanted in (("population_feature_mean", mean), ("population_feature_var", var)):
        np.testing.assert_allclose(item.stored[name], wanted.reshape(8, M, 1).mean(axis=0), rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(item.stored["slot_steps"], np.full(M, 8.0))


@pytest.mark.parametrize(("slots", "steps"), [("keep", 4.0), ("pool", 0.0)])
def test_a_slot_that_no_row_reaches_keeps_what_it_had(slots: str, steps: float) -> None:
    model, x = layer_alone(M, "PPPP"), X[:42, 0, :3]
    (layer,) = bln_layers(model)
    callee = saved_model.describe(model)
    frozen = freezing.with_policies(model, "PPPP", slots)
    (item,) = calibration.calibrate(callee, frozen, data.read(x, callee.signature, targets=False), 3)
    assert item.stored is not None
    kept = layer.population_feature_mean.numpy()
    np.testing.assert_array_equal(item.stored["population_feature_mean"][3:], kept[3:])
    assert np.abs(item.stored["population_feature_mean"][:3] - kept[:3]).min() > 1e-3
    # Pooled, what is not of the data weighs nothing.
    np.testing.assert_array_equal(item.stored["slot_steps"], [14.0, 14.0, 14.0, steps, steps])


@pytest.mark.parametrize("independent", [False, True])
def test_at_m_1_each_row_is_a_step(independent: bool) -> None:
    model, x = single_rows("PPMM"), X[:20, 0, :3]
    callee = saved_model.describe(model)
    rows, frozen = data.read(x, callee.signature, targets=False), freezing.with_policies(model, "PPMM")
    told: list[int] = []
    (item,) = calibration.calibrate(callee, frozen, rows, 1, lambda: told.append(1), independent=independent)
    assert item.stored is not None
    assert [float(item.stored[name].sum()) for name in ("mean_steps", "variance_steps", "slot_steps")] == [20.0] * 3
    assert len(told) == calibration.runs(frozen, rows, 1, independent=independent) == (1 if independent else 20)


def test_mini_batches_of_more_rows_than_slots_are_refused() -> None:
    with pytest.raises(UsageError, match="Received: mini-batches of 8 rows, and the policy takes from 1 to 5. Set"):
        calibrated(tiny("PPPP", M, "tiny"), "PPPP", rows=8)


def test_nothing_stored_is_nothing_to_calibrate() -> None:
    with pytest.raises(UsageError, match="Expected a policy that stores statistics for --calibrate. Received: mini-b"):
        calibrated(tiny("MMMM", M, "tiny"), "MMMM")


def test_fewer_rows_than_a_mini_batch_are_refused() -> None:
    with pytest.raises(
        UsageError, match="Expected at least one mini-batch of 5 rows for --calibrate. Received: 4 rows"
    ):
        calibrated(tiny("PPMM", M, "tiny"), "PPMM", X[:4])


class InALoop(keras.layers.Layer):
    """Calls a BLN layer on each half of the features, in a loop of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.bln = bln(M, "PPMM", "bln")

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.bln.build((None, 2))
        self.built = True

    def call(self, inputs: Any) -> Any:
        halves = keras.ops.stack([inputs[:, :2], inputs[:, 2:]])
        return keras.ops.concatenate(keras.ops.unstack(keras.ops.map(self.bln, halves), num=2), axis=-1)


def test_a_layer_inside_a_loop_cannot_be_looked_at() -> None:
    inputs = keras.Input((4,))
    model = with_random_statistics(keras.Model(inputs, InALoop()(inputs)))
    with pytest.raises(UnsupportedModelError, match="outside of loops. Received: 'bln' inside one"):
        calibrated(model, "PPMM", X[:, 0])


def test_a_refusal_inside_a_keras_layer_is_told_as_it_was_meant() -> None:
    """Keras puts the arguments of the call, and colours, around what is raised inside of it."""
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layers.RNN(RecurrentCell(M, "bln"))(inputs))
    with pytest.raises(UnsupportedModelError, match="^Expected every .* Received: 'bln' inside one.*Unroll it.$"):
        calibrated(with_random_statistics(model), "PPMM")


def test_a_layer_called_once_a_time_step_counts_every_step() -> None:
    inputs = keras.Input((4, 3))
    model = with_random_statistics(keras.Model(inputs, layers.TimeDistributed(bln(M, "PPMM", "bln"))(inputs)))
    (stored,) = calibrated(model, "PPMM", X[:40, :4, :3])
    steps = X[:40, :4, :3].astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(stored["batch_mean"], steps.mean(axis=0, keepdims=True), rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(stored["batch_var"], steps.var(axis=0, keepdims=True), rtol=RTOL)
