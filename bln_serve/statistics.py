"""The vocabulary of Batch Layer Normalization's statistics, and how rows are cut into mini-batches.

A BLN layer normalises with four statistics. At inference each has a *source*: the stored population estimate, or the
rows at hand. One source for each of the four is a *statistics policy*; its code is four letters, P(opulation) or
M(ini-batch), in the order of `STATISTICS`: the paper's T and F.

What a policy makes of a model's rows is its *row coupling*:

    live batch mean or batch variance               mini-batch    an answer depends on the other rows of its mini-batch
    stored feature statistics, more than one slot   positional    an answer depends on the row's place in its mini-batch
    neither                                         independent   an answer depends on its row alone

Slots that are *pooled*, averaged to one that serves every row, are one slot.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, product

from bln_serve.errors import MiniBatchError, UsageError

STATISTICS = ("batch_mean", "batch_var", "feature_mean", "feature_var")
"""The four statistics, in the order of a policy's letters."""


def in_words(statistic: str) -> str:
    """Return a statistic's name as a person says it, such as `batch variance`."""
    return statistic.replace("var", "variance").replace("_", " ")


class Source(StrEnum):
    """Where a statistic comes from at inference."""

    POPULATION = "population"
    MINI_BATCH = "mini-batch"

    @property
    def letter(self) -> str:
        """P or M."""
        return self.value[0].upper()

    @property
    def adjective(self) -> str:
        """The source in plain speech: stored or live."""
        return "stored" if self is Source.POPULATION else "live"


_SOURCE_OF_LETTER = {source.letter: source for source in Source}


@dataclass(frozen=True)
class StatisticsPolicy:
    """A source for each of a layer's four statistics. The default is the layer's own default, PPMM."""

    batch_mean: Source = Source.POPULATION
    batch_var: Source = Source.POPULATION
    feature_mean: Source = Source.MINI_BATCH
    feature_var: Source = Source.MINI_BATCH

    @classmethod
    def from_code(cls, code: str) -> "StatisticsPolicy":
        """Read a four-letter code.

        Raises:
            UsageError: `code` is not four letters, each P or M.
        """
        if not re.fullmatch("[PM]{4}", code):
            raise UsageError(f"Expected a policy of four letters, each P or M, such as PPMM. Received: {code!r}")
        return cls(*(_SOURCE_OF_LETTER[letter] for letter in code))

    @classmethod
    def from_flags(cls, flags: Iterable[bool]) -> "StatisticsPolicy":
        """Read the layer's four `..._moving_...` flags: True is population."""
        sources = (Source.POPULATION if flag else Source.MINI_BATCH for flag in flags)
        return cls(**dict(zip(STATISTICS, sources, strict=True)))

    @classmethod
    def parse(cls, text: str, default: "StatisticsPolicy") -> "StatisticsPolicy":
        """Read what `--statistics` takes.

        Args:
            text: a code (`PPMM`), one source for all four (`population`, `mini-batch`), or some of the four by name
                (`batch_mean=population,batch_var=mini-batch`).
            default: supplies the statistics that `text` does not name.

        Raises:
            UsageError: `text` is none of these.
        """
        if text in set(Source):
            return cls(*(Source(text),) * 4)
        if re.fullmatch("[PM]{4}", text):
            return cls.from_code(text)
        if "=" not in text:
            raise UsageError(
                f"Expected a policy: four letters, each P or M, such as PPMM; {' or '.join(Source)} for all four; or "
                f"STATISTIC=SOURCE,... Received: {text!r}"
            )
        chosen: dict[str, Source] = {}
        for item in text.split(","):
            statistic, _, source = (part.strip() for part in item.partition("="))
            if statistic not in STATISTICS or source not in set(Source) or statistic in chosen:
                raise UsageError(
                    f"Expected STATISTIC=SOURCE, each once, with a statistic of {', '.join(STATISTICS)} and a source "
                    f"of {', '.join(Source)}. Received: {item!r}"
                )
            chosen[statistic] = Source(source)
        return cls(**{**default.sources, **chosen})

    @property
    def sources(self) -> Mapping[str, Source]:
        """The four sources by the statistic's name, in order."""
        return {statistic: getattr(self, statistic) for statistic in STATISTICS}

    @property
    def code(self) -> str:
        """The four letters, such as PPMM."""
        return "".join(source.letter for source in self.sources.values())

    @property
    def stored(self) -> tuple[str, ...]:
        """The statistics taken from the population estimates."""
        return tuple(name for name, source in self.sources.items() if source is Source.POPULATION)

    @property
    def live_over_rows(self) -> tuple[str, ...]:
        """The live statistics that are computed over the rows of a mini-batch, and so couple them."""
        return tuple(name for name in ("batch_mean", "batch_var") if self.sources[name] is Source.MINI_BATCH)

    @property
    def stored_by_slot(self) -> tuple[str, ...]:
        """The stored statistics that have one entry for each slot."""
        return tuple(name for name in ("feature_mean", "feature_var") if self.sources[name] is Source.POPULATION)

    def __str__(self) -> str:
        return self.code


