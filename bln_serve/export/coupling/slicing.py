"""Slice: a cut along any axis but the rows' own, or one that cuts a constant to as many entries as there are rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, kept, normal, row_size
from bln_serve.export.coupling.sizes import ONE, Dims, Size
from bln_serve.export.coupling.states import Dependence, Tensor, UnprovedError

# Exporters write the end of an axis as the largest int32 or int64, give or take one.
_BEHIND_ANY_END = 2**31 - 2


@dataclass(frozen=True)
class _Cut:
    """A cut along one axis."""

    axis: int
    start: Size | None
    end: Size | None
    step: Size | None

    @property
    def begins_at_first(self) -> bool:
        """Whether it takes every entry from the first up to its end."""
        return self.start == Size(0) and self.step == ONE

    def takes_all(self, size: Size) -> bool:
        """Whether it leaves an axis of this size as it is."""
        if not self.begins_at_first or self.end is None:
            return False
        return self.end == size or (self.end.number is not None and self.end.number >= _BEHIND_ANY_END)


def _cuts(call: NodeCall, rank: int) -> list[_Cut]:
    if call.version < 10:  # attributes then
        starts, ends = call.attributes["starts"], call.attributes["ends"]
        axes = call.attributes.get("axes", range(len(starts)))
        return [_Cut(normal(a, rank), Size(s), Size(e), ONE) for a, s, e in zip(axes, starts, ends, strict=True)]
    starts, ends = call.input(1).values, call.input(2).values
    named, stepped = call.given(3), call.given(4)
    count = len(starts or ends or ()) or _length(call.input(1))
    numbers = list(range(count)) if named is None else named.numbers
    if numbers is None:
        raise UnprovedError("cuts along axes that are computed")
    unknown: Dims = (None,) * len(numbers)
    steps: Dims = (ONE,) * len(numbers) if stepped is None else stepped.values or unknown
    columns = zip(numbers, starts or unknown, ends or unknown, steps, strict=True)
    return [_Cut(normal(axis, rank), start, end, step) for axis, start, end, step in columns]


def _length(vector: Tensor) -> int:
    (size,) = vector.sizes if vector.rank == 1 else (None,)
    if size is None or size.number is None:
        raise UnprovedError("cuts along axes that are computed")
    return size.number


def _slice(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    cuts = _cuts(call, x.rank)
    if x.axis is not None:
        if any(cut.axis == x.axis and not cut.takes_all(row_size(x.fold)) for cut in cuts):
            raise UnprovedError("cuts the row axis")
        return [kept(x, x.sizes if all(cut.axis == x.axis for cut in cuts) else None)]
    by_rows = [cut for cut in cuts if not _is_number(cut.end) or not _is_number(cut.start)]
    if not call.present[1:] or all(each.is_constant for each in call.present[1:]):
        return [Answer()]
    if len(by_rows) == 1 and (cut := by_rows[0]).begins_at_first and cut.end is not None and x.is_constant:
        return [_cut_to_rows(x, cut, cut.end, x.sizes if len(cuts) == 1 else call.dims())]
    return [Answer(dims=(None,) * x.rank)]


def _cut_to_rows(x: Tensor, cut: _Cut, end: Size, dims: Dims) -> Answer:
    """Answer for the first `rows` entries of a constant; a single entry serves every row."""
    size, fold = x.sizes[cut.axis], end.over(row_size(ONE))
    if size == ONE and end.has_rows:
        return Answer(dims=(*dims[: cut.axis], ONE, *dims[cut.axis + 1 :]))
    if fold is None or fold.has_rows or size is None or size.number is None:
        return Answer(dims=(None,) * x.rank)
    reason = "cuts a constant to the number of rows"
    return Answer(cut.axis, fold, dims, Dependence.SLOT, reason, may_end_early=True)


def _is_number(size: Size | None) -> bool:
    return size is not None and size.number is not None


RULES: Rules = {"Slice": _slice}
