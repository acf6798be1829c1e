"""The whole way from a Keras model to a verified artifact on disk.

    load -> freeze -> convert -> SavedModel -> verify -> samples, manifest -> config.pbtxt -> rename

Nothing is seen at its place before everything is written and verified; on any error nothing is left behind.
"""

import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import onnx

import bln_serve
from bln_serve.artifact import ONNX_MODEL, Artifact, hashes, sha256, write_atomically, write_samples
from bln_serve.errors import ArtifactExistsError, ParityError, UsageError
from bln_serve.export import (
    conversion,
    deployment,
    freezing,
    layer_parity,
    loading,
    parity,
    saved_model,
    typical_ranges,
)
from bln_serve.export.conversion import Conversion
from bln_serve.export.staging import exists, put_in_place, staging
from bln_serve.export.tf_to_onnx import CONVERTER_OPSET
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import FORMAT_VERSION, Manifest, row_facts
from bln_serve.repository import check_name, next_version
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling, mini_batch_rule
from bln_serve.verification import Tolerance, VerificationReport

DEFAULT_OPSET = CONVERTER_OPSET
_TOOLS = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy")

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class _Order:
    """What is to be exported, and how."""

    name: str
    version: int
    statistics: str | None
    mini_batch_rows: int | None
    opset: int
    tolerance: Tolerance
    labels: tuple[str, ...] | None
    on_stage: OnStage
    source_sha256: str | None = None
    with_saved_model: bool = True


@dataclass(frozen=True)
class _Rows:
    """What is known of a model's rows.

    Attributes:
        layers: the BLN layers.
        default: rows of a mini-batch where a request names none.
        proved: the row coupling, with its reason.
    """

    layers: tuple[LayerStatistics, ...]
    default: int | None
    proved: tuple[RowCoupling, str]

    @property
    def rule(self) -> MiniBatchRule | None:
        return mini_batch_rule(self.layers, self.default or 1, self.proved)

    def facts(self) -> dict[str, Any]:
        """Return the fields that the manifest and the ONNX file's metadata share."""
        facts = row_facts(self.layers, self.default, self.proved)
        return {"format_version": FORMAT_VERSION, "layers": self.layers, **facts}


@dataclass(frozen=True)
class _Made:
    """What a model was made into."""

    callee: saved_model.Callee
    frozen: tuple[freezing.FrozenLayer, ...]
    converted: Conversion
    rows: _Rows


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
    order = _Order(
        name, version, statistics, mini_batch_rows, opset, tolerance, tuple(labels) if labels else None, on_stage
    )
    with staging(target) as stage:
        manifest = _make(model_or_path, architecture, stage, order)
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
    order = _Order(
        *(name, 1, statistics, mini_batch_rows, opset, tolerance, tuple(labels) if labels else None, on_stage),
        with_saved_model=False,
    )
    with tempfile.TemporaryDirectory(prefix="bln-export-") as folder:
        manifest = _make(model_or_path, architecture, Path(folder), order)
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


def _make(
    model_or_path: Any, architecture: str | Path | Callable[[], Any] | None, folder: Path, order: _Order
) -> Manifest:
    """Write everything into `folder`, verify it, and return its manifest."""
    order.on_stage("loading the model")
    path = Path(model_or_path) if isinstance(model_or_path, str | Path) else None
    model = saved_model.functional(loading.load(path or model_or_path, architecture))
    order = replace(order, source_sha256=sha256(path) if path else None)
    callee = _described(model, order)
    frozen = freezing.freeze(model, order.statistics)
    with freezing.applied(model, frozen):
        order.on_stage("converting to ONNX")
        converted = conversion.convert(callee, frozen, order.opset)
        rows = _rows(converted, order.mini_batch_rows)
        made = _Made(_with_index_ranges(callee, converted), frozen, converted, rows)
        _write_onnx(made, folder / ONNX_MODEL, order.name)
        if order.with_saved_model:
            order.on_stage("writing the SavedModel")
            saved_model.write(callee, folder)
        order.on_stage("verifying")
        found = _verify(made, folder, order)
    write_samples(folder, found.samples)
    manifest = Manifest(
        **rows.facts(),
        name=order.name,
        version=order.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=order.source_sha256,
        signature=made.callee.signature,
        tolerance=order.tolerance,
        checks=found.report.checks,
        tools=_tools(),
        files=hashes(folder),
        row_coupling_path=converted.coupling.path,
        several_mini_batches=converted.several_mini_batches,
        sensitivity=found.sensitivity,
        notes=(*converted.notes, *found.notes),
    )
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def _described(model: Any, order: _Order) -> saved_model.Callee:
    callee = typical_ranges.with_typical_ranges(saved_model.describe(model))
    if order.labels is None:
        return callee
    fitting = [spec.name for spec in callee.signature.outputs if spec.shape[-1] == len(order.labels)]
    if len(fitting) != 1:
        shapes = ", ".join(f"{spec.name!r} {spec.describe()}" for spec in callee.signature.outputs)
        raise UsageError(
            f"Expected labels for the last dimension of one output: {shapes}. Received: {len(order.labels)} labels."
        )
    outputs = tuple(
        replace(spec, labels=order.labels) if spec.name in fitting else spec for spec in callee.signature.outputs
    )
    return replace(callee, signature=replace(callee.signature, outputs=outputs))


