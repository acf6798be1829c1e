"""What goes into each BLN layer of a model while it answers: the statistics of its input at every call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.saved_model import Callee
from bln_serve.layers import BatchLayerNormalization
from bln_serve.layers.batch_layer_normalization import marked_calls

Moments = dict[str, Any]
"""One call's biased statistics in float64: batch_* (1, ..., d), feature_* (n, ..., 1)."""

Observe = Callable[[Sequence[Any]], list[list[Moments]]]


class Observer:
    """Runs a model on mini-batches and returns the statistics of the rows that reached its BLN layers.

    The policies and what is stored may change between runs if the policies did so before the first one: the graph has
    the policies built in, and reads what is stored.

    Args:
        callee: the model, with the policies under which its layers answer.
    """

    def __init__(self, callee: Callee) -> None:
        self._callee = callee
        self.layers: list[BatchLayerNormalization] = []
        """In the order of their first calls; known once `trace` was called."""
        self._refusal: UnsupportedModelError | None = None
        self._run = tf.function(self._traced, autograph=False, jit_compile=False)

    def trace(self) -> list[BatchLayerNormalization]:
        """Build the graph for any number of rows, and return the layers in the order of their first calls.

        Raises:
            UnsupportedModelError: a layer answers inside a loop of the graph, where nobody can look.
        """
        try:
            self._run = self._run.get_concrete_function(self._callee.tensor_specs())
        except Exception:
            if self._refusal is not None:  # Keras puts the arguments of the call, and colours, around what it says
                raise self._refusal from None
            raise
        return self.layers

    def __call__(self, inputs: Sequence[Any]) -> list[list[Moments]]:
        """Run one mini-batch, an array an input; return, a layer, the moments of each of its calls."""
        flat = self._run(*[tf.constant(each) for each in inputs])
        return [[{name: np.asarray(value) for name, value in call.items()} for call in calls] for calls in flat]

    def _traced(self, tensors: Sequence[Any]) -> list[list[Moments]]:
        graph = tf.compat.v1.get_default_graph()
        seen: dict[Any, list[Moments]] = {}

        def observe(layer: BatchLayerNormalization, x: Any) -> Any:
            if x.graph is not graph:
                self._refusal = UnsupportedModelError(
                    f"Expected every Batch Layer Normalization layer outside of loops. Received: {layer.name!r} inside "
                    "one, where its rows cannot be looked at. Unroll it."
                )
                raise self._refusal
            seen.setdefault(layer, []).append(_moments(x))
            return layer._infer(x)

        with marked_calls(observe):
            self._callee(*tensors)
        self.layers = list(seen)
        return list(seen.values())


def _moments(x: Any) -> Moments:
    x = tf.cast(x, tf.float64)
    found = {}
    for kind, axis in (("batch", 0), ("feature", -1)):
        found[f"{kind}_mean"], found[f"{kind}_var"] = tf.nn.moments(x, axis, keepdims=True)
    return found
