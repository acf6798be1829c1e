"""Sizes of axes as monomials: a whole number times symbols, one of which is the number of rows.

    3          Size(3)
    rows       Size(1, ("rows",))
    rows * 5   Size(5, ("rows",))         time folded into the rows, row by row
    rows * x[1]                           the same, where input x says its length only when it comes

A size that is no monomial, such as rows + 1, is unknown: None.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

ROWS_SYMBOL = "rows"


@dataclass(frozen=True)
class Size:
    """The size of an axis, or an entry of a shape.

    Attributes:
        factor: the whole number; -1 and 0 have their meaning in the target of a Reshape.
        symbols: what it is multiplied by, in order; one that is squared stands twice.
    """

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def number(self) -> int | None:
        """The size where it is known, else None."""
        return None if self.symbols else self.factor

    @property
    def has_rows(self) -> bool:
        """Whether it grows with the number of rows."""
        return ROWS_SYMBOL in self.symbols

    def __mul__(self, other: "Size") -> "Size":
        if self.factor == 0 or other.factor == 0:
            return Size(0)
        return Size(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: "Size") -> "Size | None":
        """Divide; None where nothing says that the division leaves no remainder."""
        left = Counter(self.symbols)
        left.subtract(Counter(other.symbols))
        if other.factor == 0 or self.factor % other.factor or min(left.values(), default=0) < 0:
            return None
        return Size(self.factor // other.factor, tuple(sorted(left.elements())))

    def at(self, rows: int | None) -> "Size":
        """Return the size for a number of rows; None leaves it as it is."""
        if rows is None:
            return self
        left = tuple(symbol for symbol in self.symbols if symbol != ROWS_SYMBOL)
        return Size(self.factor * rows ** (len(self.symbols) - len(left)), left)

    def __str__(self) -> str:
        return "*".join([str(self.factor), *self.symbols])


Dims = tuple[Size | None, ...]
"""The sizes of a tensor's axes, as far as they are known."""

ONE = Size(1)
ROWS = Size(1, (ROWS_SYMBOL,))


def product(sizes: Iterable[Size | None]) -> Size | None:
    """Multiply; None where one of them is unknown."""
    total = ONE
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total
