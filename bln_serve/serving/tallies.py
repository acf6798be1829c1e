"""Counting on the hot path, in a few instructions, and told to prometheus_client when somebody wants to know.

Between two runs of a model nothing of prometheus_client is in the processor's caches, and each of its observations
costs microseconds. Here one is a search among the buckets' bounds and two additions; what came together is handed over
at once.

What it relies on in prometheus_client's Histogram is held in tests/serving/test_tallies.py.
"""

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import Counter, Histogram


class Tally:
    """Observations that a histogram has not been told of yet.

    Args:
        histogram: with its labels, if it has any.
        bounds: the upper bounds of its buckets, rising, each inclusive; what is above the last is counted, too.
    """

    __slots__ = ("_bounds", "_counts", "_histogram", "_sum")

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        self._histogram = histogram
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def note(self, value: float) -> None:
        """Take one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def hand_over(self) -> None:
        """Tell the histogram."""
        for bucket, count in zip(self._histogram._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(self._sum)
        self._counts = [0] * len(self._counts)
        self._sum = 0.0


class Tallies:
    """How often something happened, by its label, that a counter has not been told of yet.

    Args:
        counter: with one label.
    """

    __slots__ = ("_counter", "_counts")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._counts: dict[str | int, int] = {}

    def note(self, label: str | int) -> None:
        """Take one."""
        self._counts[label] = self._counts.get(label, 0) + 1

    def hand_over(self) -> None:
        """Tell the counter."""
        for label, count in self._counts.items():
            self._counter.labels(label).inc(count)
        self._counts.clear()
