"""One exported version on disk: written whole or not at all, checked by hash, proving itself by its samples.

NAME/VERSION/manifest.json    says what the rest is
NAME/VERSION/model.onnx       standard operators only
NAME/VERSION/samples.npz      requests with Keras's answers
NAME/VERSION/saved_model.pb, variables/, fingerprint.pb
"""

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bln_serve.errors import ArtifactError, IntegrityError
from bln_serve.external_data import external_locations
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import Manifest, read_manifest
from bln_serve.signature import Arrays

# What NumPy and zipfile raise for archives that are damaged, encrypted, or none.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)

ONNX_MODEL = "model.onnx"
SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Sample:
    """One request with the answer Keras gave.

    Attributes:
        inputs: by name, each (rows, ...).
        outputs: by name, each (rows, ...).
        mini_batch_rows: as a request would name it; None for the artifact's default.
    """

    inputs: Arrays
    outputs: Arrays
    mini_batch_rows: int | None


@dataclass(frozen=True)
class Artifact:
    """One exported version.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Artifact":
        """Read the artifact in a folder; its files are not checked yet.

        Raises:
            ArtifactError: the folder holds no readable manifest.
        """
        return cls(path, read_manifest(path))

    @property
    def onnx_path(self) -> Path:
        """Where the ONNX model lies."""
        return self.path / ONNX_MODEL

    @property
    def unknown_files(self) -> tuple[str, ...]:
        """Files that the manifest does not name. They are reported, never served."""
        return tuple(name for name in _files(self.path) if name not in self.manifest.files)

    def check_hashes(self) -> None:
        """Compare every file with its recorded SHA-256, and see that the model has no other file read.

        A match shows that nothing was damaged on the way; whoever can rewrite a file can rewrite the manifest too.

        Raises:
            IntegrityError: a file is missing, differs, or leaves the folder by a link; or the manifest does not name
                what is served, or what the model reads.
            ArtifactError: the model's file holds no ONNX model.
        """
        for name in (ONNX_MODEL, SAMPLES):
            if name not in self.manifest.files:
                raise IntegrityError(
                    f"Expected the manifest in {self.path} to hold the SHA-256 of {name}. Received: none. "
                    "Export the model again."
                )
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise IntegrityError(f"Expected {name!r} to lie in {self.path}. Received: a path that leaves it.")
            if not file.is_file():
                raise IntegrityError(
                    f"Expected the file {file}, which the manifest names. It is missing: export the model again."
                )
            if (actual := sha256(file)) != expected:
                raise IntegrityError(
                    f"Expected {file} with SHA-256 {expected}. Received: {actual}. "
                    "The file was changed after its verification: export the model again."
                )
        self._check_external_data()

    def _check_external_data(self) -> None:
        # ONNX Runtime keeps to the folder, and in it reads whatever it is told to: what nobody checked, too.
        for location in external_locations(self.onnx_path):
            if location not in self.manifest.files:
                raise IntegrityError(
                    f"Expected {self.onnx_path} to keep its weights in itself, or in files of its folder that the "
                    f"manifest names. Received: {location!r}. Export the model again."
                )

    def samples(self) -> tuple[Sample, ...]:
        """Read the requests and Keras's answers.

        Raises:
            ArtifactError: samples.npz cannot be read.
        """
        try:
            # Opened here, since np.load leaves a file of its own open when that is no archive.
            with (self.path / SAMPLES).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return _unflatten({key: stored[key] for key in stored.files})
        except _UNREADABLE as error:
            raise ArtifactError(
                f"Expected requests with answers in {self.path / SAMPLES}. Received: {error}"
            ) from error


def write_samples(folder: Path, samples: tuple[Sample, ...]) -> None:
    """Write samples.npz: `INDEX/inputs/NAME`, `INDEX/outputs/NAME` and `INDEX/mini_batch_rows` (-1 for the default)."""
    flat: Arrays = {}
    for index, sample in enumerate(samples):
        rows = -1 if sample.mini_batch_rows is None else sample.mini_batch_rows
        flat[f"{index}/mini_batch_rows"] = np.asarray(rows, np.int64)
        for kind, arrays in (("inputs", sample.inputs), ("outputs", sample.outputs)):
            flat |= {f"{index}/{kind}/{name}": array for name, array in arrays.items()}
    np.savez_compressed(folder / SAMPLES, **flat)  # type: ignore[arg-type]  # numpy's stub takes a key for allow_pickle


def _unflatten(flat: Arrays) -> tuple[Sample, ...]:
    indices = sorted({int(key.partition("/")[0]) for key in flat})
    samples = []
    for index in indices:
        parts: dict[str, Arrays] = {"inputs": {}, "outputs": {}}
        for key, array in flat.items():
            if key.startswith(tuple(f"{index}/{kind}/" for kind in parts)):
                _, kind, name = key.split("/", 2)
                parts[kind][name] = array
        rows = int(flat[f"{index}/mini_batch_rows"])
        samples.append(Sample(parts["inputs"], parts["outputs"], None if rows < 0 else rows))
    return tuple(samples)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that readers see either as it was or whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def hashes(folder: Path) -> Mapping[str, str]:
    """Return the SHA-256 of every file but the manifest, by relative path."""
    return {name: sha256(folder / name) for name in _files(folder)}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path.relative_to(folder).as_posix() != MANIFEST
    )
