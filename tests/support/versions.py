"""Versions of one model that are no more than their manifests, for tests of what happens to their folders."""

from dataclasses import replace
from pathlib import Path

from bln_serve.artifact import write_atomically
from bln_serve.export import deployment
from bln_serve.export.staging import put_in_place, staging
from bln_serve.manifest import Manifest, read_manifest, row_facts
from bln_serve.repository import versions_in
from bln_serve.signature import ModelSignature, TensorSpec
from bln_serve.statistics import LayerStatistics, RowCoupling

GOLDEN = read_manifest(Path(__file__).parents[1] / "golden" / "artifacts" / "tiny_pppp" / "1")
POLICIES = {RowCoupling.INDEPENDENT: "PPMM", RowCoupling.POSITIONAL: "PPPP", RowCoupling.MINI_BATCH: "MMMM"}
INDEPENDENT, POSITIONAL, MINI_BATCH = POLICIES


def manifest(
    coupling: RowCoupling = INDEPENDENT,
    version: int = 1,
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "float32", (None, 6, 4)),),
    outputs: tuple[TensorSpec, ...] = (TensorSpec("score", "float32", (None, 3)),),
) -> Manifest:
    """Return the manifest of a model `tiny` with one BLN layer."""
    layers = (LayerStatistics("bln1", POLICIES[coupling], 5),)
    made = replace(GOLDEN, name="tiny", version=version, signature=ModelSignature(inputs, outputs), layers=layers)
    return replace(made, **row_facts(layers, 5))


def fill(folder: Path, described: Manifest) -> None:
    """Write a version; `truth` comes last, says what it really is, and is read by tests alone."""
    (folder / "manifest.json").write_bytes(described.to_json())
    (folder / "model.onnx").write_bytes(b"onnx")
    (folder / "truth").write_text(described.row_coupling)


def truths(model_folder: Path) -> list[str]:
    """Return what the versions that are there really are."""
    paths = [model_folder / str(version) / "truth" for version in versions_in(model_folder)]
    return [path.read_text() if path.exists() else "half written" for path in paths]


def publish(model_folder: Path, coupling: RowCoupling, version: int, *, force: bool = False) -> None:
    """Put a version in place as the export does."""
    coming = manifest(coupling, version)
    with staging(model_folder / str(version)) as stage:
        fill(stage, coming)
        with deployment.publishing(model_folder, coming):
            put_in_place(stage, model_folder / str(version), replace=force)


def killed_between_the_renames(model_folder: Path, coupling: RowCoupling, version: int) -> None:
    """Leave what an export leaves that is killed when the old version is away and the new one not in its place."""
    coming, stage = manifest(coupling, version), model_folder / f".{version}.deadbeef"
    stage.mkdir()
    fill(stage, coming)
    text = deployment.config([*deployment._manifests(model_folder), coming])
    write_atomically(model_folder / "config.pbtxt", text.encode())
    (model_folder / str(version)).rename(stage.with_name(f"{stage.name}.old"))
