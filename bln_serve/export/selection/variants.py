"""The candidates of a selection: each policy, with the statistics of each origin that there is data for.

As trained, all 16; calibrated, each under itself, the 15 that store something; with a reference mini-batch the 12 whose
live batch statistics it can freeze.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bln_serve.export import calibration, freezing, reference_batch
from bln_serve.export.calibration import OnRun
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.row_analysis import RowAnalysis
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection.record import AS_TRAINED, CALIBRATED, REFERENCE_BATCH
from bln_serve.export.selection.scoring import Scoring
from bln_serve.manifest import StoredStatistics
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy


@dataclass(frozen=True)
class Materials:
    """What candidates are made of and judged by.

    Attributes:
        validation: labelled rows.
        scoring: the loss and metrics.
        rows: of a mini-batch.
        analysis: of the model's rows.
        calibration: rows to estimate stored statistics from, or None.
        reference: the rows of one mini-batch to freeze live statistics at, or None.
        feature_slots: "keep", "pool", or None for what each layer says.
        coupling: the strongest row coupling that may be taken, or "any".
    """

    validation: Data
    scoring: Scoring
    rows: int
    analysis: RowAnalysis
    calibration: Data | None = None
    reference: Data | None = None
    feature_slots: str | None = None
    coupling: str = "any"


@dataclass(frozen=True)
class Candidate:
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


def variants(callee: Callee, materials: Materials) -> Iterator[Candidate]:
    """Yield the candidates, none of them made yet."""
    for policy in ALL_POLICIES:
        given = freezing.with_policies(callee.model, policy.code, materials.feature_slots)
        frozen = materials.analysis.placed(given)
        yield Candidate(policy, AS_TRAINED, frozen, 0, partial(_as_given, frozen))
        if materials.calibration and policy.stored:
            arguments = frozen, materials.calibration, materials.rows
            independent = materials.analysis.is_independent(frozen)
            runs = calibration.runs(*arguments, independent=independent)
            make = partial(calibration.calibrate, callee, *arguments, independent=independent)
            yield Candidate(policy, CALIBRATED, frozen, runs, make)
        if materials.reference and policy.live_over_rows:
            yield Candidate(policy, REFERENCE_BATCH, frozen, 0, partial(_at, callee, frozen, materials.reference))


def _as_given(frozen: tuple[FrozenLayer, ...], _: OnRun) -> tuple[FrozenLayer, ...]:
    return frozen


def _at(callee: Callee, frozen: tuple[FrozenLayer, ...], reference: Data, _: OnRun) -> tuple[FrozenLayer, ...]:
    return reference_batch.freeze_at(callee, frozen, reference)


def stored(origin: str, data: Data, mini_batch_rows: int) -> StoredStatistics:
    """Return what a record says of the data that statistics are from; its rows are those that were used."""
    rows = data.whole_mini_batches(mini_batch_rows) * mini_batch_rows if origin == CALIBRATED else data.rows
    return StoredStatistics(origin, data.source, data.sha256, rows)
