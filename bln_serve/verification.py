"""Whether two models answer alike: the tolerance, the comparison and the report. Framework-free.

The measure is max|actual - expected| <= atol + rtol * max|expected| over one output. It is relative to the largest
answer and not element by element, because an element near zero is a difference of large terms: element by element the
same float32 layer moves by 3e-2 under another order of summation, relative to the largest answer by 3e-7.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from what Keras answers.

    Attributes:
        atol: absolute part; 0, since a model's answers carry no unit that would give one a meaning.
        rtol: relative to the largest expected answer. 1e-5 is some 80 units in the last place of a float32: deep enough
            for another order of summation, far below what a wrong statistic causes.
    """

    atol: float = 0.0
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 <= self.atol < np.inf and 0 <= self.rtol < np.inf):
            raise UsageError(
                f"Expected a tolerance of finite numbers from 0. Received: atol {self.atol}, rtol {self.rtol}"
            )

    def limit(self, expected: NDArray[Any]) -> float:
        """Return the largest difference allowed from `expected`."""
        return self.atol + self.rtol * _largest(expected)

    def wider_than(self, other: "Tolerance") -> bool:
        """Whether this tolerance lets pass what `other` does not."""
        return self.atol > other.atol or self.rtol > other.rtol


@dataclass(frozen=True)
class Check:
    """One comparison of a verification.

    Attributes:
        name: what was compared, such as `ONNX Runtime = Keras, 24 rows, batch 1`.
        difference: max|actual - expected|; infinity where one of them is not finite or the shapes differ.
        limit: the largest difference allowed.
        largest: max|expected|.
        worst: where the difference is largest, as an index into the output, or what differs in kind.
    """

    name: str
    difference: float
    limit: float
    largest: float
    worst: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit

    def line(self) -> str:
        """Return the check as one line with its figures."""
        verdict = "ok  " if self.passed else "FAIL"
        where = f", most at {self.worst}" if self.worst and self.difference else ""
        return f"{verdict} {self.name:<58} {self.difference:9.2e} of {self.limit:.2e} allowed{where}"


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one verification. A report without a check proves nothing, and has not passed."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def largest_difference(self) -> float:
        """The largest difference relative to its output's largest answer."""
        return max((check.difference / (check.largest or 1.0) for check in self.checks), default=0.0)

    def table(self) -> str:
        """Return one line a check."""
        return "\n".join(check.line() for check in self.checks)


def compare(name: str, expected: NDArray[Any], actual: NDArray[Any], tolerance: Tolerance) -> Check:
    """Compare one output.

    Args:
        name: what is compared, for the report.
        expected: the oracle's answer.
        actual: of the same shape and any dtype.
        tolerance: how far `actual` may be off.

    Returns:
        The check; it fails where shapes differ, and where either side holds NaN or infinity.
    """
    expected, actual = np.asarray(expected), np.asarray(actual)
    limit, largest = tolerance.limit(expected), _largest(expected)
    if expected.shape != actual.shape:
        return Check(name, np.inf, limit, largest, f"shape {actual.shape} in place of {expected.shape}")
    with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity; what is not finite fails below
        difference = np.abs(expected.astype(np.float64) - actual.astype(np.float64))
    broken = ~np.isfinite(difference)
    worst = np.unravel_index(broken.argmax() if broken.any() else difference.argmax(), difference.shape)
    figure = np.inf if broken.any() else float(difference.max())
    return Check(name, figure, limit, largest, str([int(i) for i in worst]))


def compare_all(
    name: str, expected: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]], tolerance: Tolerance
) -> Iterable[Check]:
    """Compare every output by name; with several outputs each check names its own. A missing output fails."""
    for output, answer in expected.items():
        label = f"{name}, {output}" if len(expected) > 1 else name
        if output in actual:
            yield compare(label, answer, actual[output], tolerance)
        else:
            yield Check(label, np.inf, tolerance.limit(answer), _largest(answer), f"no output {output!r}")


def _largest(values: NDArray[Any]) -> float:
    finite = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(finite.max()) if finite.size else 0.0
