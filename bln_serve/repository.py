"""The model repository: which models and versions lie where, in the layout TensorFlow Serving and Triton share.

    REPOSITORY/NAME/VERSION/manifest.json

A version is a positive integer without leading zeros. Other folders, such as a version being written, are not versions.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
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


class Kind(Enum):
    """What a path that models are looked for under is."""

    REPOSITORY = "a model repository"
    MODEL = "a model's folder"
    VERSION = "a version's folder"


@dataclass(frozen=True)
class Place:
    """A path and what it is: settled once, so that it does not turn into something else when versions come and go.

    Attributes:
        path: where.
        kind: what it was when it was first looked at.
        name: of the model, where it is a model's folder and a manifest in it said so.
    """

    path: Path
    kind: Kind
    name: str | None = None

    def versions(self) -> list[ModelVersion]:
        """List what lies there now, sorted; empty where every version was taken away.

        Raises:
            OSError: the folder cannot be listed, or is not there any more.
            ArtifactError: it is a version's folder, without a manifest that can be read.
        """
        if self.kind is Kind.VERSION:
            manifest = read_manifest(self.path)
            return [ModelVersion(manifest.name, manifest.version, self.path)]
        there = sorted(self.path.iterdir())
        if self.kind is Kind.MODEL:
            versions = versions_in(self.path)
            name = self.name or _name_of_all(self.path, versions) or self.path.resolve().name
            found = [ModelVersion(name, version, self.path / str(version)) for version in versions]
        else:
            found = [
                ModelVersion(folder.name, version, folder / str(version))
                for folder in there
                if folder.is_dir() and _NAME.fullmatch(folder.name)
                for version in versions_in(folder)
            ]
        # One that went away meanwhile would look like one from which every version was taken.
        self.path.stat()
        return found


def place_of(path: Path) -> Place:
    """Say what lies at a path.

    Args:
        path: a repository, one model's folder, or one version's folder.

    Raises:
        ModelNotFoundError: nothing is there, or nothing that this process may read.
    """
    try:
        if (path / MANIFEST).is_file():
            return Place(path, Kind.VERSION)
        if versions := versions_in(path):
            return Place(path, Kind.MODEL, _name_of_all(path, versions))
        if path.is_dir() and (place := Place(path, Kind.REPOSITORY)).versions():
            return place
    except PermissionError as error:
        raise _not_readable(path, error) from error
    received = "no such folder"
    if path.exists():
        received = "a folder without any exported version" if path.is_dir() else "a file"
    raise ModelNotFoundError(
        f"Expected a model repository (NAME/VERSION/{MANIFEST}), a model's folder or a version's at {path}. "
        f"Received: {received}. Export a model first: bln-export MODEL.keras -o DIRECTORY"
    )


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
        return place_of(path).versions()
    except PermissionError as error:
        raise _not_readable(path, error) from error


def _not_readable(path: Path, error: PermissionError) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"Expected a model repository that this process may read at {path}. Received: no permission for "
        f"{error.filename}. Let others read it (chmod -R a+rX {path}), or run the service as its owner."
    )


def _name_of_all(folder: Path, versions: Iterable[int]) -> str | None:
    """Return the latest readable manifest's name: a version that cannot be read is still one, named by its mates."""
    names = [name for version in versions if (name := _name_in(folder / str(version)))]
    return names[-1] if names else None


def _name_in(folder: Path) -> str | None:
    try:
        return read_manifest(folder).name
    except ArtifactError:
        return None


Stamp = tuple[tuple[str, int, int], ...]
"""What changes whenever a file of a version does."""


def stamp(folder: Path) -> Stamp:
    """Return the name, size and time of change of every file below a folder.

    The time is the one that the system sets at every change, of permissions too. A file that cannot be looked at
    stands there with the system's number for why.
    """
    entries: list[tuple[str, int, int]] = []
    for parent, _, files in os.walk(folder):
        for name in files:
            path = Path(parent, name)
            try:
                status = path.stat()
            except OSError as error:
                entries.append((str(path), -1, error.errno or 0))
            else:
                entries.append((str(path), status.st_size, status.st_ctime_ns))
    return tuple(sorted(entries))


def in_order(found: Iterable[ModelVersion], pins: Mapping[str, int]) -> dict[str, list[ModelVersion]]:
    """Order the versions in which each model should be tried.

    Args:
        found: all versions.
        pins: the one version allowed, by model name.

    Returns:
        For each model its versions from the latest down, or the pinned one alone; none where a pinned one is not there.
    """
    by_name: dict[str, list[ModelVersion]] = {}
    for version in sorted(found, reverse=True):
        by_name.setdefault(version.name, []).append(version)
    for name, pinned in pins.items():
        by_name[name] = [version for version in by_name.get(name, []) if version.version == pinned]
    return dict(sorted(by_name.items()))


def candidates(found: Iterable[ModelVersion], pins: Mapping[str, int]) -> dict[str, list[ModelVersion]]:
    """Order the versions in which each model should be tried, where every pinned one has to be there.

    Args:
        found: all versions.
        pins: the one version allowed, by model name.

    Returns:
        For each model its versions from the latest down, or the pinned one alone.

    Raises:
        ModelNotFoundError: a pinned model or version is not there.
    """
    found = list(found)
    by_name = in_order(found, pins)
    for name, versions in by_name.items():
        if not versions:
            there = sorted((version.version for version in found if version.name == name), reverse=True)
            known = ", ".join(map(str, there)) or "none"
            models = ", ".join(model for model, some in in_order(found, {}).items() if some) or "none"
            raise ModelNotFoundError(
                f"Expected version {pins[name]} of model {name!r}, which is pinned. Received: versions {known} of it, "
                f"and these models: {models}. Correct the pin."
            )
    return by_name


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
