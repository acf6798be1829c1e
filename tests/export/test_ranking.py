"""The ranking by loss, the comparison mini-batch by mini-batch, and the choice between loss and row coupling."""

import statistics
from math import inf, isnan, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.selections import NEVER, entry, ranked, sixteen

from bln_serve.errors import UsageError
from bln_serve.export.selection.ranking import COUPLING_LIMITS, Selection
from bln_serve.export.selection.record import figure
from bln_serve.manifest import StoredStatistics
from bln_serve.statistics import ALL_POLICIES, RowCoupling

# Sums of a few float64 near 1, in another order: 1e-12 is thousands of their units in the last place.
RTOL = ATOL = 1e-12


def names(selection: Selection) -> list[str]:
    return [each.policy for each in selection.entries]


def chosen(selection: Selection) -> str:
    return selection.entries[selection.chosen].name


# --- The order


def test_numbers_come_before_infinity_before_nan_before_the_unusable() -> None:
    found = ranked({"MMMM": NEVER, "MMMP": [nan, 1], "MMPM": [inf, 1], "MMPP": [3, 3], "PPMM": [5, 5]})
    assert names(found) == ["MMPP", "PPMM", "MMPM", "MMMP", "MMMM"]
    assert [each.loss for each in found.entries[:3]] == [3, 5, inf]
    assert isnan(found.entries[3].loss or 0)
    assert (found.entries[4].loss, found.entries[4].standard_error) == (None, None)


def test_the_loss_is_the_mean() -> None:
    assert ranked({"PPMM": [1, 2, 6]}).entries[0].loss == 3


@pytest.mark.parametrize("losses", [[1.0, 1.0], [nan, 1.0], NEVER])
def test_among_equals_the_weaker_coupling_is_first_and_then_the_order_given(losses: Any) -> None:
    alike = dict.fromkeys(["MMMM", "MPMM", "PPPP", "PPMP", "PPMM", "PPMM calibrated"], losses)
    found = ranked({"MMPM": [2, 2], **alike})
    assert [each.name.removesuffix(" as trained") for each in found.entries if each.policy != "MMPM"] == [
        *("PPMM", "PPMM calibrated", "PPPP", "PPMP", "MMMM", "MPMM"),
    ]


def test_losses_of_both_infinities_are_nan_and_no_warning() -> None:
    found = ranked({"MMMM": [inf, -inf], "MMMP": [1.7e308, 1.7e308], "PPMM": [1, 1]})
    assert names(found) == ["PPMM", "MMMP", "MMMM"]
    assert [each.loss for each in found.entries[1:]] == pytest.approx([inf, nan], nan_ok=True)


# --- The standard error of the paired difference


