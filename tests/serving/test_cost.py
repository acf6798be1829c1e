"""How many rows a run should have: on a clock that a made-up model moves, and for real."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifacts import NAMES, TOGETHER
from support.laws import law

from bln_serve.artifact import Artifact
from bln_serve.runtime import Model
from bln_serve.serving.cost import MAX_ROWS, MAX_RUN_S, NEARLY, REPEATS, SHORT_S, CostCurve, measure
from bln_serve.signature import Arrays, rows_of


class MadeUp:
    """A model that answers what it was asked, and takes as long as it is told.

    Args:
        artifact: whose manifest it has.
        seconds: of a run, by its rows.
        several: whether it takes several mini-batches in one run; by default as the artifact says.
    """

    def __init__(self, artifact: Artifact, seconds: Callable[[int], float], several: bool | None = None) -> None:
        self.manifest = artifact.manifest
        if several is not None:
            self.manifest = replace(self.manifest, several_mini_batches=several)
        self.seconds = seconds
        self.now = 0.0
        self.runs: list[tuple[int, int | None]] = []
        self.inputs: Arrays = {}
        self.trimmed_at: tuple[int, int] | None = None

    def run(self, inputs: Arrays, sizes: tuple[int, ...] | None) -> Arrays:
        return self._take_time(inputs, sizes and len(sizes))

    def run_mini_batches(self, inputs: Arrays, mini_batches: int) -> Arrays:
        return self._take_time(inputs, mini_batches)

    def trim(self, inputs: Arrays) -> None:
        self.trimmed_at = len(self.runs), rows_of(inputs)

    def _take_time(self, inputs: Arrays, mini_batches: int | None) -> Arrays:
        self.inputs = inputs
        self.runs.append((rows_of(inputs), mini_batches))
        self.now += self.seconds(rows_of(inputs))
        return inputs


@pytest.fixture
def made_up(golden_artifacts: Path) -> Callable[..., Any]:
    """Measure a made-up model under a golden model's manifest: the curve, and its runs of rows and mini-batches."""

    def measured(
        name: str, seconds: Callable[[int], float], given_rows: int | None = None, several: bool | None = None
    ) -> tuple[CostCurve, list[tuple[int, int | None]]]:
        artifact = Artifact.open(golden_artifacts / name / "1")
        model = MadeUp(artifact, seconds, several)
        curve = measure(artifact, model, given_rows, clock=lambda: model.now)  # type: ignore[arg-type]
        unit = model.manifest.rule.default_rows if model.manifest.rule else 1
        assert model.trimmed_at == (len(model.runs), unit), "after all of them, and small itself"
        turn = list(dict.fromkeys(model.runs))
        assert Counter(model.runs) == dict.fromkeys(turn, REPEATS), "no run more than it takes"
        return curve, turn

    return measured


def linear(once_s: float, each_s: float) -> Callable[[int], float]:
    return lambda rows: once_s + each_s * rows


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        pytest.param(linear(0.01, 0), 512, id="a run costs the same whatever it holds, and is long"),
        pytest.param(linear(1e-4, 1e-5), 256, id="256 rows at 96240 a second, of 98084; 128 at 92754"),
        pytest.param(linear(1e-6, 1e-5), 256, id="nearly nothing but rows: the largest short run"),
        pytest.param(linear(0, 1e-5), 256, id="nothing but rows"),
        pytest.param(linear(0, 5e-3), 1, id="nothing but rows, and none of them short"),
        pytest.param(lambda rows: 1e-5 * rows * (1 + rows / 64), 8, id="every further row costs more"),
        pytest.param(lambda rows: (1e-4 + 1e-5 * rows) * (1 + (rows > 32)), 32, id="no room in the cache above 32"),
    ],
)
def test_the_limit_is_the_largest_short_run_near_the_best_rate_or_else_the_smallest(
    seconds: Callable[[int], float], limit: int, made_up: Callable[..., Any]
) -> None:
    curve, _ = made_up("digits_cnn", seconds)
    assert curve.max_run_rows == limit


@pytest.mark.parametrize(
    ("points", "limit"),
    [
        pytest.param(((8, 1.0),), 8, id="one point"),
        pytest.param(((1, 1.0), (2, 1.82)), 1, id="91 % of the best"),
        pytest.param(((1, 1.0), (2, 1.78)), 2, id="89 % of the best"),
        pytest.param(((1, 1.0), (2, 1.0), (4, 4.0)), 2, id="the best in the middle"),
        pytest.param(((1, 0.002), (2, 0.004), (4, 0.008)), 2, id="the largest that is short"),
        pytest.param(((1, 0.002), (2, 0.0042), (4, 0.008)), 1, id="near the best, and not short"),
    ],
)
def test_what_is_near_enough(points: tuple[tuple[int, float], ...], limit: int) -> None:
    assert CostCurve(points).max_run_rows == limit


@pytest.mark.parametrize(
    ("points", "rows"),
    [
        pytest.param(((1, 0.002), (2, 0.0038), (4, 0.02)), 2, id="the largest that was timed"),
        pytest.param(((1, 0.003), (2, 0.0042), (4, 0.005)), 3, id="what a longer run makes of it"),
        pytest.param(((64, 0.008),), 32, id="half of the only one"),
        pytest.param(((1, 0.008),), 0, id="not even one row"),
    ],
)
def test_what_is_short_enough_for_the_event_loop(points: tuple[tuple[int, float], ...], rows: int) -> None:
    assert CostCurve(points).loop_rows == rows


