"""Every block of the README is run, in order, in one folder, as a reader would; what it shows is what comes out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.readme import assert_shown, blocks, commands, free_port

ROOT = Path(__file__).parents[2]
BLOCKS = blocks(ROOT / "README.md")
TIMEOUT_S = 240


class Reader:
    """Someone who types what the README says, in a folder with the shipped models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").mkdir()
        for file in (ROOT / "models").glob("*.*"):
            shutil.copy(file, folder / "models")
        self.port = str(free_port())
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self.environment["BLN_SERVE_PORT"] = self.port
        self.services: list[subprocess.Popen[str]] = []

    def type(self, command: str, shown: list[str]) -> None:
        if command.startswith("bln-serve"):
            assert shown[1:] in ([], ["..."])
            assert_shown(shown[:1], [self.serve(command)])
            return
        # make sets up an environment; the program it starts there is started here.
        if command == "make demo":
            for exported in (self.folder / "models").glob("*/"):  # as in a fresh clone
                shutil.rmtree(exported)
        command = command.replace("make demo", f"{sys.executable} models/demo.py").replace("8000", self.port)
        result = subprocess.run(
            command,
            shell=True,
            check=False,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert result.returncode == 0, result.stderr
        assert_shown(shown, result.stdout.splitlines())

    def serve(self, command: str) -> str:
        service = subprocess.Popen(
            command.split(), cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.services.append(service)
        assert service.stdout
        line = service.stdout.readline()
        while "serving" not in service.stdout.readline():
            assert service.poll() is None
        return line.rstrip()

    def leave(self) -> None:
        for service in self.services:
            service.terminate()
            service.communicate(timeout=TIMEOUT_S)


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="the README's request is made with curl, which is not installed"
)
def test_every_block_does_what_it_shows(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    try:
        for kind, block in BLOCKS:
            if kind == "python":
                subprocess.run(
                    [sys.executable, "-c", block], cwd=tmp_path, env=reader.environment, check=True, timeout=TIMEOUT_S
                )
            else:
                for command, shown in commands(block):
                    reader.type(command, shown)
    finally:
        reader.leave()


def test_the_readme_has_blocks_of_both_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"console", "python"}


@pytest.mark.parametrize(
    "printed", [["accuracy 0.98"], ["accuracy 0.98", "moved 0", "more"], ["Accuracy 0.97", "moved 0"]]
)
def test_the_comparison_can_fail(printed: list[str]) -> None:
    assert_shown(["accuracy 0.97", "..."], ["accuracy 0.98", "a", "b"])
    with pytest.raises(AssertionError):
        assert_shown(["accuracy 0.97", "moved 0"], printed)
    with pytest.raises(AssertionError):
        assert_shown(["accuracy 0.97", "...", "lost"], printed)


def test_the_first_30_lines_show_what_it_is_and_two_commands_with_their_output() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert all(command in first for command in ("$ bln-export ", "$ bln-serve ", "row coupling: ", '"predictions"'))


def test_every_option_of_the_export_is_in_the_readme() -> None:
    from bln_serve.cli.export import _parser

    text = (ROOT / "README.md").read_text()
    options = [option for action in _parser()._actions for option in action.option_strings[-1:]]
    assert [option for option in options if option not in text and option not in ("--help", "--out")] == []
