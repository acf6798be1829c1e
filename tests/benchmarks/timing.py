"""Interleaved timing: the contestants take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, by contestant, one figure a round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Return a contestant's median over the rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """Return how many times as long the first takes as the second: the median over rounds, pair by pair."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=True)
        return statistics.median(one / other for one, other in pairs)


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int) -> Timing:
    """Time calls of each contestant in turn.

    Args:
        contestants: what to call, by name.
        rounds: how many turns each has.
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
    return Timing(seconds)
