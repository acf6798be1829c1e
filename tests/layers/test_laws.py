"""The laws in the layer's docstring, each with the places where it stops.

The layers compute in float64, so that what is left of a law is epsilon's part, which has a bound, and rounding. A
branch is looked at alone by giving the other the weight 0.
"""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import law
from support.models import with_random_statistics

from bln_serve.layers import BatchLayerNormalization
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy

EPSILON = 1e-3
ROUNDING = 1e-9  # of float64, after offsets up to 100
law = settings(law, max_examples=12)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda shape: (*shape[:-1], shape[-1] + 1))
sizes = st.sampled_from([2, 3, 25])


class BatchBranch(BatchLayerNormalization):
    """The batch branch alone."""

    branch_weights = (1.0, 0.0)


class FeatureBranch(BatchLayerNormalization):
    """The feature branch alone."""

    branch_weights = (0.0, 1.0)


BRANCHES = {"batch": (BatchBranch, 0), "feature": (FeatureBranch, -1)}
branches = pytest.mark.parametrize(("kind", "axis"), BRANCHES.values(), ids=list(BRANCHES))


def layer_for(x: np.ndarray, policy: str = "MMMM", kind=BatchLayerNormalization, m: int | None = None, plain=True):
    """Return a float64 layer; `plain` has gamma 1 and beta 0. Its stored statistics look trained."""
    layer = kind(m or len(x), dtype="float64")
    model = keras.Sequential([keras.Input(x.shape[1:], dtype="float64"), layer])
    with_random_statistics(model, seed=3)
    if plain:
        layer.gamma.assign(np.ones(layer.gamma.shape))
        layer.beta.assign(np.zeros(layer.beta.shape))
    layer.policy = StatisticsPolicy.from_code(policy)
    return layer


def answer(layer: BatchLayerNormalization, x: np.ndarray, training: bool = False) -> np.ndarray:
    return np.asarray(layer(keras.ops.convert_to_tensor(x, "float64"), training=training))


def draw(generator: np.random.Generator, shape: tuple[int, ...], rows: int) -> np.ndarray:
    return generator.normal(generator.uniform(-3, 3), 10 ** generator.uniform(-1, 1), (rows, *shape))


def common_to(axis: int, x: np.ndarray, draw_one) -> np.ndarray:
    """Draw one number for each statistic of a branch, in a shape to broadcast against x."""
    shape = list(x.shape)
    shape[axis] = 1
    return draw_one(tuple(shape))


