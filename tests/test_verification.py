"""The comparison of answers, and above all that it can fail."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.laws import law

from bln_serve.errors import UsageError
from bln_serve.verification import Check, Tolerance, VerificationReport, compare, compare_all

USUAL = Tolerance()
ANSWERS = np.array([[3.0, -8.0], [0.001, 4.0]])
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


def passes(actual: Any, expected: Any = ANSWERS, tolerance: Tolerance = USUAL) -> bool:
    return compare("answers", np.asarray(expected), np.asarray(actual), tolerance).passed


def test_equal_answers_pass() -> None:
    check = compare("answers", ANSWERS, ANSWERS.copy(), USUAL)
    assert (check.passed, check.difference, check.largest) == (True, 0.0, 8.0)
    assert check.limit == pytest.approx(8e-5)


def test_rounding_passes_and_a_relative_move_of_1e_4_does_not() -> None:
    assert passes(ANSWERS.astype(np.float32))
    assert passes(ANSWERS * (1 + 1e-6))
    assert not passes(ANSWERS * (1 + 1e-4))
    assert not passes(ANSWERS * (1 - 1e-4))


@pytest.mark.parametrize(("moved_by", "passed"), [(7.9e-5, True), (8.1e-5, False), (-8.1e-5, False)])
def test_each_element_may_move_by_the_limit_of_the_largest_answer_and_no_further(moved_by: float, passed: bool) -> None:
    for index in np.ndindex(ANSWERS.shape):
        moved = ANSWERS.copy()
        moved[index] += moved_by
        check = compare("answers", ANSWERS, moved, USUAL)
        assert check.passed is passed
        assert check.worst == str(list(index))


@law
@given(arrays.arrays(np.float64, (2, 3), elements=FINITE), arrays.arrays(np.float64, (2, 3), elements=FINITE))
def test_passes_if_and_only_if_the_largest_difference_is_within_the_limit(left: np.ndarray, right: np.ndarray) -> None:
    check = compare("answers", left, right, Tolerance(atol=0.5, rtol=0.1))
    assert check.limit == pytest.approx(0.5 + 0.1 * np.abs(left).max())
    assert check.difference == np.abs(left - right).max()
    assert check.passed == bool(np.abs(left - right).max() <= check.limit)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sides", ["expected", "actual", "both"])
def test_what_is_not_finite_fails_also_on_both_sides(broken: float, sides: str) -> None:
    spoilt = ANSWERS.copy()
    spoilt[1, 0] = broken
    expected = ANSWERS if sides == "actual" else spoilt
    actual = ANSWERS if sides == "expected" else spoilt
    check = compare("answers", expected, actual, Tolerance(atol=1e9))
    assert (check.passed, check.difference, check.worst) == (False, np.inf, "[1, 0]")


def test_a_difference_that_overflows_fails() -> None:
    assert not passes([-1e308], expected=[1e308], tolerance=Tolerance(atol=1e9))


@pytest.mark.parametrize("shape", [(4,), (2, 2, 1), (1, 2), (4, 1)])
def test_another_shape_fails_also_where_it_would_broadcast(shape: tuple[int, ...]) -> None:
    expected = np.ones((2, 2))
    check = compare("answers", expected, np.ones(shape), Tolerance(atol=1e9))
    assert not check.passed
    assert check.worst == f"shape {shape} in place of (2, 2)"


def test_float32_answers_are_compared_in_float64() -> None:
    expected = np.array([16_777_216.0], np.float32)
    assert compare("answers", expected, expected.astype(np.float64) + 0.5, USUAL).difference == 0.5


def test_large_integers_and_booleans_are_compared_by_value() -> None:
    assert not passes(np.array([0], np.uint8), expected=np.array([255], np.uint8))
    assert not passes(np.array([False, True]), expected=np.array([True, True]))
    assert passes(np.array([True]), expected=np.array([True]))


def test_answers_that_should_all_be_zero_must_be() -> None:
    assert passes([0.0, 0.0], expected=[0.0, 0.0])
    assert not passes([0.0, 1e-12], expected=[0.0, 0.0])
    assert passes([0.0, 1e-12], expected=[0.0, 0.0], tolerance=Tolerance(atol=1e-9))


@pytest.mark.parametrize(
    ("tolerance", "wider"),
    [
        (Tolerance(), False),
        (Tolerance(rtol=1e-6), False),
        (Tolerance(rtol=1.1e-5), True),
        (Tolerance(atol=1e-30), True),
        (Tolerance(atol=1e-30, rtol=0.0), True),
        (Tolerance(rtol=1e30), True),
    ],
)
def test_wider_in_either_part_is_wider(tolerance: Tolerance, wider: bool) -> None:
    assert tolerance.wider_than(USUAL) is wider


def check(difference: float, limit: float = 1.0, largest: float = 4.0) -> Check:
    return Check("ONNX = Keras, 2 rows", difference, limit, largest, "[0, 1]")


def test_an_empty_report_has_not_passed() -> None:
    assert not VerificationReport(()).passed
    assert VerificationReport(()).largest_difference == 0.0


def test_one_failure_among_many_fails_the_report() -> None:
    report = VerificationReport((check(0.5), check(1.5), check(1.0)))
    assert not report.passed
    assert report.failures == (check(1.5),)
    assert VerificationReport((check(0.5), check(1.0))).passed


def test_largest_difference_is_relative_to_its_own_outputs_answers() -> None:
    assert VerificationReport((check(0.5, largest=4.0), check(0.5, largest=0.5))).largest_difference == 1.0


def test_a_line_gives_the_figures_and_the_place_of_the_largest_difference() -> None:
    same, good, bad = (" ".join(check(difference, 1e-5).line().split()) for difference in (0, 2.5e-7, 2.5e-3))
    assert same == "ok ONNX = Keras, 2 rows 0.00e+00 of 1.00e-05 allowed"
    assert good == "ok ONNX = Keras, 2 rows 2.50e-07 of 1.00e-05 allowed, most at [0, 1]"
    assert bad == "FAIL ONNX = Keras, 2 rows 2.50e-03 of 1.00e-05 allowed, most at [0, 1]"
    assert VerificationReport((check(0.5), check(2))).table().count("\n") == 1


def test_a_difference_that_is_not_a_number_does_not_pass() -> None:
    assert not check(float("nan")).passed
    assert not check(0.5, limit=float("nan")).passed


def test_compare_all_names_outputs_only_where_there_are_several() -> None:
    one, two = {"score": ANSWERS}, {"score": ANSWERS, "classes": ANSWERS}
    assert [found.name for found in compare_all("sample 0", one, one, USUAL)] == ["sample 0"]
    assert [found.name for found in compare_all("sample 0", two, two, USUAL)] == [
        "sample 0, score",
        "sample 0, classes",
    ]


def test_compare_all_fails_on_an_output_that_is_not_there() -> None:
    (found,) = compare_all("sample 0", {"score": ANSWERS}, {"other": ANSWERS}, USUAL)
    assert (found.passed, found.worst) == (False, "no output 'score'")


@pytest.mark.parametrize("values", [{"rtol": float("nan")}, {"rtol": float("inf")}, {"atol": -1.0}, {"rtol": -1e-9}])
def test_a_tolerance_that_nothing_or_everything_passes_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="Expected a tolerance of finite numbers from 0. Received: atol "):
        Tolerance(**values)
