"""What a selection found: every policy's loss, which is best by row coupling, and which was chosen. No TensorFlow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan

from bln_serve.manifest import StoredStatistics
from bln_serve.statistics import RowCoupling

AS_TRAINED, CALIBRATED, REFERENCE_BATCH = "as trained", "calibrated", "reference batch"
"""Where an entry's stored statistics come from."""
COUPLING_LIMITS = (RowCoupling.INDEPENDENT.value, RowCoupling.POSITIONAL.value, "any")
"""What the choice can be limited to, from narrowest to widest."""


@dataclass(frozen=True)
class Entry:
    """A policy with stored statistics of one origin, and how it did.

    Attributes:
        policy: its code, such as MMMM; `mixed` where layers have different ones.
        origin: of the stored statistics: `as trained`, `calibrated` or `reference batch`.
        row_coupling: of the model as it would be exported.
        single_rows: whether a request may hold one row.
        loss: the mean over the mini-batches; may be NaN. None where the entry is unusable.
        metrics: by name, over all rows; empty where the entry is unusable.
        rows_per_s: how many rows a second it answers alone, in TensorFlow, or None where it was not measured.
        unusable: why its stored statistics cannot be used, or None.
        standard_error: of the paired difference of its loss to the reference's; 0 for the reference itself. NaN where
            there is none: with one mini-batch, or where a loss is not finite. None where the entry is unusable.
    """

    policy: str
    origin: str
    row_coupling: RowCoupling
    single_rows: bool
    loss: float | None
    metrics: Mapping[str, float]
    rows_per_s: float | None
    unusable: str | None = None
    standard_error: float | None = None

    @property
    def name(self) -> str:
        """Policy and origin, such as `PPMM as trained`."""
        return f"{self.policy} {'with ' if self.origin == 'reference batch' else ''}{self.origin}"

    @property
    def finite(self) -> bool:
        """Whether it has a loss, and that is a finite number."""
        return self.loss is not None and isfinite(self.loss)


@dataclass(frozen=True)
class Comparison:
    """The best entry of one row coupling beside the reference.

    Attributes:
        row_coupling: the entry's.
        entry: its index in `Selection.entries`.
        difference: its loss minus the reference's; below 0 only where the coupling is beyond the limit.
        standard_error: of that difference, as `Entry.standard_error`.
    """

    row_coupling: RowCoupling
    entry: int
    difference: float
    standard_error: float


@dataclass(frozen=True)
class Selection:
    """What was evaluated, how it ranks, and what was chosen.

    Attributes:
        data: where the rows come from.
        data_sha256: of the data.
        rows: of the data, the dropped ones among them.
        dropped_rows: the last, which do not fill a mini-batch.
        mini_batch_rows: rows of each mini-batch.
        mini_batches: how many there are.
        loss: the loss's name.
        metrics: their names, in order.
        coupling: the limit of the choice, one of `COUPLING_LIMITS`.
        entries: by loss, the lowest first; ties by the weaker coupling; NaN after numbers, unusable last.
        best: the best entry of each row coupling, weakest coupling first; none for a coupling without a finite loss.
        chosen: the chosen entry's index.
        reason: one sentence: why it was chosen.
        feature_slots: `keep` or `pool`: how stored feature statistics were treated; `mixed` where layers differ.
        variants: the data of the entries whose statistics are not those of training, by origin.
    """

    data: str
    data_sha256: str
    rows: int
    dropped_rows: int
    mini_batch_rows: int
    mini_batches: int
    loss: str
    metrics: tuple[str, ...]
    coupling: str
    entries: tuple[Entry, ...]
    best: tuple[Comparison, ...]
    chosen: int
    reason: str
    feature_slots: str = "keep"
    variants: tuple[StoredStatistics, ...] = ()

    @property
    def evaluated(self) -> str:
        """What was evaluated, in words: `5000 rows in 200 mini-batches of 25`."""
        rows = _counted(self.rows - self.dropped_rows, "row", "rows")
        return f"{rows} in {_counted(self.mini_batches, 'mini-batch', 'mini-batches')} of {self.mini_batch_rows}"

    def allows(self, entry: Entry) -> bool:
        """Whether an entry's row coupling is within the limit."""
        return within(self.coupling, entry.row_coupling)

    @property
    def reference(self) -> int:
        """The index of the entry with the lowest loss that may be chosen."""
        return lowest(self.entries, self.coupling)

    def difference(self, entry: Entry) -> float:
        """Return an entry's loss minus the reference's; NaN where it has none."""
        return difference(entry, self.entries[self.reference])


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def within(limit: str, coupling: RowCoupling) -> bool:
    """Whether a row coupling is within a limit, one of `COUPLING_LIMITS`."""
    return COUPLING_LIMITS.index(limit) >= coupling.strength


def lowest(entries: Sequence[Entry], limit: str) -> int:
    """Return the index of the first of ranked entries that is within the limit and has a finite loss."""
    return next(index for index, entry in enumerate(entries) if entry.finite and within(limit, entry.row_coupling))


def difference(entry: Entry, reference: Entry) -> float:
    """Return an entry's loss minus another's; NaN where one has none."""
    return nan if entry.loss is None or reference.loss is None else entry.loss - reference.loss


def number(value: float | None) -> float:
    """Return the value, NaN for none."""
    return nan if value is None else value


def figure(value: float) -> str:
    """Write a loss, a difference or a metric: four decimals, more or a power of 10 where those would not show it."""
    if isnan(value):
        return "NaN"
    if abs(value) == inf:
        return "infinite" if value > 0 else "-infinite"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4f}"
    return f"{value:.6f}" if 1e-5 <= abs(value) < 1 else f"{value:.2e}"


def short_name(name: str, longest: int) -> str:
    """Return a metric's or loss's name without its first words where it is too long: the last say what it is."""
    while len(name) > longest and "_" in name:
        name = name.partition("_")[2]
    return name[:longest]