def epsilons_part(x: np.ndarray, axis: int, scale: np.ndarray) -> np.ndarray:
    """Return how far a branch may move by x -> scale * x: the docstring's bound, and it is 0 where x is its mean."""
    mean, var = x.mean(axis=axis, keepdims=True), x.var(axis=axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.abs(x - mean) / np.sqrt(var) * EPSILON * np.abs(1 - 1 / scale**2) / (2 * var)
    return np.nan_to_num(bound, nan=0.0) / np.sqrt(x.shape[-1])


def assert_same(y: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float = 0.0) -> None:
    assert (np.abs(y - expected) <= allowed + ROUNDING).all()


def differs(y: np.ndarray, other: np.ndarray, by: float = 1e-3) -> bool:
    return bool(np.abs(y - other).max() > by)


# A live branch


@branches
@law
@given(generators, shapes, sizes)
def test_a_live_branch_does_not_change_with_shift_and_scale_up_to_epsilon(kind, axis, generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    scale = common_to(axis, x, lambda shape: 10 ** generator.uniform(-1, 2, shape))
    shift = common_to(axis, x, lambda shape: generator.uniform(-100, 100, shape))
    layer = layer_for(x, kind=kind)
    for training in (False, True):
        moved = answer(layer, scale * x + shift, training)
        assert_same(moved, answer(layer, x, training), epsilons_part(x, axis, scale))


@branches
@law
@given(generators, shapes, sizes)
def test_a_shift_alone_changes_nothing_and_a_scale_acts_in_epsilons_place(kind, axis, generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    layer = layer_for(x, kind=kind)
    shift = common_to(axis, x, lambda shape: generator.uniform(-100, 100, shape))
    assert_same(answer(layer, x + shift), answer(layer, x))
    scale = 10 ** generator.uniform(-2, 2)
    scaled = answer(layer, scale * x)
    layer.epsilon = EPSILON / scale**2
    assert_same(scaled, answer(layer, x))


@branches
@law
@given(generators, shapes, sizes)
def test_a_negative_scale_turns_a_live_branchs_sign(kind, axis, generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    layer = layer_for(x, kind=kind)
    assert_same(answer(layer, -x), -answer(layer, x))


@branches
def test_it_stops_where_the_variance_is_no_larger_than_epsilon(kind, axis) -> None:
    x = np.random.default_rng(0).normal(0, 1e-3, (5, 4))
    layer = layer_for(x, kind=kind)
    np.testing.assert_allclose(answer(layer, 3 * x), 3 * answer(layer, x), rtol=0.02)
    assert (answer(layer, np.full((5, 4), 7.0)) == 0).all()


@pytest.mark.parametrize(("kind", "other_axis"), [(BatchBranch, -1), (FeatureBranch, 0)])
def test_it_stops_for_shifts_and_scales_of_the_other_branchs_shape(kind, other_axis) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(0, 1, (5, 4))
    layer = layer_for(x, kind=kind)
    shift = common_to(other_axis, x, lambda shape: generator.uniform(-3, 3, shape))
    scale = common_to(other_axis, x, lambda shape: generator.uniform(2, 9, shape))
    assert differs(answer(layer, x + shift), answer(layer, x), 0.1)
    assert differs(answer(layer, x * scale), answer(layer, x), 0.1)


# Weights before the layer


@law
@given(generators, st.integers(2, 5), sizes)
def test_the_weights_of_a_dense_layer_before_it_that_do_not_matter(generator, units, rows) -> None:
    x, kernel, bias = draw(generator, (3,), rows), generator.normal(size=(3, units)), generator.normal(size=units)
    scales, shifts = 10 ** generator.uniform(-1, 1, units), generator.uniform(-5, 5, units)
    dense = x @ kernel + bias
    batch, feature = (layer_for(dense, kind=kind) for kind in (BatchBranch, FeatureBranch))
    by_column = x @ (kernel * scales) + (bias + shifts)
    assert_same(answer(batch, by_column), answer(batch, dense), epsilons_part(dense, 0, scales))
    whole = x @ (kernel * scales[0]) + (bias * scales[0] + shifts[0])
    assert_same(answer(feature, whole), answer(feature, dense), epsilons_part(dense, -1, scales[:1]))


def test_the_weights_that_do_matter_are_those_of_the_other_branch() -> None:
    generator = np.random.default_rng(2)
    x, kernel, bias = generator.normal(size=(5, 3)), generator.normal(size=(3, 4)), generator.normal(size=4)
    dense = x @ kernel + bias
    feature, both = layer_for(dense, kind=FeatureBranch), layer_for(dense)
    other_bias = x @ kernel + bias + [1, -2, 3, 0]
    assert differs(answer(feature, other_bias), answer(feature, dense))
    assert differs(answer(both, other_bias), answer(both, dense))


# The sum of both


@law
@given(generators, shapes, sizes)
def test_the_sum_does_not_change_for_what_suits_both_branches(generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    common = (1, *shape[:-1], 1)
    scale, shift = 10 ** generator.uniform(-1, 2, common), generator.uniform(-100, 100, common)
    layer = layer_for(x)
    allowed = epsilons_part(x, 0, scale) + epsilons_part(x, -1, scale)
    assert_same(answer(layer, scale * x + shift), answer(layer, x), allowed)


@pytest.mark.parametrize("axis", [0, -1])
def test_the_sum_changes_for_what_suits_one_branch_alone(axis: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(3, 4))
    shift = common_to(axis, x, lambda shape: generator.uniform(-3, 3, shape))
    layer = layer_for(x)
    for training in (False, True):
        assert differs(answer(layer, x + shift, training), answer(layer, x, training), 0.01)


# Stored statistics


@branches
@law
@given(generators, shapes, sizes)
def test_under_a_stored_variance_the_shift_holds_and_the_branch_grows(kind, axis, generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    layer = layer_for(x, "MPMP", kind)
    scale = common_to(axis, x, lambda shape: 10 ** generator.uniform(-1, 1, shape))
    shift = common_to(axis, x, lambda shape: generator.uniform(-100, 100, shape))
    assert_same(answer(layer, x + shift), answer(layer, x))
    np.testing.assert_allclose(answer(layer, scale * x), scale * answer(layer, x), rtol=1e-9, atol=ROUNDING)


@branches
@pytest.mark.parametrize("policy", ["PPPP", "PMPM"])
def test_a_stored_mean_ends_both_laws(kind, axis, policy: str) -> None:
    x = np.random.default_rng(4).normal(size=(5, 4))
    layer = layer_for(x, policy, kind)
    name = "batch_var" if axis == 0 else "feature_var"
    var = layer.population[name].numpy() if policy == "PPPP" else x.var(axis=axis, keepdims=True)
    moved = 2.0 / np.sqrt(var + EPSILON) / np.sqrt(4)
    assert_same(answer(layer, x + 2.0), answer(layer, x) + moved)
    assert differs(answer(layer, 3 * x), answer(layer, x))
    assert differs(answer(layer, 3 * x), 3 * answer(layer, x))


# Rows


def test_rows_in_another_order_give_the_same_answers_unless_slots_make_them_positional() -> None:
    @law
    @given(generators, shapes, st.sampled_from([1, 2, 5]), st.sampled_from(ALL_POLICIES))
    def holds(generator, shape, m, policy) -> None:
        x = draw(generator, shape, 5)[: None if m == 1 else m]
        order = generator.permutation(len(x))
        layer = layer_for(x, policy.code, m=m, plain=False)
        if m == 1 or not policy.stored_by_slot:
            assert_same(answer(layer, x[order]), answer(layer, x)[order])

    holds()


@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES if policy.stored_by_slot])
def test_under_stored_feature_statistics_rows_in_another_order_give_other_answers(policy: str) -> None:
    x = np.random.default_rng(5).normal(size=(5, 4))
    layer = layer_for(x, policy)
    assert differs(answer(layer, x[::-1]), answer(layer, x)[::-1], 0.01)


@law
@given(generators, shapes, sizes)
def test_training_gives_rows_in_another_order_the_same_answers(generator, shape, rows) -> None:
    x = draw(generator, shape, rows)
    order = generator.permutation(rows)
    layer = layer_for(x, plain=False)
    assert_same(answer(layer, x[order], True), answer(layer, x, True)[order])


@law
@given(generators, shapes, st.sampled_from([1, 2, 3, 25]), st.integers(1, 25))
def test_inference_under_mmmm_is_the_training_output(generator, shape, m, rows) -> None:
    x = draw(generator, shape, min(rows, m))
    layer = layer_for(x, m=m, plain=False)
    np.testing.assert_array_equal(answer(layer, x), answer(layer, x, training=True))


@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES if policy.stored])
def test_inference_under_no_other_policy_is_the_training_output(policy: str) -> None:
    x = np.random.default_rng(6).normal(size=(5, 4))
    layer = layer_for(x, policy)
    assert differs(answer(layer, x), answer(layer, x, training=True))


@law
@given(generators, shapes, sizes, st.integers(1, 9))
def test_under_ppmm_a_row_alone_gives_its_answer_in_company(generator, shape, m, rows) -> None:
    x = draw(generator, shape, rows)
    layer = layer_for(x, "PPMM", m=m, plain=False)
    together = answer(layer, x)
    for row in range(rows):
        assert_same(answer(layer, x[row : row + 1]), together[row : row + 1])


@law
@given(generators, shapes, st.integers(1, 4), st.sampled_from(["PPPP", "PPPM", "PPMP"]))
def test_with_stored_feature_statistics_the_first_rows_may_come_without_the_others(
    generator, shape, rows, policy
) -> None:
    x = draw(generator, shape, 4)
    layer = layer_for(x, policy, plain=False)
    assert_same(answer(layer, x[:rows]), answer(layer, x)[:rows])


@law
@given(generators, shapes, sizes, st.integers(1, 9), st.sampled_from(["PPPP", "PPPM", "PPMP"]))
def test_with_pooled_slots_a_row_alone_or_in_any_place_gives_its_answer_in_company(
    generator, shape, m, rows, policy
) -> None:
    x = draw(generator, shape, rows)
    layer = layer_for(x, policy, m=m, plain=False)
    layer.feature_slots = "pool"
    together, order = answer(layer, x), generator.permutation(rows)
    assert_same(answer(layer, x[order]), together[order])
    for row in range(rows):
        assert_same(answer(layer, x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES if policy.code != "PPMM"])
def test_under_every_other_policy_some_row_alone_gives_another_answer(policy: str) -> None:
    x = np.random.default_rng(7).normal(size=(5, 4))
    layer = layer_for(x, policy)
    alone = np.concatenate([answer(layer, row[None]) for row in x])
    assert differs(alone, answer(layer, x))


@pytest.mark.parametrize(("policy", "factor"), [("MMMM", 0.0), ("MPMM", 0.0), ("PMMM", 1 / EPSILON**0.5)])
def test_one_row_under_a_live_batch_statistic_has_a_batch_branch_without_meaning(policy: str, factor: float) -> None:
    x = np.random.default_rng(8).normal(size=(1, 4))
    layer = layer_for(x, policy, BatchBranch, m=4)
    assert_same(answer(layer, x), (x - layer.population["batch_mean"].numpy()) * factor / 2)


# What m does


def test_m_decides_the_weights_of_the_branches() -> None:
    x = np.random.default_rng(9).normal(size=(4, 3))
    batch, feature = (answer(layer_for(x, kind=kind), x) for kind in (BatchBranch, FeatureBranch))
    for m, w_b, w_f in ((4, 0.7499, 0.2499), (25, 0.9599, 0.0399), (10_000, 0.9998, 0.0), (20_000, 0.99985, -5e-5)):
        assert_same(answer(layer_for(x, m=m), x), w_b * batch + w_f * feature)
    assert BatchLayerNormalization(1).branch_weights == pytest.approx((-1e-4, 0.9999), abs=1e-15)


def test_with_one_feature_the_feature_branch_is_zero() -> None:
    x = np.random.default_rng(10).normal(size=(4, 3, 1))
    assert (answer(layer_for(x, kind=FeatureBranch), x) == 0).all()