def test_the_standard_error_is_that_of_the_paired_differences() -> None:
    a, b = [1.0, 2.0, 4.0, 3.0], [1.5, 2.25, 4.75, 3.0]
    found = ranked({"MMMM": a, "PPMM": b})
    differences = [y - x for x, y in zip(a, b, strict=True)]
    expected = statistics.stdev(differences) / len(a) ** 0.5
    np.testing.assert_allclose(found.entries[1].standard_error, expected, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(found.best[0].difference, statistics.fmean(differences), rtol=RTOL, atol=ATOL)
    assert found.entries[0].standard_error == 0
    # The mini-batches differ among each other by far more: unpaired, this would be about 0.9.
    unpaired = (statistics.variance(a) / 4 + statistics.variance(b) / 4) ** 0.5
    assert unpaired > 5 * expected


@pytest.mark.parametrize("more", [1e-9, 5.0])
def test_one_mini_batch_has_no_standard_error_and_the_weakest_coupling_wins(more: float) -> None:
    found = ranked({"MMMM": [1.0], "PPMM": [1.0 + more], "PPMM calibrated": [7.0], "PPPP": [1.0], "PPPM": NEVER})
    assert chosen(found) == "PPMM as trained"
    assert [each.standard_error for each in found.entries] == pytest.approx([0, nan, nan, nan, None], nan_ok=True)
    assert isnan(found.best[0].standard_error)
    assert found.reason == (
        f"PPMM as trained: its loss is {figure(more)} above that of PPPP as trained, which a single mini-batch cannot "
        "tell from noise, and its rows are independent"
    )


@pytest.mark.parametrize(
    ("losses", "coupling", "expected"),
    [
        ({"MMMM": [1.0], "PPPP": [2.0], "PPMM": [nan]}, "any", "PPPP"),
        ({"MMMM": [1.0], "PPPP": [2.0], "PPMM": [3.0]}, "independent", "PPMM"),
        ({"MMMM": [1.0], "PPPP": [2.0]}, "positional", "PPPP"),
        ({"MMMM": [3.0], "PPMM": [2.0]}, "any", "PPMM"),
    ],
)
def test_one_mini_batch_within_the_limit(losses: Any, coupling: str, expected: str) -> None:
    found = ranked(losses, coupling=coupling)
    assert chosen(found) == f"{expected} as trained"
    assert ("a single mini-batch" in found.reason) == (found.chosen != found.reference)


def test_a_difference_whose_deviation_overflows_is_not_taken_for_noise() -> None:
    found = ranked({"MMMM": [1.0, 1.0], "PPMM": [1e300, 2.0]})
    assert chosen(found) == "MMMM as trained"
    assert found.reason.endswith("costs 5.00e+299 more, and there is no standard error to judge it by")


@pytest.mark.parametrize("broken", [nan, inf])
def test_an_infinite_or_nan_loss_has_no_standard_error_and_is_no_comparison(broken: float) -> None:
    found = ranked({"MMMM": [1, 2], "PPMM": [broken, 2]})
    assert isnan(found.entries[1].standard_error or 0)
    assert [each.row_coupling for each in found.best] == [RowCoupling.MINI_BATCH]
    assert found.reason == "MMMM as trained has the lowest loss; no policy with independent rows has a finite loss"


# --- The choice


def test_within_one_standard_error_the_weaker_coupling_wins_and_it_says_so() -> None:
    found = ranked({"MMMM": [1.0, 2.0, 3.0], "PPMM": [1.2, 1.9, 3.0]})
    assert chosen(found) == "PPMM as trained"
    assert found.reason == (
        "PPMM as trained: its loss is 0.0333 above that of MMMM as trained, within one standard error (0.0882) of the "
        "paired difference, and its rows are independent"
    )
    assert (found.chosen, found.reference) == (1, 0)


def test_beyond_one_standard_error_the_lowest_loss_wins_and_its_price_is_said() -> None:
    found = ranked({"MMMM": [1.0, 2.0, 3.0], "PPMM calibrated": [1.2, 2.1, 3.0], "PPMM": [2, 3, 4]})
    assert chosen(found) == "MMMM as trained"
    assert found.reason == (
        "MMMM as trained has the lowest loss; the best with independent rows, PPMM calibrated, costs 0.1000 "
        "(standard error 0.0577) more"
    )


def test_the_weakest_coupling_that_is_near_enough_wins() -> None:
    near, far = [1.0, 2.1, 2.95], [2.0, 3.0, 4.0]
    lowest = [1.0, 2.0, 3.0]
    assert chosen(ranked({"MMMM": lowest, "PPPP": near, "PPMM": near})) == "PPMM as trained"
    found = ranked({"MMMM": lowest, "PPPP": near, "PPMM": far})
    assert chosen(found) == "PPPP as trained"
    assert "and an answer depends on its row's place alone, not on other rows; the best with ind" in found.reason
    assert found.reason.endswith("PPMM as trained, costs 1.0000 (standard error 0.0000) more than MMMM as trained")
    assert chosen(ranked({"MMMM": lowest, "PPPP": far, "PPMM": near})) == "PPMM as trained"


def test_the_lowest_loss_with_independent_rows_is_simply_best() -> None:
    found = ranked({"MMMM": [3.0, 2.0], "PPMM": [1.0, 2.0]})
    assert found.reason == "PPMM as trained has the lowest loss, and its rows are independent"


def test_a_difference_that_is_always_the_same_is_no_noise() -> None:
    assert chosen(ranked({"MMMM": [1.0, 2.0], "PPMM": [1.25, 2.25]})) == "MMMM as trained"


@pytest.mark.parametrize(
    ("origin", "name"),
    [("as trained", "MMMM as trained"), ("reference batch", "MMMM with reference batch")],
)
def test_an_entry_in_words(origin: str, name: str) -> None:
    assert entry("MMMM", origin).name == name


# --- The limit


@pytest.mark.parametrize(("coupling", "expected"), [("any", "MMMM"), ("positional", "PPPP"), ("independent", "PPMM")])
def test_the_limit(coupling: str, expected: str) -> None:
    found = ranked({"MMMM": [1, 2], "PPPP": [2, 3], "PPMM": [3, 4]}, coupling=coupling)
    assert found.entries[found.chosen].policy == expected
    assert (" that --coupling " in found.reason) == (coupling != "any")
    assert [found.allows(each) for each in found.entries] == [
        *(coupling == "any", coupling != "independent", True),
    ]


def test_what_is_beyond_the_limit_is_compared_and_shown_to_be_better() -> None:
    found = ranked({"MMMM": [1.0, 2.0], "PPMM": [3.0, 4.5]}, coupling="independent")
    assert [each.difference for each in found.best] == [0, -2.25]
    assert [each.standard_error for each in found.best] == [0, 0.25]
    assert [found.difference(each) for each in found.entries] == [-2.25, 0]


def test_a_limit_that_excludes_nothing_better_is_not_named() -> None:
    assert "--coupling" not in ranked({"MMMM": [5, 6], "PPMM": [3, 4]}, coupling="independent").reason


@pytest.mark.parametrize(
    ("losses", "coupling", "message"),
    [
        (
            {"MMMM": [1, 2]},
            "independent",
            r"that --coupling independent allows.*MMMM as trained: mini-batch rows\nTo c",
        ),
        (
            {"PPPP": [1, 2]},
            "independent",
            r"PPPP as trained: positional rows\nTo choose one, allow a stronger row coup",
        ),
        ({"PPMM": [nan, 2]}, "any", r"a finite loss\. Received:\n  PPMM as trained: a loss of NaN\n.* data is scaled"),
        (
            {"PPMM": [inf, 2]},
            "any",
            r"a loss of infinite\n.*, or estimate the stored statistics again with --calibrate",
        ),
        ({"PPMM": NEVER, "PPPP": NEVER}, "any", rf"PPMM as trained, PPPP as trained: {NEVER}\nTo choose one, estimate"),
        ({"PPMM": NEVER, "MMMM": [1, 2]}, "positional", r"(?s)mini-batch rows.*allow a stronger.*, or estimate the st"),
    ],
)
def test_nothing_that_may_be_chosen_is_refused_with_the_reasons(losses: Any, coupling: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)Expected a policy with .*{message.removeprefix('(?s)')}"):
        ranked(losses, coupling=coupling)


def test_another_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="independent, positional, any. Received: 'mini-batch'"):
        ranked({"PPMM": [1, 2]}, coupling="mini-batch")


