"""One mini-batch under several policies at once: what lies before the first BLN layer is computed once.

The candidates' copies of a mini-batch lie side by side in one tensor, (candidates * n, ...), and every layer but BLN
takes them for so many rows. A BLN layer sees (candidates, n, ...), takes live statistics of each candidate's copy, and
for each candidate either these or the stored ones, which come in as tables:

    batch mean, batch variance        (candidates, 1, ..., d)
    feature mean, feature variance    (candidates, n or 1, ..., 1)

Alone, with a count of 1, only the statistics that are taken are computed.

What computes a row from that row alone cannot tell the difference. Something else that looks across rows can, so that
whoever uses this compares with what a candidate answers alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import estimates
from bln_serve.export.calls import graph_of
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.layers import BatchLayerNormalization
from bln_serve.layers.batch_layer_normalization import marked_calls
from bln_serve.layers.pooling import pooled
from bln_serve.statistics import STATISTICS, Source

Tables = Mapping[str, Any]
"""`LAYER/STATISTIC`: stored values, and `LAYER/STATISTIC/stored`: which candidates take them, (candidates,)."""


def tables(candidates: Sequence[Sequence[FrozenLayer]]) -> Tables:
    """Return what the candidates' layers store, an array (candidates, ...) for each statistic."""
    found = {}
    for items in zip(*candidates, strict=True):
        kept = [item.stored or estimates.read(item.layer) for item in items]
        for statistic in STATISTICS:
            values = [_values(item, stored, statistic) for item, stored in zip(items, kept, strict=True)]
            key = f"{items[0].name}/{statistic}"
            found[key] = np.stack(np.broadcast_arrays(*values))
            found[f"{key}/stored"] = np.array([item.policy.sources[statistic] is Source.POPULATION for item in items])
    return found


def _values(item: FrozenLayer, stored: estimates.Estimates, statistic: str) -> Any:
    values = stored[f"population_{statistic}"]
    if item.pooled and statistic.startswith("feature"):
        values = pooled(values, stored["slot_steps"])
    return values.astype("float64" if item.layer.compute_dtype == "float64" else "float32")


def _mean(axis: int) -> Callable[[Any], Any]:
    return lambda x: tf.reduce_mean(x, axis, keepdims=True)


def _variance(axis: int) -> Callable[[Any], Any]:
    return lambda x: tf.nn.moments(x, axis, keepdims=True)[1]


_LIVE = {"batch_mean": _mean(1), "batch_var": _variance(1), "feature_mean": _mean(-1), "feature_var": _variance(-1)}


class SideBySide:
    """Runs a model under several candidates at once, while a graph is traced.

    Args:
        callee: the model, each of its BLN layers called from its graph or from a layer in it.
        frozen: its BLN layers, with their names.
        count: how many candidates.
    """

    def __init__(self, callee: Callee, frozen: Sequence[FrozenLayer], count: int) -> None:
        self._callee, self._count = callee, count
        self._names = {item.layer: item.name for item in frozen}
        self._tables: Tables = {}
        self._spread: list[Any] = []

    def answers(self, inputs: Sequence[Any], stored: Tables) -> Any:
        """Return what each candidate answers.

        Args:
            inputs: an input each, (n, ...), n known.
            stored: of the candidates.

        Returns:
            The outputs in the model's structure, (candidates, n, ...).

        Raises:
            UnsupportedModelError: the model's layers cannot be called one by one, or have more rows than slots.
        """
        self._tables, self._spread = stored, []
        with marked_calls(self._normalize):
            outputs = self._run(graph_of(self._callee.twin()), list(inputs))
            outputs = keras.tree.map_structure(self._for_all, outputs)
        rows = keras.tree.flatten(inputs)[0].shape[0]
        return keras.tree.map_structure(lambda y: tf.reshape(y, (self._count, rows, *y.shape[1:])), outputs)

    def _run(self, graph: Any, inputs: Any) -> Any:
        outputs = graph._run_through_graph(graph._standardize_inputs(inputs), operation_fn=self._operation)
        return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs

    def _operation(self, operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(getattr(tensor, "_keras_mask", None) is not None for tensor in keras.tree.flatten([args, kwargs])):
                raise UnsupportedModelError("Expected no masks. Received: one, which belongs to its own rows alone.")
            if isinstance(operation, BatchLayerNormalization):
                return self._normalize(operation, args[0])
            if isinstance(operation, keras.Model) and len(args) == 1 and (graph := graph_of(operation)) is not None:
                return self._run(graph, args[0])
            if isinstance(operation, keras.Layer) and operation._call_has_training_arg:
                kwargs["training"] = False
            if not (_holds_bln(operation) or any(map(self._is_spread, keras.tree.flatten([args, kwargs])))):
                return operation(*args, **kwargs)
            args, kwargs = keras.tree.map_structure(self._for_all, (args, kwargs))
            return keras.tree.map_structure(self._noted, operation(*args, **kwargs))

        return call

    def _normalize(self, layer: BatchLayerNormalization, x: Any) -> Any:
        copies = self._count if self._is_spread(x) else 1
        rows, name = x.shape[0] // copies, self._names[layer]
        x = tf.cast(x, "float64" if layer.compute_dtype == "float64" else "float32")
        x = tf.reshape(x, (copies, rows, *x.shape[1:]))
        statistics = {
            statistic: self._chosen(f"{name}/{statistic}", rows, partial(_LIVE[statistic], x))
            for statistic in STATISTICS
        }
        y = layer._combine(x, statistics)
        return self._noted(tf.reshape(y, (self._count * rows, *y.shape[2:])))

    def _chosen(self, key: str, rows: int, live: Callable[[], Any]) -> Any:
        stored = self._stored(key, rows)
        takes = self._tables[f"{key}/stored"]
        if self._count == 1:  # alone, only what is needed is computed, so that it takes the time that it takes
            return tf.cond(takes[0], lambda: stored, live)
        return tf.where(tf.reshape(takes, (-1, *[1] * (len(stored.shape) - 1))), stored, live())

    def _stored(self, key: str, rows: int) -> Any:
        """Return a table cut to the slots of `rows` rows."""
        table = self._tables[key]
        slots = table.shape[1]
        if slots == 1:
            return table
        if rows > slots:
            raise UnsupportedModelError(f"Expected at most {slots} rows for {key}. Received: {rows}")
        return table[:, :rows]

    def _is_spread(self, tensor: Any) -> bool:
        return any(tensor is each for each in self._spread)

    def _noted(self, tensor: Any) -> Any:
        self._spread.append(tensor)
        return tensor

    def _for_all(self, tensor: Any) -> Any:
        """Return a tensor with a copy for each candidate; what is no tensor of rows stays."""
        if not tf.is_tensor(tensor) or self._is_spread(tensor):
            return tensor
        return self._noted(tf.tile(tensor, (self._count, *[1] * (len(tensor.shape) - 1))))


def _holds_bln(operation: Any) -> bool:
    return isinstance(operation, keras.Layer) and any(
        isinstance(layer, BatchLayerNormalization) for layer in operation._flatten_layers()
    )
