"""The whole way from a Keras model to a verified artifact on disk.

    load -> freeze -> SavedModel -> mark -> decompose -> verify -> samples, manifest -> config.pbtxt -> rename

Nothing is seen at its place before everything is written and verified; on any error nothing is left behind.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import onnx

import bln_serve
from bln_serve.artifact import (
    ONNX_MODEL,
    Artifact,
    exists,
    hashes,
    put_in_place,
    sha256,
    staging,
    write_atomically,
    write_samples,
)
from bln_serve.errors import ParityError, RunError, UnsupportedModelError, UsageError
from bln_serve.export import deployment, freezing, loading, marking, parity, saved_model
from bln_serve.export.decomposition import decompose
from bln_serve.export.input_ranges import with_index_ranges
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import FORMAT_VERSION, Manifest, row_facts
from bln_serve.repository import check_name, next_version
from bln_serve.runtime import OnnxSession
from bln_serve.signature import ModelSignature
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling, mini_batch_rule, strongest
from bln_serve.verification import Tolerance

DEFAULT_OPSET = marking.CONVERTER_OPSET
_TOOLS = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy")

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class _Order:
    """What is to be exported, and as what."""

    name: str
    version: int
    source_sha256: str | None
    tolerance: Tolerance
    opset: int
    statistics: str | None
    mini_batch_rows: int | None


@dataclass(frozen=True)
class _Rows:
    """What the BLN layers make of a model's rows.

    Attributes:
        layers: the BLN layers.
        default: rows of a mini-batch where a request names none.
    """

    layers: tuple[LayerStatistics, ...]
    default: int | None

    @property
    def rule(self) -> MiniBatchRule | None:
        return mini_batch_rule(self.layers, self.default or 1)

    def facts(self) -> dict[str, Any]:
        """Return the fields that the manifest and the ONNX file's metadata share."""
        return {"format_version": FORMAT_VERSION, "layers": self.layers, **row_facts(self.layers, self.default)}


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
    force: bool = False,
    on_stage: OnStage = lambda _: None,
) -> Artifact:
    """Export a Keras model as a verified artifact, OUT/NAME/VERSION.

    Args:
        model_or_path: a `.keras` or `.h5` file, or a built functional or Sequential model, which is not changed.
        out: the model repository.
        architecture: for an `.h5` file of weights alone, as `loading.load` takes it.
        name: of the model; by default the file's stem or the model's name.
        version: positive; by default the one after the latest.
        statistics: the policy of every BLN layer, as `StatisticsPolicy.parse` reads it; by default each layer's flags.
        mini_batch_rows: rows of a mini-batch where a request names none; by default the layers' common m, and needed
            where they differ and rows are coupled.
        opset: of the ONNX model's standard operators, 18 or higher.
        tolerance: how far an answer may be from Keras's; a wider one than the default needs `force`.
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
    _check_arguments(Path(out), version, opset, tolerance, force)
    path = Path(model_or_path) if isinstance(model_or_path, str | Path) else None
    name = check_name((path.stem if path else model_or_path.name) if name is None else name)
    folder = Path(out) / name
    version = next_version(folder) if version is None else version
    target = folder / str(version)
    if target.exists() and not force:
        raise exists(target)
    with staging(target) as stage:
        on_stage("loading the model")
        model = loading.load(path or model_or_path, architecture)
        order = _Order(name, version, sha256(path) if path else None, tolerance, opset, statistics, mini_batch_rows)
        manifest = _make(model, stage, order, on_stage)
        with deployment.publishing(folder, manifest):
            put_in_place(stage, target, replace=force)
    return Artifact.open(target)


def _check_arguments(out: Path, version: int | None, opset: int, tolerance: Tolerance, force: bool) -> None:
    if out.suffix == ".onnx":
        raise UsageError(f"Expected -o to be a model repository's folder. Received: {out}")
    if version is not None and version < 1:
        raise UsageError(f"Expected a version of 1 or more. Received: {version}")
    highest = onnx.defs.onnx_opset_version()
    if not marking.CONVERTER_OPSET <= opset <= highest:
        raise UsageError(f"Expected an opset from {marking.CONVERTER_OPSET} to {highest}. Received: {opset}")
    if tolerance.wider_than(Tolerance()) and not force:
        raise UsageError(
            f"Expected a tolerance of at most rtol {Tolerance().rtol:g} and atol {Tolerance().atol:g}. "
            f"Received: rtol {tolerance.rtol:g}, atol {tolerance.atol:g}. A wider one needs --force, and shows in the "
            "manifest."
        )


def _make(model: Any, folder: Path, order: _Order, on_stage: OnStage) -> Manifest:
    """Write everything into `folder`, verify it, and return its manifest."""
    callee = with_index_ranges(saved_model.describe(model))
    frozen = freezing.freeze(model, order.statistics)
    layers = tuple(item.statistics for item in frozen)
    rows = _Rows(layers, _default_rows(layers, order.mini_batch_rows))
    with freezing.applied(model, frozen):
        on_stage("writing the SavedModel")
        saved_model.write(callee, folder)
        on_stage("converting to ONNX")
        onnx_model = _convert(callee, frozen, order.opset)
        _write_onnx(onnx_model, folder / ONNX_MODEL, order.name, rows, callee.signature)
        on_stage("verifying")
        found = _verify(callee, folder, rows, order.tolerance)
    write_samples(folder, found.samples)
    manifest = Manifest(
        **rows.facts(),
        name=order.name,
        version=order.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=order.source_sha256,
        signature=callee.signature,
        tolerance=order.tolerance,
        checks=found.report.checks,
        tools=_tools(),
        files=hashes(folder),
    )
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def _default_rows(layers: Sequence[LayerStatistics], requested: int | None) -> int | None:
    """Return the artifact's rows of a mini-batch: as requested, else the common m."""
    sizes = sorted({layer.m for layer in layers})
    coupling, reason = strongest(layers)
    if requested is None:
        if len(sizes) > 1 and coupling is not RowCoupling.INDEPENDENT:
            raise UsageError(
                f"Expected --mini-batch-rows, since the layers were trained with different batch sizes ({sizes}) and "
                f"rows are coupled ({reason})."
            )
        return sizes[0] if len(sizes) == 1 else None
    rule = mini_batch_rule(layers, requested)
    if requested < 1 or (rule and not rule.allows(requested, requested)):
        limits = f"from {rule.min_rows} to {rule.max_rows or 'any number'}" if rule else "1 or more"
        raise UsageError(f"Expected --mini-batch-rows {limits} ({reason}). Received: {requested}")
    return requested


