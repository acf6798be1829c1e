"""Selecting a statistics policy: every candidate on the same validation data, ranked, and one of them taken.

The candidates are the 16 policies with what the model has stored; with data for it, the 15 that store something with
what is stored calibrated, each under itself; and with a reference mini-batch the 12 whose live batch statistics it can
freeze. The seeds' authors search the 16 by building the model anew for each and choose on the test set; here one model
takes each policy in turn, and the data is for validation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import MiniBatchError, UsageError
from bln_serve.export import calibration, freezing, reference_batch
from bln_serve.export.calibration import OnRun
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection import ranking
from bln_serve.export.selection.evaluation import Evaluator
from bln_serve.export.selection.record import Entry, Selection
from bln_serve.export.selection.scoring import Scoring
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy, mini_batch_rule, strongest

OnProgress = Callable[[int, int], None]
"""Is told how many of how many runs are done."""

_Judged = tuple[Entry, NDArray[np.float64] | None]

AS_TRAINED, CALIBRATED, REFERENCE_BATCH = "as trained", "calibrated", "reference batch"


@dataclass(frozen=True)
class Materials:
    """What candidates are made of and judged by.

    Attributes:
        validation: labelled rows.
        scoring: the loss and metrics.
        rows: of a mini-batch.
        calibration: rows to estimate stored statistics from, or None.
        reference: the rows of one mini-batch to freeze live statistics at, or None.
        feature_slots: "keep", "pool", or None for what each layer says.
        coupling: the strongest row coupling that may be taken, or "any".
    """

    validation: Data
    scoring: Scoring
    rows: int
    calibration: Data | None = None
    reference: Data | None = None
    feature_slots: str | None = None
    coupling: str = "any"


@dataclass(frozen=True)
class _Candidate:
    """A way to answer: a policy, and where its stored statistics come from.

    Attributes:
        policy: of every layer.
        origin: of what is stored.
        given: the layers before anything was made of them.
        runs: how many runs of the model it takes to make the layers.
        make: makes them, and tells of each run.
    """

    policy: StatisticsPolicy
    origin: str
    given: tuple[FrozenLayer, ...]
    runs: int
    make: Callable[[OnRun], tuple[FrozenLayer, ...]]


@dataclass(frozen=True)
class Winner:
    """What is taken.

    Attributes:
        frozen: the layers with its policy and statistics.
        origin: where they come from.
        selection: all candidates, ranked.
    """

    frozen: tuple[FrozenLayer, ...]
    origin: str
    selection: Selection


def select(callee: Callee, materials: Materials, on_progress: OnProgress = lambda *_: None) -> Winner:
    """Evaluate the candidates and take the best.

    Args:
        callee: the model, with at least one BLN layer; it is as it was afterwards.
        materials: what the candidates are made of and judged by.
        on_progress: is told how many of how many runs of the model are done.

    Raises:
        UsageError: there is not one whole mini-batch, or no candidate within the coupling's limit can be used.
    """
    _require_mini_batch(materials.validation, materials.rows, "--select")
    if materials.calibration:
        _require_mini_batch(materials.calibration, materials.rows, "--calibrate")
    evaluator = Evaluator(callee, materials.scoring, materials.validation, materials.rows)
    candidates = tuple(_candidates(callee, materials))
    counted = Counted(sum(each.runs + evaluator.mini_batches for each in candidates), on_progress)
    judged: list[_Judged] = []
    for origin in (AS_TRAINED, CALIBRATED, REFERENCE_BATCH):  # one after the other, so that few tables are held
        same = [each for each in candidates if each.origin == origin]
        judged += _judge(same, evaluator, materials, counted)
    entries, losses = zip(*judged, strict=True)
    selection = ranking.rank(entries, losses, **_facts(materials, evaluator))
    chosen = selection.entries[selection.chosen]
    (winner,) = (each for each in candidates if (each.policy.code, each.origin) == (chosen.policy, chosen.origin))
    return Winner(winner.make(lambda: None), chosen.origin, selection)


def _require_mini_batch(data: Data, rows: int, option: str) -> None:
    if data.rows < rows:
        raise UsageError(f"Expected at least one mini-batch of {rows} rows for {option}. Received: {data.rows} rows.")


class Counted:
    """Counts runs, and tells of them.

    Args:
        total: how many there will be.
        tell: is told how many of how many are done.
    """

    def __init__(self, total: int, tell: OnProgress) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def run(self) -> None:
        """Count one."""
        self.skip(1)

    def skip(self, runs: int) -> None:
        """Count some that were not needed after all."""
        self._done += runs
        self._tell(self._done, self._total)


def _candidates(callee: Callee, materials: Materials) -> Iterator[_Candidate]:
    for policy in ALL_POLICIES:
        frozen = freezing.with_policies(callee.model, policy.code, materials.feature_slots)
        yield _Candidate(policy, AS_TRAINED, frozen, 0, partial(_as_given, frozen))
        if materials.calibration and policy.stored:
            runs = calibration.runs(frozen, materials.calibration, materials.rows)
            make = partial(calibration.calibrate, callee, frozen, materials.calibration, materials.rows)
            yield _Candidate(policy, CALIBRATED, frozen, runs, make)
        if materials.reference and policy.live_over_rows:
            yield _Candidate(policy, REFERENCE_BATCH, frozen, 0, partial(_at, callee, frozen, materials.reference))


def _as_given(frozen: tuple[FrozenLayer, ...], _: OnRun) -> tuple[FrozenLayer, ...]:
    return frozen


def _at(callee: Callee, frozen: tuple[FrozenLayer, ...], reference: Data, _: OnRun) -> tuple[FrozenLayer, ...]:
    return reference_batch.freeze_at(callee, frozen, reference)


def _judge(
    candidates: Sequence[_Candidate], evaluator: Evaluator, materials: Materials, counted: Counted
) -> list[_Judged]:
    made = [_made(candidate, materials, counted) for candidate in candidates]
    found = iter(evaluator([frozen for frozen, problem in made if problem is None], counted.run))
    judged: list[_Judged] = []
    for candidate, (frozen, problem) in zip(candidates, made, strict=True):
        if problem is None:
            one = next(found)
            judged.append((_entry(candidate, frozen, metrics=one.metrics, rows_per_s=one.rows_per_s), one.losses))
        else:
            counted.skip(evaluator.mini_batches)
            judged.append((_entry(candidate, frozen, unusable=problem), None))
    return judged


def _made(candidate: _Candidate, materials: Materials, counted: Counted) -> tuple[tuple[FrozenLayer, ...], str | None]:
    """Return a candidate's layers, and why they cannot answer, or None if they can."""
    try:
        frozen = candidate.make(counted.run)
    except MiniBatchError as error:  # the reference mini-batch has more rows than this policy has slots
        counted.skip(candidate.runs)
        return candidate.given, str(error)
    return frozen, _problem(frozen, materials.rows)


