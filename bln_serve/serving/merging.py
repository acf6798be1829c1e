"""Which rows may share a run, and how: what the kinds of row coupling allow.

    independent       rows of all requests, one after the other
    coupled           mini-batches of equal size side by side, each with statistics and slots of its own
    coupled, and the model takes one mini-batch a run: each by itself

A request's portions are no larger than a run should be, so that a large request does not take the memory of all its
rows at once. What is computed for a mini-batch never depends on what shares its run:
the export proved and compared that before it wrote the artifact.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise

import numpy as np
from msgspec import Struct

from bln_serve.runtime import Model
from bln_serve.serving.prediction import Work
from bln_serve.serving.queued import Part
from bln_serve.signature import Arrays, rows_of

_ROWS = "rows"


class Portion(Struct, frozen=True):
    """Rows of one request that stay in one run.

    Attributes:
        inputs: by name, each (rows, ...).
        mini_batches: of how many mini-batches of equal size they are; None where rows are independent.
    """

    inputs: Arrays
    mini_batches: int | None


def parts_of(work: Work, max_run_rows: int, *, several_mini_batches: bool, shared: bool = True) -> list[Part[Portion]]:
    """Divide a request into the parts that a queue runs.

    Args:
        work: a checked request.
        max_run_rows: the most rows of a part, unless a single mini-batch has more.
        several_mini_batches: whether the model takes several mini-batches in one run.
        shared: whether parts of other requests may share its runs. Otherwise the runs of a request are the same
            whatever else there is, and so are the bits of its answer.

    Returns:
        The parts, in the order of the request's rows.
    """
    if work.sizes is None:
        group: Hashable = _ROWS if shared else None
        if (rows := work.rows) <= max_run_rows:
            return [Part(Portion(work.inputs, None), rows, group)]
        cuts = _even_cuts(rows, max_run_rows)
        return [
            Part(Portion(_rows(work.inputs, start, stop), None), stop - start, group) for start, stop in pairwise(cuts)
        ]
    parts, start = [], 0
    for size, alike in groupby(work.sizes):
        left = len(list(alike))
        most = max(1, max_run_rows // size) if several_mini_batches else 1
        group = size if several_mini_batches and shared else None
        for first, last in pairwise(_even_cuts(left, most)):
            stop = start + (last - first) * size
            parts.append(
                Part(Portion(_rows(work.inputs, start, stop), last - first), stop - start, group, last - first)
            )
            start = stop
    return parts


def _even_cuts(count: int, most: int) -> list[int]:
    """Return where to cut so many things into as few parts as may be, none larger than `most`, and nearly equal."""
    parts = -(-count // most)
    return [count * part // parts for part in range(parts + 1)]


class SharedRun:
    """Runs portions that a queue put together: what the queue calls.

    Args:
        model: whose runs these are.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, portions: Sequence[Portion]) -> list[Arrays]:
        """Answer each portion.

        Returns:
            For each, every output by name, (rows, ...).

        Raises:
            RunError: ONNX Runtime refused the run.
        """
        inputs = _joined([portion.inputs for portion in portions])
        if portions[0].mini_batches is None:
            outputs = self._model.run(inputs, None)
        else:
            count = sum(portion.mini_batches or 0 for portion in portions)
            rows = rows_of(inputs)
            outputs = self._model.run(inputs, (rows,)) if count == 1 else self._model.run_mini_batches(inputs, count)
        if len(portions) == 1:
            return [outputs]
        ends = np.cumsum([rows_of(portion.inputs) for portion in portions]).tolist()
        return [_rows(outputs, start, end) for start, end in zip([0, *ends], ends, strict=False)]


def join(answers: Sequence[Arrays]) -> Arrays:
    """Put the answers to a request's parts together, in order."""
    return _joined(answers)


def _joined(several: Sequence[Arrays]) -> Arrays:
    if len(several) == 1:
        return several[0]
    return {name: np.concatenate([arrays[name] for arrays in several]) for name in several[0]}


def _rows(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {name: array[start:stop] for name, array in arrays.items()}
