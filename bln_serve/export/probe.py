"""What coupling of the rows shows in the answers: rows are replaced, rolled and permuted, and left out.

The proof on the graph (`coupling`) says what can happen, the probe what does. A probe that sees more than was proved is
a fault of one of them, and ends the export. One that sees less is no fault: a variance that hardly matters to the
answer couples all the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from bln_serve.export.samples import SEED
from bln_serve.signature import Arrays, rows_of
from bln_serve.statistics import RowCoupling
from bln_serve.verification import Check, Tolerance, compare_all

Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Observation:
    """What moved the answers of a mini-batch.

    Attributes:
        by_others: each row's answer against its answer among other rows, and among fewer.
        by_place: each row's answer against its answer in another place.
    """

    by_others: tuple[Check, ...]
    by_place: tuple[Check, ...]

    @property
    def row_coupling(self) -> RowCoupling:
        """The coupling that was seen."""
        if not all(check.passed for check in self.by_others):
            return RowCoupling.MINI_BATCH
        return RowCoupling.INDEPENDENT if all(check.passed for check in self.by_place) else RowCoupling.POSITIONAL

    def forbidden(self, proved: RowCoupling) -> tuple[Check, ...]:
        """Return the checks that must pass if this much coupling was proved, and no more."""
        if proved is RowCoupling.MINI_BATCH:
            return ()
        return self.by_others + (self.by_place if proved is RowCoupling.INDEPENDENT else ())


def observe(name: str, run: Run, request: Arrays, strangers: Arrays, tolerance: Tolerance) -> Observation:
    """Probe one mini-batch.

    Args:
        name: of what is probed, for the checks.
        run: answers the rows of one mini-batch.
        request: its rows, at least 2 to see anything.
        strangers: as many other rows.
        tolerance: beyond which an answer has moved.
    """
    rows = rows_of(request)
    generator = np.random.default_rng([SEED, rows])
    among = run(request)

    def unmoved(what: str, expected: Arrays, actual: Arrays) -> Iterable[Check]:
        return compare_all(f"{name}: {what}", expected, actual, tolerance)

    by_others: list[Check] = []
    for row in sorted({0, rows // 2, rows - 1}):
        mixed = {key: _with_row(strangers[key], row, request[key]) for key in request}
        by_others += unmoved(f"rows of {rows} = among other rows", _row(among, row), _row(run(mixed), row))
    if rows > 1:
        fewer = run({key: array[:-1] for key, array in request.items()})
        kept = {key: array[:-1] for key, array in among.items()}
        by_others += unmoved(f"rows of {rows} = among fewer rows", kept, fewer)
    by_place: list[Check] = []
    for order in (np.roll(np.arange(rows), 1), generator.permutation(rows)):
        moved = run({key: array[order] for key, array in request.items()})
        by_place += unmoved(
            f"rows of {rows} = in other places", {key: array[order] for key, array in among.items()}, moved
        )
    return Observation(tuple(by_others), tuple(by_place))


def _with_row(array: np.ndarray, row: int, other: np.ndarray) -> np.ndarray:
    mixed = array.copy()
    mixed[row] = other[row]
    return mixed


def _row(answers: Arrays, row: int) -> Arrays:
    return {key: array[row : row + 1] for key, array in answers.items()}
