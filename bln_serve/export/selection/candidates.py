"""Selecting a statistics policy: every candidate on the same validation data, ranked, and one of them taken.

The candidates are the 16 policies with what the model has stored; with data for it, the 15 that store something with
what is stored calibrated, each under itself; and with a reference mini-batch the 12 whose live batch statistics it can
freeze. The seeds' authors search the 16 by building the model anew for each and choose on the test set; here one model
takes each policy in turn, and the data is for validation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import MiniBatchError, UnsupportedModelError, UsageError
from bln_serve.export import freezing
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.row_analysis import RowAnalysis
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection import ranking
from bln_serve.export.selection.evaluation import Evaluator
from bln_serve.export.selection.record import AS_TRAINED, CALIBRATED, REFERENCE_BATCH, Entry, Selection
from bln_serve.export.selection.variants import Candidate, Materials, stored, variants
from bln_serve.statistics import RowCoupling, mini_batch_rule

OnProgress = Callable[[int, int], None]
"""Is told how many of how many runs are done."""


@dataclass(frozen=True)
class _Judged:
    """A candidate after its evaluation; without losses where it is unusable."""

    entry: Entry
    losses: NDArray[np.float64] | None
    frozen: tuple[FrozenLayer, ...]

    @property
    def loss(self) -> float:
        """The mean over the mini-batches; infinity where there is no finite one."""
        if self.losses is None or not np.isfinite(self.losses).all():
            return np.inf
        return float(np.mean(self.losses))


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
    candidates = tuple(variants(callee, materials))
    counted = Counted(sum(each.runs + evaluator.mini_batches for each in candidates), on_progress)
    judged: list[_Judged] = []
    for origin in (AS_TRAINED, CALIBRATED, REFERENCE_BATCH):  # one after the other, so that few tables are held
        same = [each for each in candidates if each.origin == origin]
        judged = _without_tables_of_losers([*judged, *_judge(same, evaluator, materials, counted)])
    facts = _facts(materials, evaluator, candidates[0].given)
    selection = ranking.rank([each.entry for each in judged], [each.losses for each in judged], **facts)
    chosen = selection.entries[selection.chosen]
    (winner,) = (each for each in judged if (each.entry.policy, each.entry.origin) == (chosen.policy, chosen.origin))
    return Winner(winner.frozen, chosen.origin, selection)


def _without_tables_of_losers(judged: Sequence[_Judged]) -> list[_Judged]:
    """Keep the layers of the lowest loss of each row coupling, of which one is chosen, and drop all others."""
    kept = [
        min((each for each in judged if each.entry.row_coupling is coupling), key=lambda each: each.loss, default=None)
        for coupling in RowCoupling
    ]
    return [each if any(each is one for one in kept) else replace(each, frozen=()) for each in judged]


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


def _judge(
    candidates: Sequence[Candidate], evaluator: Evaluator, materials: Materials, counted: Counted
) -> list[_Judged]:
    made = [_made(candidate, materials, counted) for candidate in candidates]
    found = iter(evaluator([frozen for frozen, problem in made if problem is None], counted.run))
    judged: list[_Judged] = []
    for candidate, (frozen, problem) in zip(candidates, made, strict=True):
        if problem is None:
            one = next(found)
            facts = {"metrics": dict(one.metrics), "rows_per_s": one.rows_per_s}
            judged.append(_Judged(_entry(candidate, frozen, materials.analysis, **facts), one.losses, frozen))
        else:
            counted.skip(evaluator.mini_batches)
            judged.append(_Judged(_entry(candidate, frozen, materials.analysis, unusable=problem), None, ()))
    return judged


def _made(candidate: Candidate, materials: Materials, counted: Counted) -> tuple[tuple[FrozenLayer, ...], str | None]:
    """Return a candidate's layers, and why they cannot answer, or None if they can."""
    if candidate.origin == REFERENCE_BATCH or (problem := _rows_problem(candidate.given, materials)) is None:
        try:
            frozen = candidate.make(counted.run)
        except (MiniBatchError, UnsupportedModelError) as error:  # the reference mini-batch does not fit this policy
            problem = str(error)
        else:
            return frozen, _unusable(frozen) or _rows_problem(frozen, materials)
    counted.skip(candidate.runs)
    return candidate.given, problem


def _unusable(frozen: Sequence[FrozenLayer]) -> str | None:
    """Return what layers store and cannot use, a sentence with its layers each."""
    layers: dict[str, list[str]] = {}
    for layer, problem in freezing.problems_of(frozen):
        layers.setdefault(problem, []).append(layer)
    return "; ".join(f"{', '.join(names)}: {problem}" for problem, names in layers.items()) or None


def _rows_problem(frozen: Sequence[FrozenLayer], materials: Materials) -> str | None:
    """Return why layers cannot answer, or be exported to answer, the mini-batches at hand."""
    if problem := freezing.rows_problem(frozen, materials.rows):
        return problem
    try:
        materials.analysis.require_own_rows(frozen)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _entry(candidate: Candidate, frozen: Sequence[FrozenLayer], analysis: RowAnalysis, **facts: Any) -> Entry:
    proved = analysis.coupling(frozen)
    layers = [item.statistics for item in frozen if item.called]
    rule = mini_batch_rule(layers, 1, (proved.row_coupling, proved.reason))
    return Entry(
        policy=candidate.policy.code,
        origin=candidate.origin,
        row_coupling=proved.row_coupling,
        single_rows=rule is None or rule.allows(1, 1),
        loss=None,
        **{"metrics": {}, "rows_per_s": None} | facts,
    )


def _facts(materials: Materials, evaluator: Evaluator, frozen: Sequence[FrozenLayer]) -> dict[str, Any]:
    """Return what a record of the selection says beside its entries."""
    data = materials.validation
    slots = {"pool" if item.pooled else "keep" for item in frozen}
    return {
        "data": data.source,
        "data_sha256": data.sha256,
        "rows": data.rows,
        "mini_batch_rows": materials.rows,
        "loss": materials.scoring.loss_name,
        "metrics": evaluator.metrics,
        "coupling": materials.coupling,
        "feature_slots": slots.pop() if len(slots) == 1 else "mixed",
        "variants": tuple(
            stored(origin, rows, materials.rows)
            for origin, rows in ((CALIBRATED, materials.calibration), (REFERENCE_BATCH, materials.reference))
            if rows
        ),
    }
