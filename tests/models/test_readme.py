"""Every block of the README is run, in order, in one folder, as a reader would; what it shows is what comes out.

Numbers differ between machines and runs, so `#` stands for each; `...` stands for any lines.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
TIMEOUT_S = 240


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a console block with the lines shown for it; what make runs shows commands of its own."""
    if block.startswith("$ make"):
        command, *shown = block.removeprefix("$ ").splitlines()
        yield command, shown
        return
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


def normal(line: str) -> str:
    # Where two answers differ most, and whether they do at all, is the machine's business, as are its processors.
    line = re.sub(r"^(threads of a run: \d+, for ).*", r"\1", line)
    return re.sub(r"(# ?)+", "#", NUMBER.sub("#", re.sub(r", most at \[[0-9, ]+\]", "", line))).strip()


def assert_shown(shown: list[str], printed: list[str]) -> None:
    """Check that the shown lines were printed in this order, without gaps but where `...` stands."""
    expected, actual = [normal(line) for line in shown], [normal(line) for line in printed]
    if "..." in shown:
        pattern = "".join(r"(.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in expected)
        assert re.fullmatch(pattern, "".join(f"{line}\n" for line in actual)), (expected, actual)
    else:
        assert actual == expected


class Reader:
    """Someone who types what the README says, in a folder with the shipped models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").mkdir()
        for file in (ROOT / "models").glob("*.*"):
            shutil.copy(file, folder / "models")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
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
