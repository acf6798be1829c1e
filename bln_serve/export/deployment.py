"""config.pbtxt: what keeps Triton from mixing the rows of different requests.

Triton batches requests by itself where a model's configuration allows it, so batching is allowed only if the rows of
every version present are independent. Otherwise `max_batch_size: 0` with every input and output listed in full: a
client sends one whole mini-batch a request.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

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
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
}


@contextmanager
def publishing(model_folder: Path, coming: Manifest) -> Iterator[None]:
    """Keep config.pbtxt true while a version is put in place inside the `with` block.

    Before it appears the file allows only what it and the versions that are there allow together; afterwards it fits
    what is there then. Another export of the same model waits meanwhile.
    """
    with FileLock(model_folder / ".lock"):
        present = _manifests(model_folder)
        _write(model_folder, [*present, coming])
        try:
            yield
        finally:
            _write(model_folder, _manifests(model_folder))


def _manifests(model_folder: Path) -> list[Manifest | None]:
    """Return the manifests of the versions in one model's folder, lowest first; None for one that cannot be read."""
    manifests: list[Manifest | None] = []
    for version in versions_in(model_folder):
        try:
            manifests.append(read_manifest(model_folder / str(version)))
        except ArtifactError:
            manifests.append(None)
    return manifests


def _write(model_folder: Path, manifests: Sequence[Manifest | None]) -> None:
    if any(manifests):
        write_atomically(model_folder / FILE_NAME, config(manifests).encode())
    else:
        (model_folder / FILE_NAME).unlink(missing_ok=True)


def config(manifests: Sequence[Manifest | None]) -> str:
    """Return the text of config.pbtxt for all versions of one model, the latest last.

    Args:
        manifests: None for a version whose manifest cannot be read: Triton does not read it either and may serve the
            version, so it counts as coupled.
    """
    known = [manifest for manifest in manifests if manifest]
    latest = known[-1]
    strongest = max(known, key=lambda manifest: manifest.row_coupling.strength)
    coupling, reason = strongest.row_coupling, strongest.row_coupling_reason
    if None in manifests:
        coupling, reason = RowCoupling.MINI_BATCH, "a version's manifest cannot be read"
    batching = coupling is RowCoupling.INDEPENDENT
    lines = [
        f"# Row coupling: {coupling} ({reason}).",
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