@pytest.mark.parametrize("rows", [4, 14, 20])
def test_losses_that_are_not_those_of_the_mini_batches_are_refused(rows: int) -> None:
    with pytest.raises(UsageError, match=r"a loss for each mini-batch. Received: \d mini-batches and losses of shape"):
        ranked({"PPMM": [1, 2, 3]}, rows=rows)


# --- The facts


def test_the_facts() -> None:
    found = ranked({"PPMM": [1, 2]}, m=25, dropped=7, feature_slots="pool")
    assert (found.rows, found.dropped_rows, found.mini_batch_rows, found.mini_batches) == (57, 7, 25, 2)
    assert found.evaluated == "50 rows in 2 mini-batches of 25"
    assert (found.feature_slots, found.coupling, found.loss, found.metrics) == ("pool", "any", "mse", ("accuracy",))
    assert found.variants == ()
    stored = StoredStatistics("calibrated", "rows.npz", "cd" * 32, 50)
    assert ranked({"PPMM": [1, 2]}, variants=[stored]).variants == (stored,)


def test_the_couplings_are_those_of_the_sixteen() -> None:
    found = sixteen()
    assert [each.row_coupling for each in found.best] == list(RowCoupling)
    assert {each.policy for each in found.entries} == {str(policy) for policy in ALL_POLICIES}


