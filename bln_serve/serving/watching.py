"""What lies at the settings' paths, looked at again and again: versions come, change while they are copied, and go.

A look is a listing of folders and so may take long, on a network's disk for ever: it is made in a thread. What cannot
be listed is taken to be as it was, since a disk that is away for a moment is no reason to unload a model.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bln_serve.errors import BlnServeError, UsageError
from bln_serve.repository import ModelVersion, Place, Stamp, check_name, place_of, stamp
from bln_serve.serving.loading import BrokenVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What one look saw.

    Attributes:
        versions: all that are there.
        mended: versions known to be broken whose files have changed since, and change no more.
    """

    versions: tuple[ModelVersion, ...]
    mended: frozenset[ModelVersion] = frozenset()


class Watch:
    """The paths and what lay there when they were last looked at. Not to be used by two threads at once.

    Args:
        paths: repositories, models' folders or versions' folders.

    Raises:
        ModelNotFoundError: nothing is under a path, or nothing that this process may read.
        UsageError: two paths hold the same version of a model, or a model's name cannot be in a URL.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places = [place_of(path) for path in paths]
        self._there = {place: place.versions() for place in self._places}
        self._versions = self._all()
        self._troubles: dict[Place | None, str] = {}
        self._changing: dict[ModelVersion, Stamp] = {}

    @property
    def versions(self) -> tuple[ModelVersion, ...]:
        """All versions, as last seen."""
        return self._versions

    def look(self, broken: Collection[BrokenVersion]) -> Seen:
        """Look again. What is wrong is logged when it begins and when it ends, and changes nothing.

        Args:
            broken: versions that were tried, to be tried again when their files have changed. A version that is being
                copied changes from look to look, and is left alone until it doesn't.
        """
        for place in self._places:
            try:
                self._there[place] = place.versions()
            except (OSError, BlnServeError) as error:
                self._trouble(place, f"{place.path} cannot be listed, and is taken to be as it was: {error}")
            else:
                self._trouble(place, None)
        try:
            self._versions = self._all()
        except UsageError as error:
            self._trouble(None, f"the models are taken to be as they were: {error}")
        else:
            self._trouble(None, None)
        return Seen(self._versions, frozenset(self._mended(broken)))

    def _all(self) -> tuple[ModelVersion, ...]:
        versions = tuple(version for place in self._places for version in self._there[place])
        _check(versions)
        return versions

    def _mended(self, broken: Collection[BrokenVersion]) -> list[ModelVersion]:
        now = {each.version: stamp(each.version.path) for each in broken}
        changed = {each.version: now[each.version] for each in broken if now[each.version] != each.stamp}
        before, self._changing = self._changing, changed
        return [version for version, its_stamp in changed.items() if before.get(version) == its_stamp]

    def _trouble(self, where: Place | None, sentence: str | None) -> None:
        before = self._troubles.pop(where, None)
        if sentence:
            self._troubles[where] = sentence
            if sentence != before:
                logger.error("error: %s", sentence)
        elif before:
            logger.info("%s", f"{where.path} can be listed again" if where else "the models are as the paths say again")


def _check(found: Iterable[ModelVersion]) -> None:
    seen: dict[tuple[str, int], ModelVersion] = {}
    for version in found:
        first = seen.setdefault((check_name(version.name), version.version), version)
        if first is not version:
            raise UsageError(
                f"Expected each version of a model at one path. Received: {version.name} version {version.version} "
                f"at {first.path} and {version.path}."
            )
