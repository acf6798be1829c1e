"""What a run keeps while it trains: its history, the state it can go on from, curves, and what TensorBoard reads.

The state is one .npz file, written after each epoch and put in place by a rename: all of the model's variables (those
of its random generators too), the optimizer's, and the history as JSON. A run that goes on from it gives the numbers
that it would have given without the interruption.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from paper_data import Rows

from bln_serve.errors import UsageError


@dataclass
class History:
    """What was measured so far.

    `epochs` has for each epoch its number from 1, loss, accuracy, val_loss, val_accuracy and seconds (which include
    whatever else the machine did). `validation_by_step` has pairs of a step from 1 and the validation loss after it.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    validation_by_step: list[tuple[int, float]] = field(default_factory=list)

    def best(self) -> dict[str, Any] | None:
        """Return the epoch of the lowest validation loss, the first of equals; None if none is a finite number."""
        finite = [epoch for epoch in self.epochs if math.isfinite(epoch["val_loss"])]
        return min(finite, key=lambda epoch: epoch["val_loss"], default=None)


def training_set(rows: Rows, plan: NDArray[np.int64], dtype: str) -> Any:
    """Return a tf.data.Dataset of mini-batches, each of the rows that a line of `plan` `(steps, size)` names."""
    x, y = tf.constant(rows.x), tf.constant(rows.y)
    steps = tf.data.Dataset.from_tensor_slices(plan)
    return steps.map(lambda chosen: (tf.cast(tf.gather(x, chosen), dtype), tf.gather(y, chosen))).prefetch(2)


def whole_mini_batches(rows: Rows, size: int, dtype: str) -> Any:
    """Return a tf.data.Dataset of rows in their order, in mini-batches of `size`; a last smaller one is dropped."""
    dataset = tf.data.Dataset.from_tensor_slices((rows.x, rows.y)).batch(size, drop_remainder=True)
    return dataset.map(lambda x, y: (tf.cast(x, dtype), y)).prefetch(2)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON by a rename; a number that is not finite becomes null, which JSON can say."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class KeepState(keras.callbacks.Callback):  # type: ignore[misc]  # keras publishes no types
    """Add each epoch to the history, and write the state.

    Args:
        path: of the .npz file.
        config: what the state belongs to; `restore` refuses another one.
        history: is added to.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], history: History) -> None:
        super().__init__()
        self.path, self.config, self.history = path, config, history
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - the signature is Keras's
        """Take the time."""
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write."""
        values = {name: float(value) for name, value in logs.items()}
        self.history.epochs.append({"epoch": epoch + 1, **values, "seconds": round(time.monotonic() - self._began, 2)})
        kept = {"config": self.config, "history": vars(self.history)}
        temporary = self.path.with_suffix(".tmp.npz")
        np.savez(temporary, **_variables(self.model), kept=np.array(json.dumps(kept)))
        temporary.replace(self.path)


def restore(model: Any, path: Path, config: Mapping[str, Any]) -> History:
    """Give a model and its optimizer the state that `KeepState` wrote, and return its history.

    Raises:
        UsageError: the state belongs to a run with other settings or other data.
    """
    with np.load(path, allow_pickle=False) as file:
        kept = json.loads(str(file["kept"]))
        differ = [key for key, value in config.items() if kept["config"].get(key) != value]
        if differ:
            received = ", ".join(f"{key} {config[key]} after {kept['config'].get(key)}" for key in differ)
            raise UsageError(
                f"Expected the settings that the run in {path.parent} began with. Received: {received}. Resume with "
                "those, or train to another --output."
            )
        model.optimizer.build(model.trainable_variables)
        for name, variable in _named_variables(model).items():
            variable.assign(file[name])
    steps = [(int(step), float(loss)) for step, loss in kept["history"]["validation_by_step"]]
    return History(kept["history"]["epochs"], steps)


def _named_variables(model: Any) -> dict[str, Any]:
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {f"{group}_{index}": variable for group, many in groups.items() for index, variable in enumerate(many)}


def _variables(model: Any) -> dict[str, Any]:
    return {name: np.asarray(variable) for name, variable in _named_variables(model).items()}


class ValidateBySteps(keras.callbacks.Callback):  # type: ignore[misc]  # keras publishes no types
    """Measure the validation loss every few steps, for curves of what so many steps reach.

    Not with `model.evaluate`, which would reset the metrics of the epoch at hand.

    Args:
        validation: mini-batches of one size, as a tf.data.Dataset.
        every: how many steps.
        done: steps trained before this call.
        history: is added to.
    """

    def __init__(self, validation: Any, every: int, done: int, history: History) -> None:
        super().__init__()
        self.validation, self.every, self.step, self.history = validation, every, done, history

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Make the graph."""
        model = self.model

        def mean_loss() -> Any:
            total = tf.constant(0.0)
            for x, y in self.validation:
                total += model.loss(y, model(x, training=False))
            return total / tf.cast(self.validation.cardinality(), total.dtype)

        self._mean_loss = tf.function(mean_loss)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Measure, where it is time."""
        self.step += 1
        if self.step % self.every == 0:
            self.history.validation_by_step.append((self.step, float(self._mean_loss())))


class WriteScalars(keras.callbacks.Callback):  # type: ignore[misc]  # keras publishes no types
    """Write each epoch's numbers where TensorBoard finds them; keras.callbacks.TensorBoard needs TensorBoard to write.

    Args:
        folder: training goes to `train/` in it, validation to `validation/`, as Keras's own callback does.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Open the files."""
        self._writers = {
            part: tf.summary.create_file_writer(str(self.folder / part)) for part in ("train", "validation")
        }

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write."""
        # What makes a tensor a point of a curve there.
        plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = tf.compat.v1.SummaryMetadata(plugin_data=plugin)
        for name, value in logs.items():
            part = "validation" if name.startswith("val_") else "train"
            with self._writers[part].as_default():
                tf.summary.write(f"epoch_{name.removeprefix('val_')}", float(value), step=epoch + 1, metadata=metadata)
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
