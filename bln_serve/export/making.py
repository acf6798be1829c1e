"""Everything that an export writes, made and verified in one folder.

load -> choose -> freeze -> convert -> SavedModel -> verify -> samples, manifest
"""

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import onnx

import bln_serve
from bln_serve.artifact import ONNX_MODEL, hashes, sha256, write_atomically, write_samples
from bln_serve.errors import ParityError, UsageError
from bln_serve.export import (
    conversion,
    freezing,
    layer_parity,
    loading,
    parity,
    request_rows,
    samples,
    saved_model,
    typical_ranges,
)
from bln_serve.export.choosing import Choice, Chooser, Wish
from bln_serve.export.conversion import Conversion
from bln_serve.export.request_rows import RequestRows
from bln_serve.export.selection import plot, report
from bln_serve.export.selection.record import Selection
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import Manifest, read_manifest
from bln_serve.runtime import OnnxSession
from bln_serve.verification import Tolerance, VerificationReport

_TOOLS = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "numpy")

SELECTION_JSON, SELECTION_PNG = "selection.json", "selection.png"

OnStage = Callable[[str], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how: the arguments of `pipeline.export`, checked.

    Attributes:
        model_or_path: as given.
        architecture: as given.
        name: of the model.
        version: of the artifact.
        wish: how the statistics are to be chosen.
        mini_batch_rows: as given.
        opset: as given.
        tolerance: of the verification.
        labels: of the output, or None.
        on_stage: is told what begins.
        on_progress: is told how many of how many steps of what began are done.
        on_selection: is told how the candidates of a selection rank.
        save_model: where to write the Keras model with the statistics that are exported, or None.
        as_artifact: whether a SavedModel and the files of a selection belong beside the ONNX model.
    """

    model_or_path: Any
    architecture: str | Path | Callable[[], Any] | None
    name: str
    version: int
    wish: Wish
    mini_batch_rows: int | None
    opset: int
    tolerance: Tolerance
    labels: tuple[str, ...] | None
    on_stage: OnStage
    on_progress: OnProgress
    on_selection: Callable[[Selection], None]
    save_model: Path | None = None
    as_artifact: bool = True


@dataclass(frozen=True)
class _Made:
    """What a model was made into."""

    callee: saved_model.Callee
    choice: Choice
    converted: Conversion
    rows: RequestRows


def make(order: Order, folder: Path) -> Manifest:
    """Write everything into a folder, verify it, and return its manifest.

    Raises:
        UsageError: an argument does not fit the model.
        ModelError: the model cannot be loaded or exported.
        ParityError: what was written does not answer as Keras does.
    """
    order.on_stage("loading the model")
    path = Path(order.model_or_path) if isinstance(order.model_or_path, str | Path) else None
    said: list[str] = []
    compiled = order.save_model is not None
    loaded = loading.load(path or order.model_or_path, order.architecture, compiled=compiled, notes=said)
    source_sha256 = sha256(path) if path else None
    model = saved_model.functional(loaded)
    callee = _described(model, order)
    chooser = Chooser(callee, loaded, path, order.mini_batch_rows, order.on_stage, order.on_progress)
    choice = chooser.choose(order.wish)
    frozen = choice.frozen
    if choice.selection:
        order.on_selection(choice.selection)
    with freezing.applied(model, frozen):
        order.on_stage("converting to ONNX")
        converted = conversion.convert(callee, frozen, order.opset)
        order.wish.require_within(converted.coupling.row_coupling, converted.coupling.reason)
        rows = request_rows.choose(converted, order.mini_batch_rows)
        made = _Made(_with_index_ranges(callee, converted), choice, converted, rows)
        _write_onnx(made, folder / ONNX_MODEL, order.name)
        if order.as_artifact:
            order.on_stage("writing the SavedModel")
            saved_model.write(callee, folder)
        order.on_stage("verifying")
        found = _verify(made, folder, order)
        if order.save_model:
            loaded.save(order.save_model)
            said = [f"{order.save_model.name} is not compiled: {each}" for each in said]
    if choice.selection and order.as_artifact:
        order.on_stage("drawing the selection")
        report.write(choice.selection, folder / SELECTION_JSON)
        plot.write(choice.selection, folder / SELECTION_PNG)
    write_samples(folder, found.samples)
    manifest = Manifest(
        **rows.facts(),
        name=order.name,
        version=order.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source_sha256=source_sha256,
        signature=made.callee.signature,
        tolerance=order.tolerance,
        checks=found.report.checks,
        tools=_tools(),
        files=hashes(folder),
        row_coupling_path=converted.coupling.path,
        several_mini_batches=converted.several_mini_batches,
        sensitivity=found.sensitivity,
        notes=(*choice.notes, *said, *converted.notes, *found.notes),
        stored_statistics=choice.stored,
    )
    write_atomically(folder / MANIFEST, manifest.to_json())
    return read_manifest(folder)  # what its own reader refuses must not take another version's place


def _described(model: Any, order: Order) -> saved_model.Callee:
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
    if made.choice.stored:
        facts["stored_statistics"] = made.choice.stored
    texts = {
        f"bln.{key}": str(value) if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in facts.items()
    }
    onnx.helper.set_model_props(model, texts)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _verify(made: _Made, folder: Path, order: Order) -> parity.Parity:
    converted, tolerance = made.converted, order.tolerance
    subject = parity.Subject(made.callee, made.rows.layers, made.rows.rule, converted.coupling.row_coupling, tolerance)
    engines = [parity.Engine("ONNX", OnnxSession(folder / ONNX_MODEL).run, converted.several_mini_batches)]
    if order.as_artifact:
        engines.insert(0, parity.Engine("SavedModel", saved_model.read(folder), takes_several=True))
    found = parity.verify(subject, engines)
    report = VerificationReport(
        (*found.report.checks, *layer_parity.verify(converted.marked, made.choice.frozen, tolerance))
    )
    if not report.passed:
        raise ParityError(
            f"The exported model does not answer as Keras does, and was not kept:\n{report.table()}\n"
            f"{_advice(found.sensitivity, tolerance)}"
        )
    return replace(found, report=report)


def _advice(sensitivity: float, tolerance: Tolerance) -> str:
    if sensitivity > tolerance.rtol / samples.MARGIN:
        return (
            f"The model's own float32 error is of this size: with each weight moved in its last place, Keras's answers "
            f"move by {sensitivity:.1e} of the largest. Its rows hardly differ where a live statistic divides by their "
            "deviation, the more so in the smallest mini-batch: rescale what goes into that layer, take a policy that "
            "stores the variance, or --tolerance with --force."
        )
    return (
        "A model that computes in half precision needs a float32 policy, or --tolerance with --force. Otherwise "
        "please report the model."
    )


def _tools() -> dict[str, str]:
    versions = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
    return {"bln-serve": bln_serve.__version__, "python": platform.python_version(), **versions}
