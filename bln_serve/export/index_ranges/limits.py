"""Ranges of values, and what look-ups ask of a tensor's entries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

Part = tuple[int, int]
"""An axis, and a place on it."""


@dataclass(frozen=True)
class Range:
    """From low to high, both inclusive and infinite where there is no limit."""

    low: float = -inf
    high: float = inf

    def meet(self, other: "Range") -> "Range":
        """Return what lies in both."""
        return Range(max(self.low, other.low), min(self.high, other.high))

    def hull(self, other: "Range") -> "Range":
        """Return the narrowest that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def before_adding(self, constant: Any) -> "Range":
        """Return the x for which x + constant can lie in the range, for some entry of an array of constants."""
        return Range(self.low - constant.max(), self.high - constant.min())

    def mirrored(self) -> "Range":
        """Return the x for which -x lies in the range."""
        return Range(-self.high, -self.low)

    def before_max(self, bound: float) -> "Range":
        """Return the x for which max(x, bound) lies in the range."""
        return Range(-inf if bound >= self.low else self.low, self.high)

    def before_min(self, bound: float) -> "Range":
        """Return the x for which min(x, bound) lies in the range."""
        return Range(self.low, inf if bound <= self.high else self.high)


NO_LIMITS = Range()


@dataclass
class Need:
    """What look-ups ask of a tensor's entries.

    Attributes:
        whole: of all of them.
        parts: of those at a place on an axis.
    """

    whole: Range = NO_LIMITS
    parts: dict[Part, Range] = field(default_factory=dict)

    def add(self, other: "Need", change: Callable[[Range], Range] = lambda limits: limits) -> None:
        """Ask all that another tensor's needs come to here."""
        self.whole = self.whole.meet(change(other.whole))
        for part, limits in other.parts.items():
            self.parts[part] = self.parts.get(part, NO_LIMITS).meet(change(limits))

    def of_all(self, dims: Sequence[int | None]) -> Range:
        """Return the range that no valid entry leaves, wherever it stands."""
        found = self.whole
        for axis, size in enumerate(dims):
            if size and all((axis, place) in self.parts for place in range(size)):
                ranges = [self.parts[axis, place] for place in range(size)]
                widest = ranges[0]
                for limits in ranges[1:]:
                    widest = widest.hull(limits)
                found = found.meet(widest)
        return found
