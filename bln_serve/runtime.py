"""Answers without TensorFlow: one ONNX Runtime session, and a model that cuts rows into mini-batches around it.

The only room that imports onnxruntime.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# ONNX Runtime on Linux reports its use to its makers unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray

from bln_serve import processors
from bln_serve.artifact import Artifact
from bln_serve.errors import InvalidInputError, MiniBatchError, RunError
from bln_serve.manifest import MINI_BATCHES, Manifest
from bln_serve.signature import Arrays, rows_of
from bln_serve.statistics import run_length
from bln_serve.verification import Check, VerificationReport, compare_all


class OnnxSession:
    """One ONNX Runtime session on the CPU.

    Args:
        model: a path, or the bytes of an ONNX model.
        threads: of one run; by default as many as the CPU quota and the affinity allow.

    Raises:
        RunError: ONNX Runtime cannot load the model.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or processors.available().count
        # ONNX Runtime's own warnings are about graph optimisation; its errors arrive as exceptions.
        options.log_severity_level = 4
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base below Exception
            raise RunError(f"ONNX Runtime cannot load the model: {error}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays, mini_batches: int = 1, *, trim: bool = False) -> Arrays:
        """Run the graph once, on all rows together.

        Args:
            inputs: by name, each (rows, ...).
            mini_batches: of how many equal parts the rows are, in order, each with its own statistics. More than 1
                needs a model with the input `mini_batches`.
            trim: whether memory that no value is left in goes back to the system afterwards. ONNX Runtime otherwise
                keeps what its largest run took, for the next one.

        Raises:
            MiniBatchError: the rows are no such number of equal parts.
            RunError: ONNX Runtime refused.
        """
        if mini_batches != 1:
            _rows_of_each(inputs, mini_batches)
            inputs = {**inputs, MINI_BATCHES: np.array([mini_batches], np.int64)}
        try:
            values = self._session.run(self._outputs, inputs, _trimming() if trim else None)
        except Exception as error:  # its exceptions have no common base below Exception
            raise RunError(f"ONNX Runtime refused a run of {rows_of(inputs)} rows: {error}") from error
        return dict(zip(self._outputs, values, strict=True))


def _trimming() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


class Model:
    """A verified artifact that answers requests as the Keras model would.

    Attributes:
        manifest: what the artifact says of itself.

    Args:
        artifact: what to load. Its hashes are not checked here; `load` does.
        threads: of one run; by default as many as the CPU quota and the affinity allow.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.manifest: Manifest = artifact.manifest
        self._session = OnnxSession(artifact.onnx_path, threads)

    def predict(
        self, inputs: ArrayLike | Mapping[str, ArrayLike], mini_batch_rows: int | None = None
    ) -> NDArray[Any] | Arrays:
        """Answer as `keras_model.predict(inputs, batch_size=mini_batch_rows)` does.

        Args:
            inputs: one array of shape (rows, ...), or one for each input by name.
            mini_batch_rows: rows of each mini-batch, in order; 0 for one mini-batch of all rows; by default the
                artifact's value. Has no effect on independent models.

        Returns:
            The output, (rows, ...), or every output by name where the model has several.

        Raises:
            InvalidInputError: an input has the wrong name, shape, dtype or values.
            MiniBatchError: the rows cannot be cut so.
            RunError: ONNX Runtime refused.
        """
        named = self.manifest.signature.named(inputs if isinstance(inputs, Mapping) else as_array(inputs))
        checked = self.manifest.signature.validate({name: as_array(value) for name, value in named.items()})
        outputs = self.run(checked, self.cut(rows_of(checked), mini_batch_rows))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def cut(self, rows: int, mini_batch_rows: int | None = None) -> tuple[int, ...] | None:
        """Cut a request's rows into mini-batches; None where rows are independent and need no cutting.

        Raises:
            MiniBatchError: they cannot be cut so.
        """
        rule = self.manifest.rule
        return rule.cut(rows, mini_batch_rows) if rule else None

    def run_mini_batches(self, inputs: Arrays, mini_batches: int) -> Arrays:
        """Run several mini-batches of equal size side by side, each with its own statistics and its own slot 0.

        Args:
            inputs: as `ModelSignature.validate` returns them; the mini-batches, in order.
            mini_batches: how many there are.

        Returns:
            Every output by name, (rows, ...): for each mini-batch what it gets alone.

        Raises:
            MiniBatchError: the rows are no such number of equal parts, or the parts have too few or too many rows.
            RunError: the model does not take several at once, or ONNX Runtime refused.
        """
        rule, size = self.manifest.rule, _rows_of_each(inputs, mini_batches)
        if rule is None:
            return self._session.run(inputs)
        if not self.manifest.several_mini_batches:
            raise RunError(
                f"Expected a model that takes several mini-batches in one run. Received: {self.manifest.name} version "
                f"{self.manifest.version}, which does not ({self.manifest.row_coupling_reason}). Run each by itself."
            )
        rule.cut(rows_of(inputs), size)
        return self._session.run(inputs, mini_batches)

    def trim(self, inputs: Arrays) -> None:
        """Run one mini-batch, or rows that are independent, and give back the memory that larger runs have left.

        Args:
            inputs: as `ModelSignature.validate` returns them.

        Raises:
            RunError: ONNX Runtime refused the run.
        """
        self._session.run(inputs, trim=True)

    def run(self, inputs: Arrays, sizes: tuple[int, ...] | None) -> Arrays:
        """Run validated inputs, each mini-batch by itself.

        Args:
            inputs: as `ModelSignature.validate` returns them.
            sizes: as `cut` returns them for these rows.

        Returns:
            Every output by name, (rows, ...).

        Raises:
            RunError: ONNX Runtime refused a run.
        """
        if sizes is None or len(sizes) == 1:
            return self._session.run(inputs)
        if sum(sizes) != rows_of(inputs):
            raise RunError(f"Expected mini-batches that add up to {rows_of(inputs)} rows. Received: {sizes}.")
        ends = np.cumsum(sizes)
        parts = [
            self._session.run({name: array[end - size : end] for name, array in inputs.items()})
            for size, end in zip(sizes, ends, strict=True)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Model:
    """Load one exported version, after a check of its files' hashes.

    Args:
        path: the version's folder, models/NAME/VERSION.
        threads: of one run; by default as many as the CPU quota and the affinity allow.

    Returns:
        A model whose `predict` answers as the Keras model would.

    Raises:
        ArtifactError: the folder is no artifact of this format.
        IntegrityError: a file is missing or differs from its hash.
        RunError: ONNX Runtime cannot load the model.
    """
    artifact = Artifact.open(Path(path))
    artifact.check_hashes()
    return Model(artifact, threads)


def replay(artifact: Artifact, model: Model) -> VerificationReport:
    """Answer the artifact's own samples and compare with what Keras answered.

    Returns:
        One check a sample and output, under the tolerance of the artifact's own verification.

    Raises:
        ArtifactError: the samples cannot be read.
        RequestError: a sample is not a request that the model takes.
        RunError: ONNX Runtime refused a run.
    """
    checks: list[Check] = []
    for index, sample in enumerate(artifact.samples()):
        inputs = model.manifest.signature.validate(sample.inputs)
        sizes = model.cut(rows_of(inputs), sample.mini_batch_rows)
        name = f"sample {index}, rows {rows_of(inputs)}" + (f" in mini-batches {run_length(sizes)}" if sizes else "")
        checks += compare_all(name, sample.outputs, model.run(inputs, sizes), artifact.manifest.tolerance)
    return VerificationReport(tuple(checks))


def as_array(value: ArrayLike) -> NDArray[Any]:
    """Return `value` as an array.

    Raises:
        InvalidInputError: its lists are ragged, or hold what is no number.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InvalidInputError(f"Expected a rectangular array of numbers. Received: {error}.") from error


def _rows_of_each(inputs: Arrays, mini_batches: int) -> int:
    rows = rows_of(inputs)
    if mini_batches < 1 or rows % mini_batches:
        raise MiniBatchError(
            f"Expected a number of mini-batches that divides the {rows} rows. Received: {mini_batches}."
        )
    return rows // mini_batches
