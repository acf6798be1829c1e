"""A loss and metrics as functions without a state of their own, so that one judge serves every candidate."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from bln_serve.errors import UsageError
from bln_serve.export.saved_model import Callee
from bln_serve.export.selection.scoring import Scoring

State = Sequence[Any]
"""What the metrics have counted, a tensor a variable of theirs."""


class Judge:
    """Scores a model's answers.

    Args:
        callee: the model; how it was compiled stays as it is.
        scoring: the loss and metrics.
        targets: of a mini-batch: the metrics take their shape from them.
        answers: to it, in the model's structure.

    Raises:
        UsageError: a metric does not take the targets, or is not one number.
    """

    def __init__(self, callee: Callee, scoring: Scoring, targets: Any, answers: Any) -> None:
        self.model = callee.twin()
        self.model.compile(**scoring.compile_arguments(), jit_compile=False)
        # Those alone that were compiled: a layer may have some of its own, which count other things.
        self._metrics = self.model._compile_metrics
        self.state: State = []
        if self._metrics is not None:
            try:
                self._metrics.update_state(targets, answers)
            except Exception as error:  # whatever a metric of other targets provokes in Keras
                raise UsageError(
                    f"Expected metrics that take these targets and answers. Received: {str(error)[:200]} Name others "
                    "with --metric, or give the targets in their form."
                ) from error
            self._metrics.reset_state()
            self.state = [tf.identity(variable.value) for variable in self._metrics.variables]
        self.results(self.state)

    @property
    def model_adds_to_the_loss(self) -> bool:
        """Whether layers add what they find in rows to the loss, beside what they make of weights."""
        of_weights = sum(weight.regularizer is not None for weight in self.model.trainable_weights)
        return len(self.model.losses) > of_weights

    def score(self, targets: Any, answers: Any, state: State) -> tuple[Any, State]:
        """Return the loss of a mini-batch, and the metrics' state after it."""
        if self._metrics is not None:
            state = self._metrics.stateless_update_state(list(state), targets, answers)
        return self.model.compute_loss(y=targets, y_pred=answers, training=False), state

    def score_all(self, targets: Any, answers: Any, states: State) -> tuple[Any, State]:
        """Do the same for the answers of several candidates, and their states, (candidates, ...) each."""
        signature = tf.TensorSpec((), tf.float32), [tf.TensorSpec(each.shape, each.dtype) for each in self.state]
        loss, after = tf.map_fn(
            lambda one: self.score(targets, *one), (answers, list(states)), fn_output_signature=signature
        )
        return loss, after

    def results(self, state: State) -> Mapping[str, float]:
        """Return the metrics by name."""
        if self._metrics is None:
            return {}
        found = {name: tf.convert_to_tensor(each) for name, each in self._metrics.stateless_result(state).items()}
        for name, value in found.items():
            if value.shape.rank:
                raise UsageError(
                    f"Expected metrics of one number. Received: {name!r}, which gives {tuple(value.shape)} of them. "
                    "Give it an average, or name another with --metric."
                )
        return {name: float(value) for name, value in found.items()}
