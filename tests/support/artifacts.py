"""Copies of golden artifacts, altered with the manifest's knowledge or behind its back. Needs no ONNX library."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bln_serve.artifact import ONNX_MODEL, hashes
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import read_manifest

NAMES = ("digits_cnn", "digits_rnn", "tiny_mpmm", "tiny_pppp", "tiny_two_inputs")
TOGETHER = ("together_mpmm", "together_pppp")
"""One run of these may hold several mini-batches."""
_WEIGHTS = "variables/variables.data-00000-of-00001"
_CHUNK_BYTES = 32


def copy_of(artifact: Path, target: Path) -> Path:
    """Copy a version's folder and return the copy's."""
    return Path(shutil.copytree(artifact, target))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest anew with these fields changed."""
    (folder / MANIFEST).write_bytes(replace(read_manifest(folder), **changes).to_json())


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files as they are now, so that no hash tells of a change."""
    edit_manifest(folder, files=hashes(folder))


def alter_weights(folder: Path) -> None:
    """Multiply eight neighbouring weights in model.onnx by 1.01; the SavedModel, which stores the same, says which."""
    stored, model = (folder / _WEIGHTS).read_bytes(), bytearray((folder / ONNX_MODEL).read_bytes())
    for start in range(0, len(stored) - _CHUNK_BYTES, 4):
        chunk = stored[start : start + _CHUNK_BYTES]
        values = np.frombuffer(chunk, "<f4")
        plausible = np.all((np.abs(values) > 1e-3) & (np.abs(values) < 10))  # and so neither NaN nor padding
        if plausible and (at := model.find(chunk)) >= 0:
            model[at : at + _CHUNK_BYTES] = (values * np.float32(1.01)).tobytes()
            (folder / ONNX_MODEL).write_bytes(model)
            return
    raise AssertionError(f"no weights of the SavedModel are found in {folder / ONNX_MODEL}")
