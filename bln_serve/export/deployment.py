"""config.pbtxt: what keeps Triton from mixing the rows of different requests.

Triton batches requests by itself where a model's configuration allows it, so batching is allowed only if the rows of
every version present are independent. Otherwise `max_batch_size: 0` with every input and output listed in full: a
client sends one whole mini-batch a request.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from bln_serve.artifact import ONNX_MODEL, write_atomically
from bln_serve.errors import ArtifactError
from bln_serve.manifest import Manifest, read_manifest
from bln_serve.repository import versions_in
from bln_serve.signature import TensorSpec
from bln_serve.statistics import RowCoupling

FILE_NAME = "config.pbtxt"
MAX_BATCH_SIZE = 256

_DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}


def manifests_in(model_folder: Path) -> list[Manifest]:
    """Return the manifests of the versions in one model's folder; a version without a readable one is passed over."""
    manifests = []
    for version in versions_in(model_folder):
        try:
            manifests.append(read_manifest(model_folder / str(version)))
        except ArtifactError:
            continue
    return manifests


def write_config(model_folder: Path, manifests: Sequence[Manifest]) -> None:
    """Write config.pbtxt for these versions, by rename."""
    write_atomically(model_folder / FILE_NAME, config(manifests).encode())


def refresh(model_folder: Path) -> None:
    """Make config.pbtxt fit the versions that are there; a folder without any vanishes."""
    if manifests := manifests_in(model_folder):
        write_config(model_folder, manifests)
    elif not versions_in(model_folder):
        with contextlib.suppress(OSError):  # there is none, or another export is at work in it
            (model_folder / FILE_NAME).unlink(missing_ok=True)
            model_folder.rmdir()


def config(manifests: Sequence[Manifest]) -> str:
    """Return the text of config.pbtxt for all versions of one model, the latest of them last."""
    latest = manifests[-1]
    strongest = max(manifests, key=lambda manifest: manifest.row_coupling.strength)
    batching = strongest.row_coupling is RowCoupling.INDEPENDENT
    lines = [
        f"# Row coupling: {strongest.row_coupling} ({strongest.row_coupling_reason}).",
        "# Requests may be batched." if batching else "# Requests must not be batched: send one mini-batch a request.",
        f'name: "{latest.name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{ONNX_MODEL}"',
        f"max_batch_size: {MAX_BATCH_SIZE if batching else 0}",
    ]
    lines += [_tensor("input", spec, batching) for spec in latest.signature.inputs]
    lines += [_tensor("output", spec, batching) for spec in latest.signature.outputs]
    return "\n".join(lines + (["dynamic_batching {}"] if batching else [])) + "\n"


def _tensor(kind: str, spec: TensorSpec, batching: bool) -> str:
    shape = spec.shape[1:] if batching else (-1, *spec.shape[1:])
    # Triton wants at least one dimension where it adds the batch dimension itself.
    dims = ", ".join(map(str, shape)) or "1"
    reshape = " reshape { shape: [ ] }" if not shape else ""
    return f'{kind} [ {{ name: "{spec.name}" data_type: {_DATA_TYPES[spec.dtype]} dims: [ {dims} ]{reshape} }} ]'