ALL_POLICIES = tuple(StatisticsPolicy(*sources) for sources in product(Source, repeat=4))
"""The 16 policies, from PPPP to MMMM, in the order of the golden vectors."""


class RowCoupling(StrEnum):
    """What an answer depends on, from weakest to strongest; `max` of several is the strongest."""

    INDEPENDENT = "independent"
    POSITIONAL = "positional"
    MINI_BATCH = "mini-batch"

    @property
    def strength(self) -> int:
        """0, 1 or 2."""
        return list(RowCoupling).index(self)


@dataclass(frozen=True)
class LayerStatistics:
    """What one BLN layer contributes to the row coupling of its model.

    Attributes:
        name: the layer's name.
        policy: its statistics policy's code.
        m: the batch size it was trained with; also its number of slots.
        rows_per_row: how many rows of its own one row of a request makes: more than 1 where time is folded into them.
        pooled: whether stored feature statistics are averaged over the slots to one that serves every row.
    """

    name: str
    policy: str
    m: int
    rows_per_row: int = 1
    pooled: bool = False

    @property
    def row_coupling(self) -> RowCoupling:
        """How the layer couples rows. A single slot, as at m = 1, and pooled ones serve every row: not positional."""
        policy = StatisticsPolicy.from_code(self.policy)
        if policy.live_over_rows:
            return RowCoupling.MINI_BATCH
        return RowCoupling.POSITIONAL if self.slots is not None else RowCoupling.INDEPENDENT

    @property
    def slots(self) -> int | None:
        """The most rows a request's mini-batch can have where feature statistics are stored by slot, else None."""
        stored_by_slot = StatisticsPolicy.from_code(self.policy).stored_by_slot
        return self.m // self.rows_per_row if stored_by_slot and self.m > 1 and not self.pooled else None

    @property
    def min_mini_batch_rows(self) -> int:
        """Enough for live batch statistics over 2 rows of the layer; 1 where m = 1, trained on single rows."""
        rows = 2 if self.row_coupling is RowCoupling.MINI_BATCH and self.m >= 2 else 1
        return -(-rows // self.rows_per_row)

    @property
    def default_rows(self) -> int | None:
        """The rows of a request that make the m rows the layer was trained with; None if no whole number does."""
        rows, left = divmod(self.m, self.rows_per_row)
        return None if left else rows

    @property
    def reason(self) -> str:
        """Why the layer couples rows as it does, in words."""
        policy = StatisticsPolicy.from_code(self.policy)
        if policy.live_over_rows:
            return f"{self.name}: {_listed(policy.live_over_rows)} live"
        if self.slots is not None:
            return f"{self.name}: {_listed(policy.stored_by_slot)} stored by slot"
        if policy.stored_by_slot and self.pooled and self.m > 1:
            return f"{self.name}: {_listed(policy.stored_by_slot)} stored, and pooled to serve every row"
        return f"{self.name}: nothing in {self.policy} depends on other rows"


def _listed(statistics: tuple[str, ...]) -> str:
    names = " and ".join(map(in_words, statistics))
    return f"{names} {'is' if len(statistics) == 1 else 'are'}"


def strongest(layers: Iterable[LayerStatistics]) -> tuple[RowCoupling, str]:
    """Return the row coupling of a model with these BLN layers, and the reason.

    The first layer that couples as strongly as any gives the reason.
    """
    ordered = sorted(layers, key=lambda layer: -layer.row_coupling.strength)
    if not ordered:
        return RowCoupling.INDEPENDENT, "no Batch Layer Normalization layer"
    if ordered[0].row_coupling is RowCoupling.INDEPENDENT:
        return RowCoupling.INDEPENDENT, "every Batch Layer Normalization layer treats each row alone"
    return ordered[0].row_coupling, ordered[0].reason


@dataclass(frozen=True)
class MiniBatchRule:
    """How a model's rows may be cut into mini-batches.

    Attributes:
        default_rows: rows of a mini-batch where a request names none: m, the protocol of `predict(x, batch_size=m)`.
        min_rows: the fewest rows a mini-batch may have.
        max_rows: the most, or None for no limit.
        reason: what couples the rows, for messages.
    """

    default_rows: int
    min_rows: int = 1
    max_rows: int | None = None
    reason: str = ""

    def cut(self, rows: int, requested: int | None = None) -> tuple[int, ...]:
        """Cut rows, in order, into mini-batches.

        Args:
            rows: how many there are, at least 1.
            requested: rows of a mini-batch; 0 for one mini-batch of all rows; None for `default_rows`.

        Returns:
            The rows of each mini-batch; they add up to `rows`.

        Raises:
            MiniBatchError: a mini-batch would have fewer than `min_rows` or more than `max_rows` rows. The message
                names row counts or values of `mini_batch_rows` that work.
        """
        if requested is not None and requested < 0:
            raise MiniBatchError(
                f"Expected mini_batch_rows to be 0 (one mini-batch of all rows) or more. Received: {requested}"
            )
        size = self.default_rows if requested is None else requested or rows
        if self.max_rows is not None and min(size, rows) > self.max_rows:
            raise MiniBatchError(
                f"Expected mini-batches of at most {self.max_rows} rows ({self.reason}, and there are "
                f"{self.max_rows} slots). Received: {rows} rows with mini_batch_rows={size}. "
                f"{self._way_out(rows, size)}"
            )
        sizes = even_cut(rows, size)
        if sizes[-1] < self.min_rows:
            left = f"leave {sizes[-1]}" if len(sizes) > 1 else f"make one of {rows}"
            raise MiniBatchError(
                f"Expected mini-batches of at least {self.min_rows} rows ({self.reason}). "
                f"Received: {rows} {'row' if rows == 1 else 'rows'}, which in mini-batches of {size} {left}. "
                f"{self._way_out(rows, size)}"
            )
        return sizes

    def allows(self, rows: int, size: int) -> bool:
        """Whether `rows` rows can be cut into mini-batches of `size`, 1 or more."""
        largest = min(size, rows)
        return (self.max_rows is None or largest <= self.max_rows) and even_cut(rows, size)[-1] >= self.min_rows

    def largest_size(self, rows: int) -> int | None:
        """Return the largest mini-batch size up to `default_rows` that cuts `rows` rows, or None."""
        return next((size for size in range(min(self.default_rows, rows), 0, -1) if self.allows(rows, size)), None)

    def _way_out(self, rows: int, size: int) -> str:
        ways = []
        if fitting := self.largest_size(rows):
            ways.append(f"set mini_batch_rows to {fitting}")
        if len(even_cut(rows, size)) > 1 and self.allows(rows, rows):
            ways.append(f"set mini_batch_rows to 0 for one mini-batch of all {rows} rows")
        if self.allows(size, size):
            near = [str(count) for count in (rows - 1, rows + 1) if count >= 1 and self.allows(count, size)]
            ways += [f"send {' or '.join(near)} rows"] if near else []
        if not ways:
            most = f", at most {self.max_rows}" if self.max_rows else ""
            ways.append(f"set mini_batch_rows to 0 and send at least {self.min_rows} rows{most}")
        return f"To be answered, {', or '.join(ways)}."


def even_cut(rows: int, size: int) -> tuple[int, ...]:
    """Cut `rows` rows into mini-batches of `size`; the last holds what is left."""
    whole, left = divmod(rows, size)
    return (size,) * whole + ((left,) if left else ())


def mini_batch_rule(
    layers: Iterable[LayerStatistics], default_rows: int, proved: tuple[RowCoupling, str] | None = None
) -> MiniBatchRule | None:
    """Return how the rows of a model with these layers may be cut, or None where rows are independent.

    Args:
        layers: the model's.
        default_rows: rows of a mini-batch where a request names none.
        proved: the coupling that the whole model has, with the reason; by default what the layers make of it.
    """
    layers = tuple(layers)
    coupling, reason = proved or strongest(layers)
    if coupling is RowCoupling.INDEPENDENT:
        return None
    return MiniBatchRule(
        default_rows=default_rows,
        min_rows=max((layer.min_mini_batch_rows for layer in layers), default=1),
        max_rows=min((layer.slots for layer in layers if layer.slots is not None), default=None),
        reason=reason,
    )


def run_length(sizes: Iterable[int]) -> str:
    """Write the rows of each mini-batch, run-length encoded where that is shorter: `25x40,7`."""
    parts = []
    for size, group in groupby(sizes):
        count = len(list(group))
        parts.append(min(f"{size}x{count}", ",".join([str(size)] * count), key=lambda text: (len(text), "x" in text)))
    return ",".join(parts)
