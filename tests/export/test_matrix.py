"""Every policy at every rank and m: 16 policies x ranks 4, 3 and 2 x m of 1, 2 and 25, each asked the same as Keras.

One model holds a layer of each rank, one behind the other, and answers with what each of them makes.
"""

from functools import cache
from typing import Any

import keras
import pytest
from keras import layers
from support.conversions import converted, first, inputs_of, worst_error
from support.models import bln, with_random_statistics

from bln_serve.errors import UnusableStatisticsError
from bln_serve.export import freezing
from bln_serve.layers import bln_layers
from bln_serve.manifest import MINI_BATCHES
from bln_serve.statistics import ALL_POLICIES, RowCoupling

# Float32 rounds differently in each engine: up to 5.8e-7 of max|y| was measured.
RTOL = 1e-6
# Behind a live batch variance what was rounded is divided by the deviation of a few rows, which may be small: 5.2e-6.
RTOL_LIVE_VARIANCE = 1e-5


@cache
def chain(m: int) -> Any:
    """Return a model of layers called rank4, rank3 and rank2, and as many outputs."""
    return different(("PPMM", m), ("PPMM", m), ("PPMM", m))


def different(*each: tuple[str, int]) -> Any:
    """Return the same with a policy and an m for each layer."""
    keras.utils.set_random_seed(1)
    norms = {f"rank{4 - place}": bln(m, policy, f"r{4 - place}") for place, (policy, m) in enumerate(each)}
    x = keras.Input((4, 4, 3), name="x")
    y4 = norms["rank4"](layers.Conv2D(5, 3, padding="same", activation="tanh")(x))
    y3 = norms["rank3"](layers.Dense(6, activation="tanh")(layers.Reshape((16, 5))(y4)))
    y2 = norms["rank2"](layers.Dense(7, activation="tanh")(layers.Flatten()(y3)))
    return with_random_statistics(keras.Model(x, {"rank4": y4, "rank3": y3, "rank2": y2}, name="chain"))


def coupling_of(policy: str, m: int) -> RowCoupling:
    if "M" in policy[:2]:
        return RowCoupling.MINI_BATCH
    return RowCoupling.POSITIONAL if "P" in policy[2:] and m > 1 else RowCoupling.INDEPENDENT


def check_against_keras(model: Any, coupling: RowCoupling, sizes: list[int], rtol: float) -> None:
    """Compare three mini-batches and a smaller one, of each size: one after the other, and the three in one run."""
    fewest = min(sizes)
    for size in sizes:
        x = inputs_of(model, 3 * size + (fewest if size > fewest else 0))
        expected = model.keras(x, size)
        assert worst_error(model.each_alone(x, size), expected) <= rtol, size
        together = model.in_one_run(first(x, 3 * size), 1 if coupling is RowCoupling.INDEPENDENT else 3)
        assert worst_error(together, first(expected, 3 * size)) <= rtol, size


@pytest.mark.parametrize("m", [1, 2, 25])
@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES])
def test_every_policy_and_m_at_three_ranks(policy: str, m: int) -> None:
    model, coupling = converted(chain(m), policy), coupling_of(policy, m)
    assert model.found.coupling.row_coupling is coupling
    assert model.takes(MINI_BATCHES) is (coupling is not RowCoupling.INDEPENDENT)
    fewest = 2 if coupling is RowCoupling.MINI_BATCH and m > 1 else 1
    rtol = RTOL_LIVE_VARIANCE if policy[1] == "M" else RTOL
    check_against_keras(model, coupling, sorted({fewest, m}), rtol)


@pytest.mark.parametrize("m", [2, 25])
@pytest.mark.parametrize("policy", ["PPPP", "PPPM", "PPMP", "MMPP", "PMPM"])
def test_pooled_slots_at_three_ranks(policy: str, m: int) -> None:
    keras_model = different((policy, m), (policy, m), (policy, m))
    for layer in bln_layers(keras_model):
        layer.slot_steps.assign([9.0, *[4.0] * (m - 2), 1.0])
        layer.feature_slots = "pool"
    model, live = converted(keras_model), "M" in policy[:2]
    assert model.found.coupling.row_coupling is (RowCoupling.MINI_BATCH if live else RowCoupling.INDEPENDENT)
    assert model.takes(MINI_BATCHES) is live
    assert [(layer.pooled, layer.slots) for layer in model.found.layers] == [(True, None)] * 3
    rtol = RTOL_LIVE_VARIANCE if policy[1] == "M" else RTOL
    check_against_keras(model, model.found.coupling.row_coupling, [2 if live else 1, m, m + 3], rtol)


@pytest.mark.parametrize(
    ("each", "sizes"),
    [
        ([("PPMM", 4), ("PPPP", 7), ("PPMM", 25)], [1, 7]),
        ([("MMMM", 1), ("PPMM", 25), ("PPMM", 2)], [1, 9]),
        ([("PPMP", 25), ("MPPM", 3), ("MMMM", 8)], [2, 3]),
        ([("PMPM", 5), ("PPPP", 6), ("MPMM", 2)], [2, 5]),
    ],
    ids=str,
)
def test_policies_and_m_that_differ_from_layer_to_layer(each: list[tuple[str, int]], sizes: list[int]) -> None:
    model = converted(different(*each))
    coupling = max((coupling_of(*one) for one in each), key=lambda found: found.strength)
    assert model.found.coupling.row_coupling is coupling
    assert [(layer.policy, layer.m) for layer in model.found.layers] == each
    check_against_keras(model, coupling, sizes, RTOL_LIVE_VARIANCE)


def test_at_m_1_a_stored_variance_is_refused_before_any_of_this() -> None:
    refused = set()
    for policy in ALL_POLICIES:
        try:
            freezing.freeze(chain(1), policy.code)
        except UnusableStatisticsError as error:
            assert "variance cannot be estimated at m = 1" in str(error)  # noqa: PT017 - which are refused is the point
            refused.add(policy.code)
    assert refused == {policy.code for policy in ALL_POLICIES if "P" in policy.code[1] + policy.code[3]}


@pytest.mark.parametrize(
    ("policy", "statistic"), [("PPPP", "batch_mean"), ("PPPP", "feature_var"), ("PMPM", "batch_mean")]
)
def test_a_stored_number_that_is_off_by_a_thousandth_is_seen(policy: str, statistic: str) -> None:
    keras_model = different((policy, 2), (policy, 2), (policy, 2))
    model = converted(keras_model)
    bln_layers(keras_model)[0].population[statistic].assign(bln_layers(keras_model)[0].population[statistic] * 1.001)
    with pytest.raises(AssertionError):
        check_against_keras(model, model.found.coupling.row_coupling, [2], RTOL_LIVE_VARIANCE)


def test_rows_that_are_cut_otherwise_are_seen() -> None:
    model = converted(chain(25), "MMMM")
    x = inputs_of(model, 6)
    assert worst_error(model.in_one_run(x, 2), model.keras(x, 2)) > 0.01
