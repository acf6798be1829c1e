"""config.pbtxt: what keeps Triton from mixing the rows of different requests.

Triton batches requests by itself where a model's configuration allows it, so batching is allowed only if the rows of
every version present are independent. Otherwise `max_batch_size: 0` with every input and output listed in full: a
client sends one whole mini-batch a request.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from bln_serve.artifact import ONNX_MODEL, write_atomically
from bln_serve.errors import ArtifactError
from bln_serve.export.staging import clear_abandoned, reserved, retired_versions, staging_folders
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import Manifest, read_manifest
from bln_serve.repository import versions_in
from bln_serve.signature import TensorSpec
from bln_serve.statistics import RowCoupling

FILE_NAME = "config.pbtxt"
MAX_BATCH_SIZE = 256

# Without a config.pbtxt, or with one that lists no inputs, Triton would allow batching by itself. It refuses to load a
# model whose version policy names none.
_NOTHING_KNOWN = """\
# No version's manifest can be read, so nothing is known of row coupling, and no version may be served.
# Export the model again, or remove what cannot be read.
backend: "onnxruntime"
max_batch_size: 0
version_policy { specific {} }
"""

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
    with _alone(model_folder):
        _write(model_folder, [*_manifests(model_folder), coming])
        try:
            yield
        finally:
            _relax(model_folder)


def remove(version_folder: Path) -> None:
    """Remove one exported version.

    It leaves its place by one rename, and config.pbtxt is rewritten after that: a coupled version is never there while
    requests may be batched. The last version's removal removes config.pbtxt.

    Args:
        version_folder: NAME/VERSION; its manifest need not be readable.

    Raises:
        ArtifactError: it is not an exported version's folder.
    """
    version_folder = version_folder.absolute()
    if not (_is_version(version_folder) and (version_folder / MANIFEST).is_file()):
        raise ArtifactError(
            f"Expected the folder of an exported version, NAME/VERSION with a {MANIFEST}, to remove. "
            f"Received: {version_folder}. Remove by hand what bln-export did not write."
        )
    with reserved(version_folder) as away, _alone(version_folder.parent):
        version_folder.rename(away)
        _relax(version_folder.parent)


def _is_version(folder: Path) -> bool:
    return folder.name in map(str, versions_in(folder.parent))


def sweep(model_folder: Path) -> None:
    """Clear away what killed exports of a model left, before another begins.

    A version that was being replaced when its export was killed comes back. Exports that still run are left alone.
    """
    if staging_folders(model_folder):
        with _alone(model_folder):
            _relax(model_folder)


@contextmanager
def _alone(model_folder: Path) -> Iterator[None]:
    """Hold the model's lock, with what killed exports left cleared away: config.pbtxt covers all that may come back."""
    with FileLock(model_folder / ".lock"):
        clear_abandoned(model_folder)
        for half_written in model_folder.glob(f".{FILE_NAME}.*"):
            half_written.unlink()
        yield


def _manifests(model_folder: Path) -> list[Manifest | None]:
    """Return the manifests of a model's versions; None for one that cannot be read.

    A version that was taken away to be replaced counts: it comes back if nothing takes its place.
    """
    folders = [model_folder / str(version) for version in versions_in(model_folder)]
    return [_manifest(folder) for folder in (*folders, *retired_versions(model_folder))]


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None


def _relax(model_folder: Path) -> None:
    """Let config.pbtxt fit the versions that are there, which allow as much as it does, or more."""
    try:
        _write(model_folder, _manifests(model_folder))
    except OSError as error:
        raise ArtifactError(
            f"Expected to write {model_folder / FILE_NAME} anew. Received: {error}. The versions are in their places, "
            "and the file is safe as it was, but may keep Triton from batching: put that right, then export again or "
            "remove a version."
        ) from error


def _write(model_folder: Path, manifests: Sequence[Manifest | None]) -> None:
    path = model_folder / FILE_NAME
    if not manifests:
        path.unlink(missing_ok=True)
        return
    content = config(manifests).encode()
    # Triton loads a model again when its config.pbtxt is newer.
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def config(manifests: Sequence[Manifest | None]) -> str:
    """Return the text of config.pbtxt for all versions of one model.

    Args:
        manifests: at least one; None for a version whose manifest cannot be read: Triton does not read it either and
            may serve the version, so it counts as coupled.
    """
    known = [manifest for manifest in manifests if manifest]
    if not known:
        return _NOTHING_KNOWN
    latest = max(known, key=lambda manifest: manifest.version)
    strongest = max(known, key=lambda manifest: manifest.row_coupling.strength)
    coupling, reason = strongest.row_coupling, strongest.row_coupling_reason
    if None in manifests:
        coupling, reason = RowCoupling.MINI_BATCH, "a version's manifest cannot be read"
    batching = coupling is RowCoupling.INDEPENDENT
    lines = [
        f"# Row coupling: {coupling} ({_in_one_line(reason)}).",
        "# Requests may be batched." if batching else "# Requests must not be batched: send one mini-batch a request.",
        f"name: {_quoted(latest.name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(ONNX_MODEL)}",
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
    return f"{kind} [ {{ name: {_quoted(spec.name)} data_type: {_DATA_TYPES[spec.dtype]} dims: [ {dims} ]{reshape} }} ]"


def _quoted(text: str) -> str:
    """Return a string literal of protobuf's text format, which reads JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _in_one_line(text: str) -> str:
    """Return a layer's own words without the line breaks that would end a comment."""
    return " ".join(text.split())
