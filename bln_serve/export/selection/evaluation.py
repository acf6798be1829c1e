"""How well a model does on labelled data, mini-batch by mini-batch, under each of several candidates.

Keras builds its evaluation anew for each policy and returns one number. Here many candidates answer a mini-batch in one
run, side by side, and each gets the loss of every mini-batch, so that candidates are compared in pairs on the same
rows. The first mini-batches are also given to each candidate alone: that shows how fast it is, and whether something in
the model looks across rows. Where the answers differ, or differ from what the layers themselves compute, or where the
model adds to the loss what it finds in its rows, each candidate is evaluated by itself.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bln_serve.export import freezing
from bln_serve.export.calls import graph_of
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection import side_by_side
from bln_serve.export.selection.judging import Judge, State
from bln_serve.export.selection.scoring import Scoring
from bln_serve.export.selection.side_by_side import SideBySide

OnRun = Callable[[], None]
Candidate = Sequence[FrozenLayer]

# Alone: enough to see what else looks across rows, and for a rate.
FIRST = 8
# Of one loss, side by side and alone: float32 in another order of sums, which a live variance of nearly equal rows
# makes larger; what looks across rows moves it by far more.
_RTOL, _ATOL = 1e-3, 1e-5
# Of all that the layers answer to the rows that lie side by side.
_MOST_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Evaluation:
    """What a candidate reached.

    Attributes:
        losses: of each mini-batch, (mini-batches,): the mean over its rows, with what the model's own layers add.
        metrics: over all rows, by name.
        rows_per_s: how many rows a second it answers by itself, in TensorFlow; NaN with a single mini-batch.
    """

    losses: NDArray[np.float64]
    metrics: Mapping[str, float]
    rows_per_s: float


class Evaluator:
    """Evaluates candidates on the whole mini-batches of one set of data.

    Args:
        callee: the model. Its policies and estimates, and how it was compiled, are as they were after each evaluation.
        scoring: the loss and metrics.
        data: the rows, with targets; at least one mini-batch.
        rows: of a mini-batch.

    Raises:
        UsageError: a metric is not one number.
    """

    def __init__(self, callee: Callee, scoring: Scoring, data: Data, rows: int) -> None:
        self._callee, self._data, self._rows = callee, data, rows
        inputs, self._targets = next(self._mini_batches())
        self._judge = Judge(callee, scoring, self._targets, callee.twin()(inputs, training=False))
        self._score = tf.function(self._judge.score, autograph=False, jit_compile=False)
        self._score_all = tf.function(self._judge.score_all, autograph=False, jit_compile=False)
        self._steps: dict[int, Any] = {}

    @property
    def model(self) -> Any:
        """The Keras model."""
        return self._callee.model

    @property
    def mini_batches(self) -> int:
        """How many there are."""
        return self._data.whole_mini_batches(self._rows)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics' names."""
        return tuple(self._judge.results(self._judge.state))

    def __call__(self, candidates: Sequence[Candidate], on_run: OnRun = lambda: None) -> list[Evaluation]:
        """Evaluate candidates, telling of each mini-batch of each."""
        size = max(1, min(len(candidates), _MOST_BYTES // (self._rows * _bytes_a_row(self._callee))))
        groups = [candidates[start : start + size] for start in range(0, len(candidates), size)]
        return [one for group in groups for one in self._group(group, on_run)]

    def by_itself(self, candidate: Candidate, first: int | None = None, on_run: OnRun = lambda: None) -> Evaluation:
        """Evaluate one candidate as its layers compute, on all mini-batches or on the first of them."""

        def step(inputs: Sequence[Any], targets: Any, state: State) -> tuple[Any, State]:
            # In one graph, since answers carry their masks, and layers what they add to the loss.
            return self._judge.score(targets, self._judge.model(inputs, training=False), state)

        with freezing.applied(self.model, candidate):
            graph = _graph(step, self._specs(), _like(self._targets), _like(self._judge.state))
            state, losses, seconds = self._judge.state, [], []
            for inputs, targets in islice(self._mini_batches(), first):
                began = time.perf_counter()
                loss, state = graph(_tensors(inputs), _tensors(targets), state)
                losses.append(float(loss))
                seconds.append(time.perf_counter() - began)
                on_run()
        return Evaluation(np.array(losses), self._judge.results(state), self._rate(seconds))

    def _group(self, candidates: Sequence[Candidate], on_run: OnRun) -> list[Evaluation]:
        """Evaluate candidates side by side, if what the first mini-batches show allows it."""
        seen = self._look(candidates) if len(candidates) > 1 else None
        if seen is None:
            return [self.by_itself(candidate, on_run=on_run) for candidate in candidates]
        rates, losses, states = seen
        stored = _tensors(side_by_side.tables(candidates))
        for number, (inputs, targets) in enumerate(self._mini_batches()):
            if number >= len(losses):
                loss, states = self._score_all(targets, self._steps[len(candidates)](_tensors(inputs), stored), states)
                losses.append(loss.numpy())
            for _ in candidates:
                on_run()
        each = np.stack(losses, axis=1).astype(np.float64)
        return [
            Evaluation(each[place], self._judge.results([state[place] for state in states]), rate)
            for place, rate in enumerate(rates)
        ]

    def _look(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[Any], State] | None:
        """Evaluate the first mini-batches; None if candidates cannot be evaluated side by side.

        Returns:
            Each candidate's rate alone, the losses of all by mini-batch, and the states after these.
        """
        confirmed = {place: self.by_itself(candidates[place], 1).losses for place in (0, len(candidates) - 1)}
        if self._judge.model_adds_to_the_loss:
            return None
        try:
            steps = {count: self._step(count, candidates[0]) for count in (1, len(candidates))}
            alone = [self._first(steps[1], [candidate]) for candidate in candidates]
            _, losses, states = self._first(steps[len(candidates)], candidates)
        except Exception:  # whatever an operation provokes that will not take the rows of several candidates
            return None
        together = np.stack(losses, axis=1)
        agree = all(_close(together[place], np.concatenate(each)) for place, (_, each, _) in enumerate(alone))
        if agree and all(_close(together[place][:1], each) for place, each in confirmed.items()):
            return [rate for rate, _, _ in alone], losses, states
        return None

    def _first(self, step: Any, candidates: Sequence[Candidate]) -> tuple[float, list[Any], State]:
        """Evaluate the first mini-batches; return the rate, the losses by mini-batch, and the states after them."""
        stored = _tensors(side_by_side.tables(candidates))
        states = [tf.stack([each] * len(candidates)) for each in self._judge.state]
        losses, seconds = [], []
        for inputs, targets in islice(self._mini_batches(), FIRST):
            began = time.perf_counter()
            answers = step(_tensors(inputs), stored)
            seconds.append(time.perf_counter() - began)
            loss, states = self._score_all(targets, answers, states)
            losses.append(loss.numpy())
        return self._rate(seconds), losses, states

    def _rate(self, seconds: Sequence[float]) -> float:
        return self._rows / median(seconds[1:]) if len(seconds) > 1 else float("nan")

    def _step(self, count: int, frozen: Candidate) -> Any:
        if count not in self._steps:
            panel = SideBySide(self._callee, frozen, count)
            self._steps[count] = _graph(panel.answers, self._specs(), _like(side_by_side.tables([frozen] * count)))
        return self._steps[count]

    def _mini_batches(self) -> Any:
        return self._data.mini_batches(self._callee.signature, self._rows)

    def _specs(self) -> list[Any]:
        return self._callee.tensor_specs(self._rows)


def _graph(function: Callable[..., Any], *specs: Any) -> Any:
    # Traced here and not by a first call, of which TensorFlow counts too many for a mistake and warns.
    return tf.function(function, autograph=False, jit_compile=False).get_concrete_function(*specs)


def _like(values: Any) -> Any:
    return tf.nest.map_structure(lambda value: tf.TensorSpec(value.shape, value.dtype), values)


def _tensors(values: Any) -> Any:
    return tf.nest.map_structure(tf.constant, values)


def _close(together: NDArray[Any], alone: NDArray[Any]) -> bool:
    return np.allclose(together, alone, rtol=_RTOL, atol=_ATOL, equal_nan=True)


def _bytes_a_row(callee: Callee) -> int:
    """Return the size of all that a model's operations answer to one row, in float32."""
    return 4 * sum(map(_values_a_row, _operations(callee.twin())))


def _operations(model: Any) -> Iterable[Any]:
    for operation in graph_of(model).operations:
        if isinstance(operation, keras.Model) and graph_of(operation) is not None:
            yield from _operations(operation)
        else:
            yield operation


def _values_a_row(operation: Any) -> int:
    return sum(prod(length or 1 for length in tensor.shape[1:]) for tensor in keras.tree.flatten(operation.output))