def _problem(frozen: Sequence[FrozenLayer], rows: int) -> str | None:
    """Return why layers cannot answer mini-batches of `rows` rows, or None if they can."""
    problems = freezing.problems_of(frozen)
    if problems:
        return "; ".join(f"{layer}: {problem}" for layer, problem in problems)
    rule = mini_batch_rule([item.statistics for item in frozen], rows)
    if rule is None or rule.allows(rows, rows):
        return None
    return f"mini-batches of {rows} rows, and it takes from {rule.min_rows} to {rule.max_rows or 'any number'}"


def _entry(
    candidate: _Candidate,
    frozen: Sequence[FrozenLayer],
    *,
    metrics: Mapping[str, float] = MappingProxyType({}),
    rows_per_s: float | None = None,
    unusable: str | None = None,
) -> Entry:
    layers = [item.statistics for item in frozen]
    rule = mini_batch_rule(layers, 1)
    return Entry(
        policy=candidate.policy.code,
        origin=candidate.origin,
        row_coupling=strongest(layers)[0],
        single_rows=rule is None or rule.min_rows == 1,
        loss=None,
        metrics=dict(metrics),
        rows_per_s=rows_per_s,
        unusable=unusable,
    )


def _facts(materials: Materials, evaluator: Evaluator) -> dict[str, Any]:
    """Return what a record of the selection says beside its entries."""
    data = materials.validation
    return {
        "data": data.source,
        "data_sha256": data.sha256,
        "rows": data.rows,
        "mini_batch_rows": materials.rows,
        "loss": materials.scoring.loss_name,
        "metrics": evaluator.metrics,
        "coupling": materials.coupling,
        "feature_slots": materials.feature_slots or "keep",
    }
