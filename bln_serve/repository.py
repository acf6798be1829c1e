"""The model repository: which models and versions lie where, in the layout TensorFlow Serving and Triton share.

    REPOSITORY/NAME/VERSION/manifest.json

A version is a positive integer without leading zeros. Other folders, such as a version being written, are not versions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bln_serve.errors import ArtifactError, ModelNotFoundError, UsageError
from bln_serve.manifest import FILE_NAME as MANIFEST
from bln_serve.manifest import read_manifest

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, order=True)
class ModelVersion:
    """Where one version of one model lies. Sorts by name, then version."""

    name: str
    version: int
    path: Path


def versions_in(folder: Path) -> list[int]:
    """Return the versions in one model's folder, lowest first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir())


def next_version(folder: Path) -> int:
    """Return the version after the latest in one model's folder; 1 for the first."""
    return max(versions_in(folder), default=0) + 1


def find(path: Path) -> list[ModelVersion]:
    """Find every version under a path.

    Args:
        path: a repository, one model's folder, or one version's folder.

    Returns:
        The versions, sorted. In a repository a model is called as its folder; a lone model's folder may have any
        name, as a mounted volume does, so there the manifests say the model's name.

    Raises:
        ModelNotFoundError: nothing is there, or nothing that this process may read.
    """
    try:
        return _find(path)
    except PermissionError as error:
        raise ModelNotFoundError(
            f"Expected a model repository that this process may read at {path}. Received: no permission for "
            f"{error.filename}. Let others read it (chmod -R a+rX {path}), or run the service as its owner."
        ) from error


def _find(path: Path) -> list[ModelVersion]:
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return [ModelVersion(manifest.name, manifest.version, path)]
    if versions := versions_in(path):
        folders = [path / str(version) for version in versions]
        # A version that cannot be read still has to be found, so that it can be reported: a readable mate names it.
        names = [name for folder in folders if (name := _name_in(folder))]
        name = names[-1] if names else path.resolve().name
        return [ModelVersion(name, version, folder) for version, folder in zip(versions, folders, strict=True)]
    if path.is_dir():
        found = [
            ModelVersion(folder.name, version, folder / str(version))
            for folder in sorted(path.iterdir())
            if folder.is_dir() and _NAME.fullmatch(folder.name)
            for version in versions_in(folder)
        ]
        if found:
            return found
    received = "no such folder"
    if path.exists():
        received = "a folder without any exported version" if path.is_dir() else "a file"
    raise ModelNotFoundError(
        f"Expected a model repository (NAME/VERSION/{MANIFEST}), a model's folder or a version's at {path}. "
        f"Received: {received}. Export a model first: bln-export MODEL.keras -o DIRECTORY"
    )


def _name_in(folder: Path) -> str | None:
    try:
        return read_manifest(folder).name
    except ArtifactError:
        return None


def candidates(found: Iterable[ModelVersion], pins: Mapping[str, int]) -> dict[str, list[ModelVersion]]:
    """Order the versions in which each model should be tried.

    Args:
        found: all versions.
        pins: the one version allowed, by model name.

    Returns:
        For each model its versions from the latest down, or the pinned one alone.

    Raises:
        ModelNotFoundError: a pinned model or version is not there.
    """
    by_name: dict[str, list[ModelVersion]] = {}
    for version in sorted(found, reverse=True):
        by_name.setdefault(version.name, []).append(version)
    for name, pinned in pins.items():
        there = by_name.get(name, [])
        by_name[name] = [version for version in there if version.version == pinned]
        if not by_name[name]:
            known = ", ".join(str(version.version) for version in there) or "none"
            models = ", ".join(model for model, versions in by_name.items() if versions) or "none"
            raise ModelNotFoundError(
                f"Expected version {pinned} of model {name!r}, which is pinned. Received: versions {known} of it, and "
                f"these models: {models}. Correct the pin."
            )
    return dict(sorted(by_name.items()))


def check_name(name: str) -> str:
    """Return a model's name if it can be a folder's and a URL's part.

    Raises:
        UsageError: it cannot.
    """
    # A model's folder whose name is a version's would make its repository look like a model's folder.
    if not _NAME.fullmatch(name) or _VERSION.fullmatch(name):
        raise UsageError(
            "Expected a model name of letters, digits, '_', '.' and '-', beginning with a letter or digit, and not a "
            f"number alone. Received: {name!r}"
        )
    return name
