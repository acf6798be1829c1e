"""The slots' stored feature statistics as one that serves every row: a layer's `feature_slots="pool"`.

    weight  (m,)            slot_steps / sum(slot_steps); 1 / m each where no slot was ever updated
    pooled  (1, ..., 1)     sum over the slots of weight * stored, stored (m, ..., 1)

in float64. A slot's estimate is the mean over its steps, each a row; so weighed, the slots make the mean over all rows
of those steps, however many of them came in partial batches. What is averaged is the rows' own variances: the distance
of their means from each other is not in it. A slot that was never updated weighs nothing, whatever it holds.

Twice: as a graph that reads the layer's variables, and in NumPy for who has a table to write. Each checks the other,
wherever an exported model is compared with its layer.
"""

from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray


def pooled(stored: NDArray[Any], slot_steps: NDArray[Any]) -> NDArray[np.float64]:
    """Average one statistic over the slots.

    Args:
        stored: a feature mean or feature variance, shape (m, ..., 1).
        slot_steps: how many steps each slot rests on, shape (m,), none below 0.

    Returns:
        shape (1, ..., 1), with as many axes as `stored`.
    """
    steps = np.asarray(slot_steps if np.any(slot_steps > 0) else np.ones_like(slot_steps), np.float64)
    used = steps > 0
    return np.average(np.asarray(stored, np.float64)[used], axis=0, weights=steps[used], keepdims=True)


def pooled_in_graph(stored: Any, slot_steps: Any) -> Any:
    """Do what `pooled` does with Keras variables or tensors, in any backend, traced or not."""
    steps = ops.cast(slot_steps, "float64")
    steps = ops.where(ops.any(steps > 0.0), steps, ops.ones_like(steps))
    weights = ops.reshape(steps / ops.sum(steps), (-1,) + (1,) * (len(stored.shape) - 1))
    stored = ops.cast(stored, "float64")
    # Not times 0, which would let a NaN through.
    return ops.sum(ops.where(weights > 0.0, weights * stored, ops.zeros_like(stored)), axis=0, keepdims=True)
