"""What is known of the versions on disk: which are there, which are broken, which should be tried next."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from bln_serve.repository import ModelVersion, candidates, in_order
from bln_serve.serving.loading import BrokenVersion
from bln_serve.serving.watching import Seen

logger = logging.getLogger(__name__)


class KnownVersions:
    """The versions of every model, and what became of those that were tried.

    Args:
        found: all versions.
        pins: the one version allowed, by model name.

    Raises:
        ModelNotFoundError: a pinned model or version is not there.
    """

    def __init__(self, found: Iterable[ModelVersion], pins: Mapping[str, int]) -> None:
        self._pins = pins
        self._there = candidates(found, pins)
        self._broken: dict[ModelVersion, BrokenVersion] = {}
        self._mended: frozenset[ModelVersion] = frozenset()

    @property
    def names(self) -> list[str]:
        """The models that are there or pinned, sorted."""
        return list(self._there)

    @property
    def tried(self) -> list[BrokenVersion]:
        """The versions that are there and broken."""
        return list(self._broken.values())

    @property
    def missing(self) -> list[BrokenVersion]:
        """The pinned versions that were there and are not any more."""
        return [
            BrokenVersion(
                ModelVersion(name, version, Path()),
                f"Expected version {version} of model {name!r}, which is pinned. Received: none, since it was taken "
                "away. Put it back, or pin another and start the service again.",
            )
            for name, version in self._pins.items()
            if not self._there[name]
        ]

    def take(self, seen: Seen) -> None:
        """Take over what a look at the disk saw."""
        before = self.missing
        self._there = in_order(seen.versions, self._pins)
        self._broken = {version: broken for version, broken in self._broken.items() if self.has(version)}
        self._mended = seen.mended
        for broken in self.missing:
            if broken not in before:
                logger.error("error: %s", broken.reason)

    def has(self, version: ModelVersion) -> bool:
        """Whether a version is there, and allowed."""
        return version in self._there.get(version.name, [])

    def to_try(self, name: str, served: ModelVersion | None) -> list[ModelVersion]:
        """Return the versions of a model that should be served rather than the one that is, in order."""
        versions = self._there.get(name, [])
        newer = versions[: versions.index(served)] if served in versions else versions
        return [version for version in newer if version not in self._broken or version in self._mended]

    def what_was(self, version: ModelVersion) -> BrokenVersion | None:
        """Return what became of a version when it was last tried; None where it was not, or passed."""
        return self._broken.get(version)

    def note(self, version: ModelVersion, broken: BrokenVersion | None) -> None:
        """Note what became of a version."""
        self._mended -= {version}
        self._broken.pop(version, None)
        if broken:
            self._broken[version] = broken
