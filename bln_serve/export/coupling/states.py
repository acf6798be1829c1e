"""What is known of a tensor: where its rows lie, and what its values depend on.

A tensor with `axis` a and `fold` k has rows * k entries on axis a, k of them a row, side by side: entry e belongs to
row e // k. No other axis grows with the rows. A tensor without an axis belongs to no row: a weight, a shape, a mean
over all rows. Where not even its sizes are known, `dims` is None, and nothing is ever proved of what is made from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.export.coupling.sizes import ONE, ROWS, Dims, Size

Array = NDArray[Any]


class Dependence(IntEnum):
    """What a tensor's values depend on beside their own row, from weakest to strongest; `max` is the strongest."""

    NOTHING = 0
    SLOT = 1
    ROW_COUNT = 2
    """Harmless in a shape; as a value it couples. Only tensors without an axis have it."""
    OTHER_ROWS = 3


class UnprovedError(Exception):
    """A rule cannot show that rows are kept apart; the message goes on after the operator's name."""


@dataclass(frozen=True)
class Trail:
    """The nodes on the way from a model input, last first."""

    name: str
    before: "Trail | None" = None

    def names(self) -> tuple[str, ...]:
        """Return the names from the input on."""
        return tuple(reversed(list(self._backwards())))

    def _backwards(self) -> Iterator[str]:
        at: Trail | None = self
        while at:
            yield at.name
            at = at.before


@dataclass(frozen=True)
class Cause:
    """The first node that couples, in words, and the way there."""

    reason: str
    trail: Trail | None


@dataclass(frozen=True)
class Tensor:
    """What is known of one tensor.

    Attributes:
        dtype: as ONNX numbers it, 0 where unknown.
        dims: the sizes of its axes; None where not even their number is known.
        axis: the axis that holds the rows, or None.
        fold: how many entries of that axis one row makes.
        dependence: what its values depend on.
        values: the entries of a short vector or scalar of whole numbers, as far as they are known.
        array: the values of a small constant.
        is_sequence: whether it is a sequence, of whose members all else is said.
        may_end_early: whether it is cut from a constant that may have fewer entries than there are rows.
        cause: why the rows are coupled, where they are.
        trail: the nodes that rows went through.
    """

    dtype: int
    dims: Dims | None
    axis: int | None = None
    fold: Size = ONE
    dependence: Dependence = Dependence.NOTHING
    values: Dims | None = None
    array: Array | None = field(default=None, compare=False)
    is_sequence: bool = False
    may_end_early: bool = False
    cause: Cause | None = field(default=None, compare=False)
    trail: Trail | None = field(default=None, compare=False)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.sizes)

    @property
    def sizes(self) -> Dims:
        """The sizes of its axes.

        Raises:
            UnprovedError: not even their number is known.
        """
        if self.dims is None:
            raise UnprovedError("takes a tensor of unknown shape")
        return self.dims

    @property
    def is_lost(self) -> bool:
        """Whether nothing is known of where its rows lie."""
        return self.dims is None and self.dependence is Dependence.OTHER_ROWS

    @property
    def is_constant(self) -> bool:
        """Whether it is the same whatever the rows are, and however many."""
        return self.axis is None and self.dependence is Dependence.NOTHING

    @property
    def is_empty_sequence(self) -> bool:
        """Whether it is a sequence without members, which are then whatever is inserted."""
        return self.is_sequence and self.values == ()

    @property
    def numbers(self) -> list[int] | None:
        """The entries of a short vector where every one is a known number, else None."""
        if self.values is None:
            return None
        known = [size.number for size in self.values if size is not None]
        numbers = [number for number in known if number is not None]
        return numbers if len(numbers) == len(self.values) else None


def rows_of(dtype: int, dims: Dims, axis: int, fold: Size) -> Tensor:
    """Return a tensor with its rows on an axis.

    Raises:
        UnprovedError: another axis grows with the rows too.
    """
    if any(size is not None and size.has_rows for place, size in enumerate(dims) if place != axis) or fold.has_rows:
        raise UnprovedError("makes a second axis as long as the rows")
    return Tensor(dtype, (*dims[:axis], fold * ROWS, *dims[axis + 1 :]), axis, fold)


def lost(cause: Cause, dtype: int = 0) -> Tensor:
    """Return a tensor of which nothing can be proved."""
    return Tensor(dtype, None, dependence=Dependence.OTHER_ROWS, cause=cause, trail=cause.trail)


def join(first: Tensor, second: Tensor, cause: Cause) -> Tensor:
    """Return what holds for either tensor: of the two branches of an If, or before and after a round of a Loop.

    Args:
        first: one of them.
        second: the other.
        cause: what to blame where the two do not lie alike.
    """
    stronger = max(first, second, key=lambda tensor: tensor.dependence)
    if first.is_empty_sequence and second.is_sequence:
        return second
    if second.is_empty_sequence and first.is_sequence:
        return first
    if first.is_lost or second.is_lost:
        return lost(stronger.cause or cause)
    alike = (first.axis, first.fold, first.is_sequence) == (second.axis, second.fold, second.is_sequence)
    if not alike or (first.axis is not None and len(first.sizes) != len(second.sizes)):
        return lost(stronger.cause or cause)
    array = first.array if _equal(first.array, second.array) else None
    values = _common(first.values, second.values)
    return replace(
        stronger,
        dtype=first.dtype if first.dtype == second.dtype else 0,
        dims=_common(first.dims, second.dims),
        values=values,
        array=array,
        may_end_early=first.may_end_early or second.may_end_early,
        trail=stronger.trail or first.trail or second.trail,
    )


def _common(first: Dims | None, second: Dims | None) -> Dims | None:
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(one if one == other else None for one, other in zip(first, second, strict=True))


def _equal(first: Array | None, second: Array | None) -> bool:
    return first is not None and second is not None and bool(np.array_equal(first, second))
