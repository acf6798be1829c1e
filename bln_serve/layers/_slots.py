"""The refusal of more rows than slots."""

from typing import Any

import keras
from keras import ops


def require_slots(name: str, x: Any, m: int) -> Any:
    """Return `x`, but refuse more rows than slots: now if the number is known, when the graph runs if it is not.

    Raises:
        ValueError: the number of rows is known, and too large. In a graph TensorFlow raises InvalidArgumentError with
            the same message.
    """
    message = f"Expected at most {m} rows in layer {name!r}, which has {m} slots (its batch_size)."
    way_out = "Feed mini-batches of at most that many rows."
    rows = ops.shape(x)[0]
    if isinstance(rows, int):
        if rows > m:
            raise ValueError(f"{message} Received: {rows}. {way_out}")
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415 - keras.ops has no assertion; other backends know their rows while tracing

        # Tied to x, so that nothing is computed from it first and fails with a message about shapes.
        with tf.control_dependencies([tf.debugging.assert_less_equal(rows, m, message=f"{message} {way_out}")]):
            return tf.identity(x)
    return x
