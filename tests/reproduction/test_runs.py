"""The plan of runs: what is in it, what is skipped, what a run leaves. Nothing is trained here."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RUNS = Path(__file__).with_name("runs.py")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Any:
    """The module, with its folders elsewhere."""
    specification = importlib.util.spec_from_file_location("reproduction_runs", RUNS)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "reproduction_runs", module)  # dataclasses look for their module there
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    return module


def recipe_that(monkeypatch: pytest.MonkeyPatch, runs: Any, exits: int) -> list[list[str]]:
    """Put in place of the recipes one that writes what they write; return the commands that were given."""
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1])
        for name in ("cifar10_cnn.keras", "last.npz"):
            (folder / name).touch()
        (folder / "history.json").write_text(json.dumps({"fraction": 1.0, "test": {"loss": 1.5, "accuracy": 0.5}}))
        return subprocess.CompletedProcess(command, exits)

    monkeypatch.setattr(runs.subprocess, "run", run)
    return commands


def test_the_plan(runs) -> None:
    plan = list(runs.plan())
    assert len({run.name for run in plan}) == len(plan) == 45
    assert Counter((run.recipe, run.fraction, run.batch_size, run.order, run.epochs) for run in plan) == {
        ("cifar10_cnn", 0.2, 25, "same", 15): 15,
        ("cifar10_cnn", 0.2, 25, "reshuffled", 15): 15,
        ("cifar10_cnn", 0.2, 1, "same", 3): 3,
        ("imdb_rnn", 0.2, 25, "same", 2): 9,
        ("imdb_rnn", 1.0, 25, "same", 1): 3,
    }
    assert plan[0].name == "cifar10_cnn-20pct-m25-same-bln-s100"


def test_the_fraction_is_of_what_the_recipe_reads(runs) -> None:
    cnn, rnn = (next(run for run in runs.plan() if run.recipe == name) for name in ("cifar10_cnn", "imdb_rnn"))
    asked = {
        (run.recipe, data): command[command.index("--fraction") + 1]
        for run in (cnn, rnn)
        for data in (None, Path("data"))
        for command in [run.command(data)]
    }
    assert asked == {
        ("cifar10_cnn", None): "0.2",
        ("cifar10_cnn", Path("data")): "1.0",  # cifar10_20pct.npz holds that fifth alone
        ("imdb_rnn", None): "0.2",
        ("imdb_rnn", Path("data")): "0.2",
    }


def test_a_run_leaves_its_numbers_and_its_model_and_is_done_once(runs, monkeypatch) -> None:
    commands, run = recipe_that(monkeypatch, runs, exits=0), next(runs.plan())
    assert not run.is_done
    assert runs.carry_out(run, None)
    assert runs.carry_out(run, None)
    assert run.is_done
    assert len(commands) == 1
    assert json.loads(run.result.read_text()) == {
        "name": run.name,
        "fraction": 0.2,
        "test": {"loss": 1.5, "accuracy": 0.5},
    }
    assert not (run.folder / "last.npz").exists()
    assert (runs.KEPT / ".gitignore").read_text() == "*\n"


def test_a_run_that_fails_leaves_no_numbers_and_what_it_can_go_on_from(runs, monkeypatch, capsys) -> None:
    recipe_that(monkeypatch, runs, exits=1)
    run = next(runs.plan())
    assert not runs.carry_out(run, None)
    assert not run.result.exists()
    assert (run.folder / "last.npz").exists()
    assert f"{run.name}: failed, see {run.folder}" in capsys.readouterr().out


def test_data_that_is_not_there_is_named_before_anything_runs(runs, tmp_path, monkeypatch, capsys) -> None:
    commands = recipe_that(monkeypatch, runs, exits=0)
    (tmp_path / "cifar10_20pct.npz").touch()
    monkeypatch.setattr(sys, "argv", ["runs.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runs.main()
    assert f"Expected imdb_maxlen80.npz in {tmp_path}. Received: a folder without." in capsys.readouterr().err
    assert commands == []


def test_only_some(runs, tmp_path, monkeypatch, capsys) -> None:
    commands = recipe_that(monkeypatch, runs, exits=0)
    monkeypatch.setattr(sys, "argv", ["runs.py", "--only", "cifar10_cnn-20pct-m1-", "--jobs", "1"])
    monkeypatch.delenv("BLN_DATA", raising=False)
    assert runs.main() == 0
    assert len(commands) == 3
    assert capsys.readouterr().out.splitlines()[-1].endswith("3 of 3 runs are done")
