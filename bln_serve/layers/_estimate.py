"""The population estimates of a layer: one training step's share, in float64.

Each estimate is a running mean with its own count,

    count <- count + counted                counted is 1 where this step has something to say, else 0
    mean  <- mean + (value - mean) * counted / count

which is right after every step. Where a new estimate starts, the counts before this step are taken as 0, and the value
replaces the mean outright, so that nothing old, a NaN included, lives on.
"""

from collections.abc import Mapping
from typing import Any

from keras import ops


def update(layer: Any, rows: Any, live: Mapping[str, Any]) -> None:
    """Add one training step to a layer's estimates.

    Args:
        layer: the BatchLayerNormalization.
        rows: n, from 1 to m.
        live: the step's own biased statistics: batch_* of shape (1, ..., d), feature_* of shape (n, ..., 1).
    """
    m = layer.batch_size
    n = ops.cast(rows, "float64")
    keep = 1.0 - ops.convert_to_tensor(layer.start_new_estimate)
    live = {name: ops.cast(ops.stop_gradient(value), "float64") for name, value in live.items()}

    one = ops.ones((), "float64")
    _advance(layer.mean_steps, keep, one, (layer.population_batch_mean, live["batch_mean"]))
    if m > 1:
        # Bessel's correction with this step's rows; one row says nothing of a variance.
        corrected = live["batch_var"] * n / ops.maximum(n - 1.0, 1.0)
        counted = ops.cast(n >= 2.0, "float64")
        _advance(layer.variance_steps, keep, counted, (layer.population_batch_var, corrected))

    present = ops.cast(ops.arange(m, dtype="float64") < n, "float64")
    slots = [(layer.population_feature_mean, _all_slots(live["feature_mean"], m))]
    if m > 1:
        slots.append((layer.population_feature_var, _all_slots(live["feature_var"] * (m / (m - 1.0)), m)))
    _advance(layer.slot_steps, keep, present, *slots)
    layer.start_new_estimate.assign(ops.zeros((), "float64"))


def _advance(steps: Any, keep: Any, counted: Any, *estimates: tuple[Any, Any]) -> None:
    before = steps * keep
    after = before + counted
    for variable, value in estimates:
        rank = len(variable.shape)
        rate = _lift(counted / ops.maximum(after, 1.0), rank)
        is_first = _lift(counted * ops.cast(ops.equal(before, 0.0), "float64"), rank)
        running = variable + ops.where(rate > 0.0, value - variable, ops.zeros_like(variable)) * rate
        variable.assign(ops.where(is_first > 0.0, value, running))
    steps.assign(after)


def _lift(per_slot: Any, rank: int) -> Any:
    """Give a scalar or a vector over slots the rank of an estimate, to broadcast along its first axis."""
    return ops.reshape(per_slot, (-1,) + (1,) * (rank - 1))


def _all_slots(values: Any, m: int) -> Any:
    """Fill up (n, ..., 1) with zeros to (m, ..., 1); the slots that are not there are not counted.

    An update and not a concatenation cut to m rows, which would hide more rows than slots where XLA drops assertions.
    """
    return ops.slice_update(ops.zeros((m, *values.shape[1:]), values.dtype), (0,) * len(values.shape), values)