def _convert(callee: saved_model.Callee, frozen: Sequence[freezing.FrozenLayer], opset: int) -> onnx.ModelProto:
    model = decompose(marking.to_marked_onnx(callee, frozen, marking.CONVERTER_OPSET))
    if opset > marking.CONVERTER_OPSET:
        model = onnx.version_converter.convert_version(model, opset)
    try:
        onnx.checker.check_model(model, full_check=True)
        if opset > marking.CONVERTER_OPSET:
            OnnxSession(model.SerializeToString(), threads=1)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedModelError(f"The converted model is no valid ONNX: {error}") from error
    except RunError as error:
        raise UsageError(
            f"Expected an opset that the installed ONNX Runtime loads. Received: {opset}. {error}"
        ) from error
    return model


def _write_onnx(model: onnx.ModelProto, path: Path, name: str, rows: _Rows, signature: ModelSignature) -> None:
    """Write model.onnx, with what a reader of this file alone needs to know in its metadata."""
    model.graph.name = name
    model.producer_name, model.producer_version = "bln-serve", bln_serve.__version__
    facts = {**rows.facts(), "inputs": signature.inputs}
    texts = {f"bln.{key}": msgspec.json.encode(value).decode().strip('"') for key, value in facts.items()}
    onnx.helper.set_model_props(model, texts)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _verify(callee: saved_model.Callee, folder: Path, rows: _Rows, tolerance: Tolerance) -> parity.Parity:
    engines = {
        "SavedModel": parity.saved_model_engine(saved_model.read(folder)),
        "ONNX": parity.onnx_engine(OnnxSession(folder / ONNX_MODEL)),
    }
    found = parity.verify(callee, rows.layers, rows.rule, engines, tolerance)
    if not found.report.passed:
        raise ParityError(
            f"The exported model does not answer as Keras does, and was not kept:\n{found.report.table()}\n"
            "A model that computes in half precision needs a float32 policy, or --tolerance with --force. Otherwise "
            "please report the model."
        )
    return found


def _tools() -> dict[str, str]:
    versions = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
    return {"bln-serve": bln_serve.__version__, "python": platform.python_version(), **versions}
