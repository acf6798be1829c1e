"""What is frozen: the policy of each BLN layer and the statistics that it stores, as a caller orders them.

nothing else        the model's own policies or --statistics, with the estimates of its training
--calibrate         the stored statistics estimated anew from data
--reference-batch   the live batch statistics frozen at one mini-batch's own
--select            the best of the 16 policies, and of these variants, on validation data
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bln_serve.errors import MiniBatchError, UnsupportedModelError, UsageError
from bln_serve.export import calibration, data, freezing, reference_batch
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.row_analysis import RowAnalysis
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection import candidates, scoring, variants
from bln_serve.export.selection.record import CALIBRATED, COUPLING_LIMITS, REFERENCE_BATCH, Selection, within
from bln_serve.manifest import StoredStatistics
from bln_serve.statistics import LayerStatistics, RowCoupling

FEATURE_SLOTS = ("keep", "pool")


@dataclass(frozen=True)
class Wish:
    """How the statistics are to be chosen: the arguments of `pipeline.export` that say so.

    Attributes:
        statistics: a policy for every layer, or None for each layer's own.
        feature_slots: "keep" or "pool", or None for what each layer says.
        calibrate: data, or None.
        reference_batch: the rows of one mini-batch, or None.
        select: labelled data, or None.
        loss: to select by, or None for the compiled one.
        metrics: to show beside it; empty for the compiled ones.
        coupling: the strongest row coupling that may be selected.
    """

    statistics: str | None = None
    feature_slots: str | None = None
    calibrate: Any = None
    reference_batch: Any = None
    select: Any = None
    loss: str | None = None
    metrics: Sequence[str] = ()
    coupling: str = "any"

    def check(self) -> None:
        """See that the arguments go together.

        Raises:
            UsageError: they do not.
        """
        if self.feature_slots not in (None, *FEATURE_SLOTS):
            raise UsageError(f"Expected --feature-slots {' or '.join(FEATURE_SLOTS)}. Received: {self.feature_slots!r}")
        if self.coupling not in COUPLING_LIMITS:
            raise UsageError(f"Expected --coupling {', '.join(COUPLING_LIMITS)}. Received: {self.coupling!r}")
        if self.select is None:
            given = {"--loss": self.loss, "--metric": self.metrics, "--coupling": self.coupling != "any"}
            if unasked := [option for option, value in given.items() if value]:
                raise UsageError(f"Expected {unasked[0]} beside --select, which it belongs to. Received: no --select.")
            if self.calibrate is not None and self.reference_batch is not None:
                raise UsageError(
                    "Expected --calibrate or --reference-batch. Received: both. To find out which is better, add "
                    "--select with validation data."
                )
        elif self.statistics is not None:
            raise UsageError(
                f"Expected --statistics or --select, which chooses a policy. Received: both, with {self.statistics}."
            )

    def require_within(self, proved: RowCoupling, reason: str) -> None:
        """See that a model has come out as the choice was limited to.

        Args:
            proved: the row coupling of the whole model, on the graph that is written.
            reason: what couples its rows.

        Raises:
            UnsupportedModelError: it is coupled more strongly.
        """
        if not within(self.coupling, proved):
            raise UnsupportedModelError(
                f"Expected rows as --coupling {self.coupling} allows. Received: {proved} ones in the model that would "
                f"be written ({reason}), which those of the Keras model are not. Please report the model, or allow it "
                "with --coupling any."
            )


@dataclass(frozen=True)
class Choice:
    """What is frozen.

    Attributes:
        frozen: each BLN layer with its policy and statistics.
        stored: where the stored statistics come from; None for the model's training.
        selection: what was selected from, or None.
        notes: what else there is to know, a sentence each.
    """

    frozen: tuple[FrozenLayer, ...]
    stored: StoredStatistics | None = None
    selection: Selection | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chooser:
    """Chooses for one model.

    Attributes:
        callee: the model.
        given: the model as it was loaded or given, with its own loss and metrics.
        path: of its file, where its loss and metrics are read; None for a model from Python.
        rows: of a mini-batch, as asked for, or None for the model's m.
        on_stage: is told what begins.
        on_progress: is told how many of how many runs are done.
    """

    callee: Callee
    given: Any
    path: Path | None
    rows: int | None
    on_stage: Callable[[str], None]
    on_progress: candidates.OnProgress

    def choose(self, wish: Wish) -> Choice:
        """Choose as wished.

        Raises:
            UsageError: the wish does not fit the model, or the data does not.
            UnusableStatisticsError: a layer has no usable estimate of a statistic that its policy stores.
            UnsupportedModelError: the model cannot be exported, or a layer's rows cannot be looked at.
        """
        model = self.callee.model
        if wish.select is not None:
            return self._select(wish)
        frozen = freezing.with_policies(model, wish.statistics, wish.feature_slots)
        made = Choice(frozen)
        if wish.calibrate is not None:
            made = self._calibrate(frozen, self._read(wish.calibrate, "--calibrate"))
        elif wish.reference_batch is not None:
            made = self._freeze_at(frozen, self._read(wish.reference_batch, "--reference-batch"))
        freezing.require_usable(made.frozen, estimated_anew=wish.calibrate is not None)
        return made

    def _calibrate(self, frozen: tuple[FrozenLayer, ...], rows: Data) -> Choice:
        analysis = self._analyse(frozen, "--calibrate")
        frozen = analysis.placed(frozen)
        size = self._mini_batch_rows(frozen, "--calibrate")
        analysis.require_own_rows(frozen)
        self.on_stage("calibrating")
        independent = analysis.is_independent(frozen)
        count = candidates.Counted(calibration.runs(frozen, rows, size, independent=independent), self.on_progress)
        frozen = calibration.calibrate(self.callee, frozen, rows, size, count.run, independent=independent)
        return Choice(frozen, variants.stored(CALIBRATED, rows, size), notes=_dropped(rows, size, "--calibrate"))

    def _freeze_at(self, frozen: tuple[FrozenLayer, ...], rows: Data) -> Choice:
        frozen = self._analyse(frozen, "--reference-batch").placed(frozen)
        self.on_stage("freezing the reference mini-batch")
        try:
            frozen = reference_batch.freeze_at(self.callee, frozen, rows)
        except MiniBatchError as error:
            raise UsageError(str(error)) from error
        return Choice(frozen, variants.stored(REFERENCE_BATCH, rows, rows.rows))

    def _select(self, wish: Wish) -> Choice:
        judge = scoring.scoring(self.given, self.path, wish.loss, wish.metrics)
        validation = self._read(wish.select, "--select", judge)
        to_calibrate = None if wish.calibrate is None else self._read(wish.calibrate, "--calibrate")
        reference = None if wish.reference_batch is None else self._read(wish.reference_batch, "--reference-batch")
        frozen = freezing.with_policies(self.callee.model, None, wish.feature_slots)
        analysis = self._analyse(frozen, "--select")
        _require_within(wish.coupling, analysis)
        size = self._mini_batch_rows(analysis.placed(frozen), "--select")
        materials = variants.Materials(
            validation=validation,
            scoring=judge,
            rows=size,
            analysis=analysis,
            calibration=to_calibrate,
            reference=reference,
            feature_slots=wish.feature_slots,
            coupling=wish.coupling,
        )
        self.on_stage("selecting")
        winner = candidates.select(self.callee, materials, self.on_progress)
        rows = {CALIBRATED: materials.calibration, REFERENCE_BATCH: materials.reference}.get(winner.origin)
        stored = None if rows is None else variants.stored(winner.origin, rows, size)
        left_out = _dropped(rows, size, "--calibrate") if rows and winner.origin == CALIBRATED else ()
        return Choice(winner.frozen, stored, winner.selection, (*judge.notes, *left_out))

    def _read(self, source: Any, option: str, judge: scoring.Scoring | None = None) -> Data:
        self.on_stage(f"reading {option[2:].replace('-', ' ')} data")
        rows = data.read(source, self.callee.signature, targets=judge is not None)
        if judge is not None:
            data.check_labels(rows, self.callee.signature, judge.loss)
            rows = rows.with_targets_like(self.callee.twin().output)
        return rows

    def _analyse(self, frozen: Sequence[FrozenLayer], option: str) -> RowAnalysis:
        if not frozen:
            raise UsageError(
                f"Expected a model with Batch Layer Normalization layers for {option}. Received: one without, which "
                f"has no statistics to choose. Leave {option} out."
            )
        self.on_stage("analysing the model's rows")
        return RowAnalysis(self.callee, frozen)

    def _mini_batch_rows(self, frozen: Sequence[FrozenLayer], option: str) -> int:
        """Return the rows of a request that make every layer's m, unless a number was asked for."""
        if self.rows is not None:
            return self.rows
        layers = [item.statistics for item in frozen if item.called]
        sizes = {layer.default_rows for layer in layers}
        size = next(iter(sizes), None)
        if len(sizes) == 1 and size:
            return size
        if None in sizes or not layers:
            why = "no whole number of a request's rows makes what a layer was trained with"
        else:
            why = "the layers were trained with different batch sizes"
        trained = ", ".join(sorted({_trained(layer) for layer in layers}))
        raise UsageError(f"Expected --mini-batch-rows for {option}, since {why} ({trained}). Received: none.")


def _trained(layer: LayerStatistics) -> str:
    return f"{layer.m}, {layer.rows_per_row} for each row" if layer.rows_per_row > 1 else str(layer.m)


def _require_within(limit: str, analysis: RowAnalysis) -> None:
    rest = analysis.rest
    if not within(limit, rest.row_coupling):
        raise UsageError(
            f"Expected a model whose rows --coupling {limit} allows. Received: {rest.row_coupling} rows under every "
            f"policy, by what is outside of its Batch Layer Normalization layers: {rest.reason}. Allow it with "
            "--coupling any, or take that out of the model."
        )


def _dropped(rows: Data, size: int, option: str) -> tuple[str, ...]:
    left = rows.rows % size
    if not left or size == 1:
        return ()
    return (f"{option} left out the last {left} of {rows.rows} rows: they do not fill a mini-batch of {size}",)
