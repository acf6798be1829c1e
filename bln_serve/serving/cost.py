"""How many rows a run should have: measured once, at start, on the artifact's own samples.

A run of r rows takes t(r) seconds. Rows a second, r / t(r), rise with r as long as what a run costs besides its rows
counts, and may fall again where the values between the layers no longer fit the cache. Of the r that reach NEARLY of
the best rate seen, the limit is the largest whose run is short, so that fewer runs are begun and ended; or else the
smallest, so that a run does not hold up other requests for longer than it is worth.

The sizes are timed in turns, but for a last one that takes long, and of each the shortest run counts: a container whose
processor time was just taken away, or a processor that changes its speed, mostly makes all of them slower, and what is
compared are their rates. Whoever wants the same limit at each start gives it: then that size alone is timed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bln_serve.artifact import Artifact
from bln_serve.runtime import Model
from bln_serve.serving.merging import Portion, SharedRun
from bln_serve.signature import Arrays, rows_of

SHORT_S = 0.004
"""A run no longer than this is made on the event loop, which spares every request two changes of thread."""

MAX_ROWS = 512
MAX_RUN_S = 0.05
NEARLY = 0.9
"""Of the best rate. What is spent around a run is not timed here and is shared by its rows, so that more rows are worth
more than their rate says: under load, requests of 25 rows lost a sixth where runs had 16 and not 64, at equal rates."""

REPEATS = 5


@dataclass(frozen=True)
class CostCurve:
    """What runs cost.

    Attributes:
        points: rows of a run and its seconds, by rows.
    """

    points: tuple[tuple[int, float], ...]

    @property
    def max_run_rows(self) -> int:
        """The rows that a run should have at most."""
        best = max(rows / seconds for rows, seconds in self.points)
        good = [(rows, seconds) for rows, seconds in self.points if rows / seconds >= NEARLY * best]
        return max((rows for rows, seconds in good if seconds <= SHORT_S), default=good[0][0])

    @property
    def loop_rows(self) -> int:
        """The most rows of a short run; where no run as short was timed, what the others make of it."""
        return max(rows if seconds <= SHORT_S else int(rows * SHORT_S / seconds) for rows, seconds in self.points)


def measure(
    artifact: Artifact, model: Model, max_run_rows: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> CostCurve:
    """Time runs of more and more rows, until they take too long.

    Args:
        artifact: whose samples are run, again and again one after the other.
        model: the same, loaded.
        max_run_rows: the limit, where it is given: then its run alone is timed.
        clock: in seconds.

    The memory that the runs took goes back.

    Returns:
        The shortest of some runs of each size: what disturbs a run only makes it longer.
    """
    rule = model.manifest.rule
    unit = rule.default_rows if rule else 1
    several = rule is None or model.manifest.several_mini_batches
    run = SharedRun(model)
    inputs = model.manifest.signature.validate(artifact.samples()[-1].inputs)

    count = max(1, max_run_rows // unit) if max_run_rows and several else 1
    times: dict[int, list[float]] = {count: []}

    def timed(count: int) -> float:
        portions = [Portion(_repeated(inputs, count * unit), count if rule else None)]
        began = clock()
        run(portions)
        times[count].append(clock() - began)
        return times[count][-1]

    may_grow = several and not max_run_rows
    # As a rule the first run tells; that of a size which seems to take too long may have been disturbed.
    while may_grow and any(2 * timed(count) <= MAX_RUN_S for _ in range(REPEATS)) and 2 * count * unit <= MAX_ROWS:
        count *= 2
        times[count] = []
    for _ in range(REPEATS):
        for each, taken in times.items():
            if len(taken) < REPEATS:
                timed(each)
    # The largest are far beyond the limit, and what they took would stay: 110 MB of the paper's CNN.
    model.trim(_repeated(inputs, unit))
    return CostCurve(tuple((each * unit, min(of_each)) for each, of_each in times.items()))


def _repeated(inputs: Arrays, rows: int) -> Arrays:
    index = np.arange(rows) % rows_of(inputs)
    return {name: array[index] for name, array in inputs.items()}
