"""Interleaved timing: the contestants take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, by contestant."""

    medians: Mapping[str, float]

    def ratio(self, slower: str, faster: str) -> float:
        """Return how many times as long the first takes as the second."""
        return self.medians[slower] / self.medians[faster]


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int) -> Timing:
    """Time calls of each contestant in turn.

    Args:
        contestants: what to call, by name.
        rounds: how many turns each has; the median over turns is kept.
        calls: of one turn, timed together.
    """
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            began = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - began) / calls)
    return Timing({name: statistics.median(values) for name, values in seconds.items()})
