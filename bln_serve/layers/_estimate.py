"""The population estimates of a layer: one training step's share, in float64.

Each estimate is a running mean with its own count,

    count <- count + counted                counted is 1 where this step has something to say, else 0
    mean  <- mean + (value - mean) * counted / count

which is right after every step. Where a new estimate starts, the counts before this step are taken as 0, and the value
replaces the mean outright, so that nothing old, a NaN included, lives on. Every update waits for n.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops


def update(layer: Any, rows: Any, live: Mapping[str, Any]) -> None:
    """Add one training step to a layer's estimates.

    Args:
        layer: the BatchLayerNormalization.
        rows: n, from 1 to m.
        live: the step's own biased statistics: batch_* of shape (1, ..., d), feature_* of shape (n, ..., 1).
    """
    m = layer.batch_size
    n = _once_computed(ops.cast(rows, "float64"), live)
    keep = 1.0 - ops.convert_to_tensor(layer.start_new_estimate)
    live = {name: ops.cast(ops.stop_gradient(value), "float64") for name, value in live.items()}

    _advance(layer.mean_steps, keep, ops.minimum(n, 1.0), (layer.population_batch_mean, live["batch_mean"]))
    if m > 1:
        # Bessel's correction with this step's rows; one row says nothing of a variance, not even NaN.
        counts = n >= 2.0
        corrected = live["batch_var"] * (n / ops.maximum(n - 1.0, 1.0))
        corrected = ops.where(counts, corrected, layer.population_batch_var)
        _advance(layer.variance_steps, keep, ops.cast(counts, "float64"), (layer.population_batch_var, corrected))
    else:  # what was calibrated is of other weights now
        layer.variance_steps.assign(n * 0.0)

    present = ops.cast(ops.arange(m, dtype="float64") < n, "float64")
    slots = [(layer.population_feature_mean, _all_slots(live["feature_mean"], m))]
    if m > 1:
        slots.append((layer.population_feature_var, _all_slots(live["feature_var"] * (m / (m - 1.0)), m)))
    _advance(layer.slot_steps, keep, present, *slots)
    layer.start_new_estimate.assign(n * 0.0)


def _once_computed(n: Any, live: Mapping[str, Any]) -> Any:
    """Return n, but in a graph not before the statistics are there.

    A graph runs what it can: a count that waits for nothing would go up in a step whose data never came, as at the end
    of a dataset of unknown length, or was refused.
    """
    if keras.backend.backend() != "tensorflow":
        return n
    import tensorflow as tf  # noqa: PLC0415 - keras.ops cannot order two computations

    with tf.control_dependencies(list(live.values())):
        return tf.identity(n)


def _advance(steps: Any, keep: Any, counted: Any, *estimates: tuple[Any, Any]) -> None:
    """Move estimates on; a value that is not counted must be finite where the estimate is."""
    before = steps * keep
    after = before + counted
    rate = counted / ops.maximum(after, 1.0)
    is_first = ops.logical_and(ops.equal(before, 0.0), after > 0.0)
    if len(steps.shape):  # one a slot, to broadcast along the first axis of an estimate
        by_slot = (-1,) + (1,) * (len(estimates[0][0].shape) - 1)
        rate, is_first = ops.reshape(rate, by_slot), ops.reshape(is_first, by_slot)
    for variable, value in estimates:
        variable.assign(ops.where(is_first, value, variable + (value - variable) * rate))
    steps.assign(after)


def _all_slots(values: Any, m: int) -> Any:
    """Fill up (n, ..., 1) with zeros to (m, ..., 1); the slots that are not there are not counted.

    Zeros of m - n rows and not of m, cut to m rows afterwards, which would hide more rows than slots where XLA drops
    assertions.
    """
    if values.shape[0] == m:
        return values
    missing = m - ops.shape(values)[0]
    return ops.concatenate([values, ops.zeros((missing, *values.shape[1:]), values.dtype)])
