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
        name, _, version = target.partition("/")
        (self.path / name).mkdir(exist_ok=True)
        stage = copy_of(self._golden / artifact / "1", self.path / name / f".{version}.staged")
        return stage.rename(self.path / name / version)

    def put_damaged(self, artifact: str, target: str, file: str = "model.onnx") -> Path:
        """Put a version there one of whose files lacks its end, as if it were still being copied."""
        name, _, version = target.partition("/")
        whole = self.put(artifact, f"{name}/{version}000000")
        path = whole / file
        path.write_bytes(path.read_bytes()[:-100])
        return whole.rename(self.path / name / version)

    def mend(self, artifact: str, target: str) -> None:
        """Write all files of a version anew, in their places."""
        shutil.copytree(self._golden / artifact / "1", self.path / target, dirs_exist_ok=True)

    def take_away(self, target: str) -> None:
        """Take a version or a model away, by a rename, as the project's own command does."""
        path = self.path / target
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")))