@law
@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=10))
def test_the_limit_is_near_the_best_rate_and_as_large_as_is_short(seconds: list[float]) -> None:
    curve = CostCurve(tuple((2**index, each) for index, each in enumerate(seconds)))
    rates = {rows: rows / each for rows, each in curve.points}
    assert rates[curve.max_run_rows] >= NEARLY * max(rates.values())
    near = [rows for rows, rate in rates.items() if rate >= NEARLY * max(rates.values())]
    short = [rows for rows in near if dict(curve.points)[rows] <= SHORT_S]
    assert curve.max_run_rows == (max(short) if short else min(near))


@pytest.mark.parametrize(
    ("name", "several", "rows"),
    [
        ("digits_cnn", None, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
        ("together_mpmm", None, [5, 10, 20, 40, 80, 160, 320]),
        ("together_pppp", None, [4, 8, 16, 32, 64, 128, 256, 512]),
        ("digits_rnn", True, [25, 50, 100, 200, 400]),
        ("digits_rnn", None, [25]),
        ("tiny_pppp", None, [4]),
    ],
)
def test_runs_grow_by_whole_mini_batches_up_to_the_most_rows(
    name: str, several: bool | None, rows: list[int], made_up: Callable[..., Any]
) -> None:
    curve, runs = made_up(name, linear(1e-4, 0), several=several)
    assert [rows for rows, _ in curve.points] == rows
    unit = None if name == "digits_cnn" else rows[0]
    assert runs == [(each, unit and each // unit) for each in rows]
    assert rows[-1] <= MAX_ROWS


@pytest.mark.parametrize(
    ("each_s", "rows"),
    [(1.0, [1]), (0.026, [1]), (0.024, [1, 2]), (0.001, [1, 2, 4, 8, 16, 32])],
)
def test_runs_stop_growing_before_they_take_too_long(
    each_s: float, rows: list[int], made_up: Callable[..., Any]
) -> None:
    curve, _ = made_up("digits_cnn", linear(0, each_s))
    assert [rows for rows, _ in curve.points] == rows
    assert all(seconds <= MAX_RUN_S for _, seconds in curve.points[1:])


@pytest.mark.parametrize(
    ("name", "given_rows", "rows"),
    [
        ("digits_cnn", 48, 48),
        ("digits_cnn", 1, 1),
        ("digits_cnn", 1000, 1000),
        ("together_mpmm", 48, 45),  # nine mini-batches of five
        ("together_mpmm", 3, 5),  # a mini-batch is never cut
        ("digits_rnn", 100, 25),  # of which one mini-batch is a run
    ],
)
def test_a_given_limit_is_timed_alone(name: str, given_rows: int, rows: int, made_up: Callable[..., Any]) -> None:
    curve, runs = made_up(name, linear(1e-4, 1e-6), given_rows)
    assert [rows for rows, _ in runs] == [rows]
    assert curve.max_run_rows == rows


def test_what_disturbs_some_of_the_runs_does_not_count(made_up: Callable[..., Any]) -> None:
    calm = linear(1e-4, 1e-5)
    runs: dict[int, int] = {}

    def disturbed(rows: int) -> float:
        runs[rows] = runs.get(rows, 0) + 1
        return calm(rows) * (1 if (runs[rows] + rows.bit_length()) % REPEATS == 0 else 20)

    curve, _ = made_up("digits_cnn", disturbed)
    assert [seconds for _, seconds in curve.points] == [pytest.approx(calm(rows)) for rows, _ in curve.points]
    assert curve.max_run_rows == 256


@pytest.mark.parametrize("slower", [1.4, 1 / 1.4], ids=["slower", "faster"])
@pytest.mark.parametrize("after", [0.25, 0.35, 0.5, 0.65, 0.75])
def test_a_machine_that_changes_its_speed_gives_the_same_limit(
    after: float, slower: float, made_up: Callable[..., Any]
) -> None:
    """As one does whose other tenants come and go: after this share of the time, for all the rest of it."""
    calm = linear(1e-4, 5e-5)
    limit = made_up("digits_cnn", calm)[0].max_run_rows
    whole_s = REPEATS * sum(calm(2**index) for index in range(10))
    passed = 0.0

    def seconds(rows: int) -> float:
        nonlocal passed
        run_s = calm(rows) * (slower if passed > after * whole_s else 1)
        passed += run_s
        return run_s

    assert limit == 64
    assert made_up("digits_cnn", seconds)[0].max_run_rows == limit


def test_what_is_run_are_the_samples_again_and_again(golden_artifacts: Path) -> None:
    artifact = Artifact.open(golden_artifacts / "tiny_two_inputs" / "1")
    model = MadeUp(artifact, linear(1e-4, 0))
    measure(artifact, model, 33, clock=lambda: model.now)  # type: ignore[arg-type]
    for name, array in artifact.samples()[-1].inputs.items():
        np.testing.assert_array_equal(model.inputs[name], np.concatenate([array, array, array[:3]]))


@pytest.mark.parametrize("name", [*NAMES, *TOGETHER])
def test_a_real_model(name: str, golden_artifacts: Path) -> None:
    """That it runs and gives a limit: how fast is not a test's to say."""
    artifact = Artifact.open(golden_artifacts / name / "1")
    model = Model(artifact, threads=1)
    curve = measure(artifact, model)
    unit = model.manifest.rule.default_rows if model.manifest.rule else 1
    sizes = [rows for rows, _ in curve.points]
    assert sizes == [unit * 2**index for index in range(len(sizes))]
    assert curve.max_run_rows in sizes
    assert all(seconds > 0 for _, seconds in curve.points)
