"""bln-export at the terminal: what it prints, where, and with which exit code."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support.models import tiny
from support.stopped import WRITING, stopped

from bln_serve.cli import inspect as inspect_command
from bln_serve.cli.export import main
from bln_serve.export import decomposition
from bln_serve.manifest import Manifest, read_manifest

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
    assert all(line.startswith("ok   ") for line in lines[1:-4])
    assert re.fullmatch(
        r"took [0-9.]+ s: importing TensorFlow [0-9.]+, loading the model .*verifying [0-9.]+", lines[-3]
    )
    assert [lines[-4], *lines[-2:]] == [
        f"wrote {tmp_path}/tiny/1",
        "row coupling: mini-batch (bln1: batch mean and batch variance are live).",
        "Rows are taken in mini-batches of 5; each needs at least 2. To serve single rows: --statistics PPMM or "
        "--reference-batch DATA; --select DATA says what that costs.",
    ]


def test_the_way_to_single_rows_that_it_names_works(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--statistics", "PPMM") == 0
    assert capsys.readouterr().out.endswith("Requests may have any number of rows, and may be batched together.\n")


def test_json_is_the_manifest_and_nothing_else(model_file: Path, tmp_path: Path, capsys) -> None:
    assert run(model_file, tmp_path, "--json") == 0
    text = capsys.readouterr().out
    assert Manifest.from_json(text.encode()).name == "tiny"
    assert text == (tmp_path / "tiny" / "1" / "manifest.json").read_text()


def test_a_single_file_is_the_model_alone_and_explains_itself(model_file: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "deep" / "scores.onnx"
    assert run(model_file, path) == 0
    assert f"\nwrote {path}\n" in capsys.readouterr().out
    assert [each.name for each in path.parent.iterdir()] == ["scores.onnx"]
    texts = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert (texts["bln.row_coupling"], texts["bln.mini_batch_rows"]) == ("mini-batch", "5")
    assert [layer["policy"] for layer in json.loads(texts["bln.layers"])] == ["MMMM", "MMMM"]
    assert json.loads(texts["bln.inputs"])[0]["shape"] == [None, 6, 4]
    assert inspect_command.main([str(path)]) == 0
    assert "mini-batch" in capsys.readouterr().out


def test_a_single_file_is_not_replaced_unless_forced_and_has_no_version(
    model_file: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "scores.onnx"
    path.write_bytes(b"mine")
    assert run(model_file, path) == 1
    assert f"Expected no file at {path}. Received: one. Replace it with --force." in capsys.readouterr().err
    assert run(model_file, path, "--version", "2") == 2
    assert "Expected --version with a model repository." in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    assert run(model_file, path, "--force") == 0
    assert f"--force replaced {path}" in capsys.readouterr().out
    assert onnx.load(path).producer_name == "bln-serve"


def test_a_file_that_fails_its_verification_is_not_written(
    model_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(decomposition, "_sum", lambda parts, offset: decomposition._Affine(None, offset + 1))
    assert run(model_file, tmp_path / "scores.onnx") == 1
    assert "does not answer as Keras does, and was not kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"), [("names.txt", "cat\ndog\nno idea\n"), ("names.json", '["cat", "dog", "no idea"]')]
)
def test_labels_say_what_the_outputs_entries_mean(model_file: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert run(model_file, tmp_path / "models", "--labels", str(tmp_path / name)) == 0
    (spec,) = read_manifest(tmp_path / "models" / "tiny" / "1").signature.outputs
    assert spec.labels == ("cat", "dog", "no idea")


WRONG_LABELS = {
    "few.txt": (b"cat\ndog\n", r"last dimension of one output: 'score' float32 \(rows, 3\). Received: 2 labels."),
    "gap.txt": (b"cat\n\ndog\n", "Expected a label in each line of .*gap.txt. Received: 3 lines, some of them empty."),
    "empty.txt": (b"", "Received: 0 lines"),
    "numbers.json": (b"[1, 2, 3]", "a JSON list. Received: Expected `str`, got `int`"),
    "bytes.txt": (b"\xff", "one label a line, or a JSON list. Received: 'utf-8' codec"),
}


@pytest.mark.parametrize("name", [*WRONG_LABELS, "missing.txt"])
def test_labels_that_do_not_fit_are_refused(model_file: Path, tmp_path: Path, capsys, name: str) -> None:
    content, message = WRONG_LABELS.get(name, (None, "Received: .*No such file"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(model_file, tmp_path / "models", "--labels", str(tmp_path / name)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []


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
    with stopped(WRITING, signal.SIGSTOP, model_file, "-o", out) as command:
        assert list(out.glob("tiny/.1.*")), "it has begun to write"
        command.send_signal(signal.SIGTERM)
        command.send_signal(signal.SIGCONT)
        assert command.wait(60) == 128 + signal.SIGTERM
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
