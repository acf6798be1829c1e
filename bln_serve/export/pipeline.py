"""An export as a caller orders it: made and verified in a folder of its own, then put in its place.

Nothing is seen at its place before everything is written and verified; on any error nothing is left behind.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from bln_serve.artifact import ONNX_MODEL, Artifact, write_atomically
from bln_serve.errors import ArtifactExistsError, UsageError
from bln_serve.export import deployment
from bln_serve.export.making import OnStage, Order, make
from bln_serve.export.staging import exists, put_in_place, staging
from bln_serve.export.tf_to_onnx import CONVERTER_OPSET
from bln_serve.manifest import Manifest
from bln_serve.repository import check_name, next_version
from bln_serve.verification import Tolerance

DEFAULT_OPSET = CONVERTER_OPSET


def export(
    model_or_path: Any,
    out: str | Path = "models",
    *,
    architecture: str | Path | Callable[[], Any] | None = None,
    name: str | None = None,
    version: int | None = None,
    statistics: str | None = None,
    mini_batch_rows: int | None = None,
    opset: int = DEFAULT_OPSET,
    tolerance: Tolerance | None = None,
    labels: Sequence[str] | None = None,
    force: bool = False,
    on_stage: OnStage = lambda _: None,
) -> Artifact:
    """Export a Keras model as a verified artifact, OUT/NAME/VERSION.

    Args:
        model_or_path: a `.keras` or `.h5` file, or a built Keras model, which is not changed.
        out: the model repository.
        architecture: for an `.h5` file of weights alone, as `loading.load` takes it.
        name: of the model; by default the file's stem or the model's name.
        version: positive; by default the one after the latest.
        statistics: the policy of every BLN layer, as `StatisticsPolicy.parse` reads it; by default each layer's flags.
        mini_batch_rows: rows of a mini-batch where a request names none; by default what makes every layer's m, and
            needed where rows are coupled and there is no such number.
        opset: of the ONNX model's standard operators, 18 or higher.
        tolerance: how far an answer may be from Keras's; a wider one than the default needs `force`.
        labels: what the entries of the output's last dimension mean.
        force: replace an existing version, and allow a wider tolerance.
        on_stage: is told what begins, for a progress display.

    Returns:
        The artifact, verified and in its place.

    Raises:
        UsageError: an argument is wrong.
        ModelError: the model cannot be loaded or exported.
        ParityError: the exported model does not answer as Keras does; the message has a line for each check.
        ArtifactExistsError: the version is there already, and `force` is False.
    """
    tolerance = tolerance or Tolerance()
    _check_arguments(opset, tolerance, mini_batch_rows, force)
    if Path(out).suffix == ".onnx":
        raise UsageError(f"Expected a model repository's folder. Received: {out}. export_onnx writes a single file.")
    if version is not None and version < 1:
        raise UsageError(f"Expected a version of 1 or more. Received: {version}")
    name = check_name(_name(model_or_path) if name is None else name)
    folder = Path(out) / name
    deployment.sweep(folder)
    version = next_version(folder) if version is None else version
    target = folder / str(version)
    if target.exists() and not force:
        raise exists(target)
    order = Order(
        model_or_path=model_or_path,
        architecture=architecture,
        name=name,
        version=version,
        statistics=statistics,
        mini_batch_rows=mini_batch_rows,
        opset=opset,
        tolerance=tolerance,
        labels=tuple(labels) if labels else None,
        on_stage=on_stage,
    )
    with staging(target) as stage:
        manifest = make(order, stage)
        with deployment.publishing(folder, manifest):
            put_in_place(stage, target, replace=force)
    return Artifact.open(target)


def export_onnx(
    model_or_path: Any,
    path: str | Path,
    *,
    architecture: str | Path | Callable[[], Any] | None = None,
    name: str | None = None,
    statistics: str | None = None,
    mini_batch_rows: int | None = None,
    opset: int = DEFAULT_OPSET,
    tolerance: Tolerance | None = None,
    labels: Sequence[str] | None = None,
    force: bool = False,
    on_stage: OnStage = lambda _: None,
) -> Manifest:
    """Export a Keras model as one verified ONNX file, which explains itself in its metadata (`bln.`).

    Args:
        model_or_path: as for `export`.
        path: of the file; its folder is made if need be.
        architecture: as for `export`.
        name: as for `export`.
        statistics: as for `export`.
        mini_batch_rows: as for `export`.
        opset: as for `export`.
        tolerance: as for `export`.
        labels: as for `export`.
        force: replace an existing file, and allow a wider tolerance.
        on_stage: as for `export`.

    Returns:
        What a manifest beside it would say.

    Raises:
        UsageError, ModelError, ParityError: as `export`.
        ArtifactExistsError: the file is there already, and `force` is False.
    """
    tolerance, path = tolerance or Tolerance(), Path(path)
    _check_arguments(opset, tolerance, mini_batch_rows, force)
    name = check_name(_name(model_or_path) if name is None else name)
    if path.exists() and not force:
        raise ArtifactExistsError(f"Expected no file at {path}. Received: one. Replace it with --force.")
    order = Order(
        model_or_path=model_or_path,
        architecture=architecture,
        name=name,
        version=1,
        statistics=statistics,
        mini_batch_rows=mini_batch_rows,
        opset=opset,
        tolerance=tolerance,
        labels=tuple(labels) if labels else None,
        on_stage=on_stage,
        with_saved_model=False,
    )
    with tempfile.TemporaryDirectory(prefix="bln-export-") as folder:
        manifest = make(order, Path(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (Path(folder) / ONNX_MODEL).read_bytes())
    return manifest


def _name(model_or_path: Any) -> str:
    return Path(model_or_path).stem if isinstance(model_or_path, str | Path) else str(model_or_path.name)


def _check_arguments(opset: int, tolerance: Tolerance, mini_batch_rows: int | None, force: bool) -> None:
    if mini_batch_rows is not None and mini_batch_rows < 1:
        raise UsageError(f"Expected --mini-batch-rows 1 or more. Received: {mini_batch_rows}")
    highest = onnx.defs.onnx_opset_version()
    if not CONVERTER_OPSET <= opset <= highest:
        raise UsageError(f"Expected an opset from {CONVERTER_OPSET} to {highest}. Received: {opset}")
    if tolerance.wider_than(Tolerance()) and not force:
        raise UsageError(
            f"Expected a tolerance of at most rtol {Tolerance().rtol:g} and atol {Tolerance().atol:g}. "
            f"Received: rtol {tolerance.rtol:g}, atol {tolerance.atol:g}. A wider one needs --force, and shows in the "
            "manifest."
        )