def _with_index_ranges(callee: saved_model.Callee, converted: Conversion) -> saved_model.Callee:
    inputs = tuple(replace(spec, value_range=converted.index_ranges.get(spec.name)) for spec in callee.signature.inputs)
    return replace(callee, signature=replace(callee.signature, inputs=inputs))


def _rows(converted: Conversion, requested: int | None) -> _Rows:
    """Find the artifact's rows of a mini-batch: as requested, else what makes every layer's m.

    Raises:
        UsageError: no such number is known, or the layers do not allow it.
    """
    proved = converted.coupling.row_coupling, converted.coupling.reason
    sizes = {layer.default_rows for layer in converted.layers}
    default = requested if requested is not None else next(iter(sizes)) if len(sizes) == 1 else None
    rule = mini_batch_rule(converted.layers, default or 1, proved)
    if rule and default is None:
        trained = sorted({layer.m for layer in converted.layers})
        found = f"the layers were trained with different batch sizes ({trained})" if trained else "no layer has an m"
        raise UsageError(
            f"Expected --mini-batch-rows, the rows that a mini-batch has where a request names none. Received: none, "
            f"where rows are coupled ({proved[1]}), and {found}."
        )
    if rule and default and not rule.allows(default, default):
        limits = f"from {rule.min_rows} to {rule.max_rows or 'any number'}"
        raise UsageError(f"Expected --mini-batch-rows {limits} ({proved[1]}). Received: {default}")
    return _Rows(converted.layers, default, proved)


def _write_onnx(made: _Made, path: Path, name: str) -> None:
    """Write the ONNX model, with what a reader of this file alone needs to know in its metadata."""
    model = made.converted.model
    model.graph.name = name
    model.producer_name, model.producer_version = "bln-serve", bln_serve.__version__
    facts = {
        **made.rows.facts(),
        "inputs": made.callee.signature.inputs,
        "outputs": made.callee.signature.outputs,
        "several_mini_batches": made.converted.several_mini_batches,
    }
    texts = {f"bln.{key}": msgspec.json.encode(value).decode().strip('"') for key, value in facts.items()}
    onnx.helper.set_model_props(model, texts)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _verify(made: _Made, folder: Path, order: _Order) -> parity.Parity:
    converted, tolerance = made.converted, order.tolerance
    subject = parity.Subject(made.callee, made.rows.layers, made.rows.rule, converted.coupling.row_coupling, tolerance)
    engines = [parity.Engine("ONNX", OnnxSession(folder / ONNX_MODEL).run, converted.several_mini_batches)]
    if order.with_saved_model:
        engines.insert(0, parity.Engine("SavedModel", saved_model.read(folder), takes_several=True))
    found = parity.verify(subject, engines)
    report = VerificationReport((*found.report.checks, *layer_parity.verify(converted.marked, made.frozen, tolerance)))
    if not report.passed:
        raise ParityError(
            f"The exported model does not answer as Keras does, and was not kept:\n{report.table()}\n"
            f"{_advice(found.sensitivity, tolerance)}"
        )
    return replace(found, report=report)


def _advice(sensitivity: float, tolerance: Tolerance) -> str:
    if sensitivity > tolerance.rtol / 4:
        return (
            f"The model's own float32 error is of this size: with each weight moved in its last place, Keras's answers "
            f"move by {sensitivity:.1e} of the largest. Its rows hardly differ where a live statistic divides by their "
            "deviation: rescale its inputs, or take --tolerance with --force."
        )
    return (
        "A model that computes in half precision needs a float32 policy, or --tolerance with --force. Otherwise "
        "please report the model."
    )


def _tools() -> dict[str, str]:
    versions = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
    return {"bln-serve": bln_serve.__version__, "python": platform.python_version(), **versions}
