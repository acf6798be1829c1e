"""bln-export at the terminal: what it prints, where, and with which exit code."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import tiny

from bln_serve.cli.export import main
from bln_serve.manifest import Manifest

COMMAND = [sys.executable, "-c", "import sys; from bln_serve.cli.export import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tiny.keras"
    tiny("MMMM", 5, "tiny").save(path)
    return path


def run(model: Path, out: Path, *options: str) -> int:
    return main([str(model), "-o", str(out), *options])


def test_the_last_lines_say_what_may_be_sent(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny version 1: 2 BLN layers, trained with m = 5, statistics MMMM"
    assert all(line.startswith("ok   ") for line in lines[1:-3])
    assert lines[-3:] == [
        f"wrote {tmp_path}/tiny/1",
        "row coupling: mini-batch (bln1: batch mean and batch variance are live).",
        "Rows are taken in mini-batches of 5; each needs at least 2. To serve single rows: --statistics PPMM.",
    ]


def test_the_way_to_single_rows_that_it_names_works(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--statistics", "PPMM") == 0
    assert capsys.readouterr().out.endswith("Requests may have any number of rows, and may be batched together.\n")


def test_json_is_the_manifest_and_nothing_else(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--json") == 0
    text = capsys.readouterr().out
    assert Manifest.from_json(text.encode()).name == "tiny"
    assert text == (tmp_path / "tiny" / "1" / "manifest.json").read_text()


def test_force_says_aloud_that_it_replaced(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path) == 0
    assert run(model_file, tmp_path, "--version", "1") == 1
    assert "that is already there. Give another --version" in capsys.readouterr().err
    assert run(model_file, tmp_path, "--version", "1", "--force") == 0
    assert f"--force replaced {tmp_path}/tiny/1" in capsys.readouterr().out


def test_a_wider_tolerance_is_said_aloud(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--tolerance", "1e-3") == 2
    assert "A wider one needs --force" in capsys.readouterr().err
    assert run(model_file, tmp_path, "--tolerance", "1e-3", "--force") == 0
    assert "note: --force allowed a wider tolerance than usual: rtol 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--statistics", "minibatch"], "population or mini-batch for all four"),
        (["--statistics", ""], "Received: ''"),
        (["--version", "0"], "Expected a version of 1 or more. Received: 0"),
        (["--opset", "0"], "Expected an opset from 18 to "),
        (["--name", "a/b"], "Expected a model name of letters"),
        (["--tolerance", "nan"], "Expected a tolerance of finite numbers"),
        (["--mini-batch-rows", "1"], "Expected --mini-batch-rows from 2 to any number"),
    ],
)
def test_wrong_usage(model_file: Path, tmp_path: Path, capsys, options: list[str], sentence: str) -> None:
    assert run(model_file, tmp_path, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert sentence in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_one_sentence(model_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run(model_file, tmp_path / "file") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_command_ended_half_way_leaves_nothing(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = subprocess.Popen([*COMMAND, model_file, "-o", out])
    try:
        while not list(out.glob("tiny/.1.*/*")):  # something is written, and it is not finished
            assert command.poll() is None, "ended before it was ended"
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 128 + signal.SIGTERM
    finally:
        if command.poll() is None:
            command.kill()
            command.wait()
    assert [path.name for path in out.rglob("*")] == []


def test_nothing_of_tensorflows_start_reaches_the_terminal(model_file: Path, tmp_path: Path) -> None:
    program = "import sys; from bln_serve.cli.export import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", program, model_file, "-o", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    assert json.loads(result.stdout)["name"] == "tiny"
