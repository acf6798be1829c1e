"""How well a model does on labelled data, mini-batch by mini-batch, under each of several candidates.

Keras builds its evaluation anew for each policy and returns one number. Here all candidates answer a mini-batch in one
run, side by side, and each gets the loss of every mini-batch, so that candidates are compared in pairs on the same
rows. The first mini-batches are also given to each candidate alone: that shows how fast it is, and whether something in
the model looks across rows. Where the answers differ, or differ from what the layers themselves compute, each candidate
is evaluated by itself to the end.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bln_serve.export import freezing
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection import side_by_side
from bln_serve.export.selection.scoring import Scoring
from bln_serve.export.selection.side_by_side import SideBySide

OnRun = Callable[[], None]
Candidate = Sequence[FrozenLayer]

# Alone: enough to see what else looks across rows, and for a rate.
FIRST = 8
# Of one loss, side by side and alone: float32 in another order of sums, which a live variance of nearly equal rows
# makes larger; what looks across rows moves it by far more.
_RTOL, _ATOL = 1e-3, 1e-5


@dataclass(frozen=True)
class Evaluation:
    """What a candidate reached.

    Attributes:
        losses: of each mini-batch, (mini-batches,): the mean over its rows, with what the model's own layers add.
        metrics: over all rows, by name.
        rows_per_s: how many rows a second it answers alone, in TensorFlow.
    """

    losses: NDArray[np.float64]
    metrics: Mapping[str, float]
    rows_per_s: float


class _Judge:
    """The loss and metrics, as functions without a state of their own: one judge for all candidates.

    Args:
        callee: the model that is judged.
        scoring: the loss and metrics.
        targets: of a mini-batch, with answers to it: metrics take their shape from them.
        answers: in the model's structure.
    """

    def __init__(self, callee: Callee, scoring: Scoring, targets: Any, answers: Any) -> None:
        self.model = callee.twin()  # so that the model given keeps its own
        self.model.compile(**scoring.compile_arguments(), jit_compile=False)
        # Taken now: computing a loss adds Keras's own trackers of it.
        self._metrics = [metric for metric in self.model.metrics if metric.name != "loss"]
        for metric in self._metrics:
            metric.update_state(targets, answers)
            metric.reset_state()
        self.state = [tf.identity(variable.value) for metric in self._metrics for variable in metric.variables]

    def score(self, targets: Any, answers: Any, state: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the loss of a mini-batch, and the metrics' state after it."""
        after: list[Any] = []
        for metric in self._metrics:
            count = len(metric.variables)
            after += metric.stateless_update_state(state[len(after) : len(after) + count], targets, answers)
        return self.model.compute_loss(y=targets, y_pred=answers, training=False), after

    def score_all(self, targets: Any, answers: Any, states: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Do the same for the answers of several candidates, and their states, (candidates, ...) each."""
        signature = tf.TensorSpec((), tf.float32), [tf.TensorSpec(each.shape, each.dtype) for each in self.state]
        loss, after = tf.map_fn(
            lambda one: self.score(targets, *one), (answers, list(states)), fn_output_signature=signature
        )
        return loss, after

    def results(self, state: Sequence[Any]) -> Mapping[str, float]:
        """Return the metrics by name."""
        found: dict[str, float] = {}
        at = 0
        for metric in self._metrics:
            count = len(metric.variables)
            result = metric.stateless_result(state[at : at + count])
            found |= result if isinstance(result, dict) else {metric.name: result}
            at += count
        return {name: float(value) for name, value in found.items()}


class Evaluator:
    """Evaluates candidates on the whole mini-batches of one set of data.

    Args:
        callee: the model. Its policies and estimates, and how it was compiled, are as they were after each evaluation.
        scoring: the loss and metrics.
        data: the rows, with targets; at least one mini-batch.
        rows: of a mini-batch.
    """

    def __init__(self, callee: Callee, scoring: Scoring, data: Data, rows: int) -> None:
        self._callee, self._data, self._rows = callee, data, rows
        inputs, targets = next(self._mini_batches())
        self._judge = _Judge(callee, scoring, targets, callee.twin()(inputs, training=False))
        self._score = tf.function(self._judge.score, autograph=False, jit_compile=False)
        self._score_all = tf.function(self._judge.score_all, autograph=False, jit_compile=False)
        self._steps: dict[int, Any] = {}

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
        if not candidates:
            return []
        try:
            found = self._together(candidates, on_run)
        except Exception:  # whatever an operation provokes that will not take the rows of several candidates
            found = None
        if found is not None and self._is_confirmed(candidates, found):
            return found
        return [self.by_itself(candidate, on_run=on_run) for candidate in candidates]

    def by_itself(self, candidate: Candidate, first: int | None = None, on_run: OnRun = lambda: None) -> Evaluation:
        """Evaluate one candidate as its layers compute, on all mini-batches or on the first of them."""
        model = self._judge.model
        with freezing.applied(self._callee.model, candidate):
            answer = self._graph(lambda inputs: model(inputs, training=False), self._specs())
            return self._evaluate(lambda inputs: answer([tf.constant(each) for each in inputs]), first, on_run)

    def _evaluate(self, answer: Callable[[Any], Any], first: int | None, on_run: OnRun) -> Evaluation:
        state, losses, began = self._judge.state, [], 0.0
        for inputs, targets in islice(self._mini_batches(), first):
            loss, state = self._score(targets, answer(inputs), state)
            losses.append(float(loss))
            began = began or time.perf_counter()  # after the first, which builds the graph
            on_run()
        seconds = time.perf_counter() - began
        rate = self._rows * (len(losses) - 1) / seconds if len(losses) > 1 else float("nan")
        return Evaluation(np.array(losses), self._judge.results(state), rate)

    def _mini_batches(self) -> Any:
        return self._data.mini_batches(self._callee.signature, self._rows)

    def _together(self, candidates: Sequence[Candidate], on_run: OnRun) -> list[Evaluation] | None:
        """Evaluate candidates side by side; None if one of them answers otherwise alone."""
        alone = [self._alone(candidate) for candidate in candidates]
        step = self._step(len(candidates), candidates[0])
        stored = _tensors(side_by_side.tables(candidates))
        states = [tf.stack([each] * len(candidates)) for each in self._judge.state]
        losses = []
        for inputs, targets in self._mini_batches():
            answers = step(inputs, stored)
            loss, states = self._score_all(targets, answers, states)
            losses.append(loss.numpy().astype(np.float64))
            for _ in candidates:
                on_run()
        found = [
            Evaluation(each, self._judge.results([state[place] for state in states]), alone[place].rows_per_s)
            for place, each in enumerate(np.stack(losses, axis=1))
        ]
        return found if all(map(_agree, alone, found)) else None

    def _alone(self, candidate: Candidate) -> Evaluation:
        """Evaluate the first mini-batches of one candidate, in the graph that all share."""
        step, stored = self._step(1, candidate), _tensors(side_by_side.tables([candidate]))
        return self._evaluate(
            lambda inputs: keras.tree.map_structure(lambda y: y[0], step(inputs, stored)), FIRST, lambda: None
        )

    def _step(self, count: int, frozen: Candidate) -> Any:
        if count not in self._steps:
            panel = SideBySide(self._callee, frozen, count)
            stored = side_by_side.tables([frozen] * count)
            self._steps[count] = self._graph(panel.answers, self._specs(), _like(stored))
        return self._steps[count]

    def _specs(self) -> list[Any]:
        return self._callee.tensor_specs(self._rows)

    @staticmethod
    def _graph(function: Callable[..., Any], *specs: Any) -> Any:
        # Traced here and not by a first call, of which TensorFlow counts too many for a mistake and warns.
        return tf.function(function, autograph=False, jit_compile=False).get_concrete_function(*specs)

    def _is_confirmed(self, candidates: Sequence[Candidate], found: Sequence[Evaluation]) -> bool:
        """Whether the layers compute as was found: under the first and the last candidate's policies."""
        return all(_agree(self.by_itself(candidates[place], 1), found[place]) for place in (0, -1))


def _like(stored: side_by_side.Tables) -> dict[str, Any]:
    return {name: tf.TensorSpec(value.shape, value.dtype) for name, value in stored.items()}


def _tensors(stored: side_by_side.Tables) -> side_by_side.Tables:
    return {name: tf.constant(value) for name, value in stored.items()}


def _agree(alone: Evaluation, together: Evaluation) -> bool:
    return np.allclose(together.losses[: len(alone.losses)], alone.losses, rtol=_RTOL, atol=_ATOL, equal_nan=True)
