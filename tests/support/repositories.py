"""A model repository whose versions come and go while it is served."""

import shutil
from pathlib import Path

from support.artifacts import copy_of


class Repository:
    """Versions under an empty folder, copies of golden artifacts: put("digits_rnn", "digits/2").

    Args:
        golden: the artifacts to copy.
        path: the folder.
    """

    def __init__(self, golden: Path, path: Path) -> None:
        self._golden = golden
        self.path = path
        path.mkdir(exist_ok=True)

    def put(self, artifact: str, target: str) -> Path:
        """Put a version there as an export does, by a rename, and return its folder."""
        return self._stage(artifact, target).rename(self.path / target)

    def put_damaged(self, artifact: str, target: str, file: str = "model.onnx") -> Path:
        """Put a version there one of whose files lacks its end, as if it were still being copied."""
        damaged = self._stage(artifact, target)
        (damaged / file).write_bytes((damaged / file).read_bytes()[:-100])
        return damaged.rename(self.path / target)

    def mend(self, artifact: str, target: str) -> None:
        """Write all files of a version anew, in their places."""
        shutil.copytree(self._golden / artifact / "1", self.path / target, dirs_exist_ok=True)

    def _stage(self, artifact: str, target: str) -> Path:
        """Copy a version to where nobody who serves looks."""
        name, _, version = target.partition("/")
        (self.path / name).mkdir(exist_ok=True)
        return copy_of(self._golden / artifact / "1", self.path / name / f".{version}.staged")

    def take_away(self, target: str) -> None:
        """Take a version or a model away, by a rename, as the project's own command does."""
        path = self.path / target
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")))