# --- Against an oracle in plain Python

CODES = [policy.code for policy in ALL_POLICIES]
# Eighths: their sums and differences are exact, so that the oracle's order is the order.
eighths = st.integers(-40, 40).map(lambda number: number / 8)


def by_hand(losses: dict[str, list[float]], coupling: str) -> str:
    """Return the code to choose, by lists and dicts alone."""
    weak = {"PPMM": 0, **{f"PP{rest}": 1 for rest in ("PP", "PM", "MP")}}
    strength = {code: weak.get(code, 2) for code in losses}
    allowed = [code for code in losses if strength[code] <= ["independent", "positional", "any"].index(coupling)]
    order = sorted(allowed, key=lambda code: (sum(losses[code]), strength[code], list(losses).index(code)))
    lowest = order[0]
    for level in range(3):
        for code in order:
            if strength[code] == level:
                apart = [mine - other for mine, other in zip(losses[code], losses[lowest], strict=True)]
                count = len(apart)
                mean = sum(apart) / count
                squares = sum((each - mean) ** 2 for each in apart)
                # mean <= sqrt(squares / (count - 1) / count), of numbers not below 0; one mini-batch tells nothing
                if code == lowest or count == 1 or mean**2 * (count - 1) * count < squares * (1 - 1e-9):
                    return code
                if abs(mean**2 * (count - 1) * count - squares) <= 1e-9 * squares and squares:
                    return ""  # on the edge, where rounding decides
                break
    raise AssertionError


@law
@given(data=st.data(), coupling=st.sampled_from(COUPLING_LIMITS), count=st.integers(1, 5))
def test_the_choice_is_that_of_the_oracle(data: st.DataObject, coupling: str, count: int) -> None:
    codes = ["PPMM", *data.draw(st.lists(st.sampled_from([code for code in CODES if code != "PPMM"]), unique=True))]
    losses = {code: data.draw(st.lists(eighths, min_size=count, max_size=count)) for code in codes}
    found = ranked(losses, coupling=coupling)
    expected = by_hand(losses, coupling)
    assert expected in ("", found.entries[found.chosen].policy)
    assert [each.loss for each in found.entries] == pytest.approx(sorted(map(statistics.fmean, losses.values())))


@law
@given(
    data=st.data(),
    shift=st.lists(eighths, min_size=4, max_size=4),
    codes=st.lists(st.sampled_from(CODES), unique=True, min_size=1),
)
def test_what_makes_a_mini_batch_hard_for_all_changes_no_choice(
    data: st.DataObject, shift: list[float], codes: list[str]
) -> None:
    losses = {code: data.draw(st.lists(eighths, min_size=4, max_size=4)) for code in codes}
    harder = {code: [x + y for x, y in zip(each, shift, strict=True)] for code, each in losses.items()}
    before, after = ranked(losses), ranked(harder)
    assert names(before) == names(after)
    assert (before.chosen, before.reason, before.best) == (after.chosen, after.reason, after.best)
