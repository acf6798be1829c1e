"""An export that ends too early: by an error, a signal, SIGKILL at any moment, or a full disk.

Nothing half written is ever seen, nothing is lost, and the next export clears away what the last one left.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.artifacts import copy_of
from support.models import tiny
from support.server import DEADLINE_S, ROOT
from support.stopped import BETWEEN_THE_RENAMES, LOADING, WRITING, stopped
from support.versions import INDEPENDENT, MINI_BATCH, killed_between_the_renames, manifest, publish, truths

from bln_serve.artifact import Artifact
from bln_serve.cli.export import main
from bln_serve.errors import ArtifactError, ArtifactExistsError
from bln_serve.export import deployment, export, making
from bln_serve.export.staging import put_in_place, staging
from bln_serve.repository import versions_in


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def batching(folder: Path) -> bool:
    return "max_batch_size: 0" not in (folder / "config.pbtxt").read_text()


# By an error, in this process.


def test_a_version_appears_whole_and_only_when_it_is_put_in_place(tmp_path: Path) -> None:
    target = tmp_path / "name" / "1"
    with staging(target) as stage:
        (stage / "a").write_text("a")
        assert not target.exists()
        assert stage.parent == target.parent
        assert not stage.name.isdigit()
        put_in_place(stage, target, replace=False)
    assert entries(target.parent) == ["1"]
    assert (target / "a").read_text() == "a"
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_half_written_is_left_on_an_error(tmp_path: Path, error: BaseException, replaced: bool) -> None:
    target = tmp_path / "name" / "1"
    if replaced:
        target.mkdir(parents=True)
        (target / "old").write_text("old")

    def break_off() -> None:
        with staging(target) as stage:
            (stage / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        break_off()
    if replaced:
        assert (entries(target.parent), entries(target)) == (["1"], ["old"])
    else:
        assert entries(tmp_path) == []


def written(target: Path, *names: str) -> None:
    target.mkdir(parents=True)
    for name in names:
        (target / name).write_text(name)


def test_replacing_swaps_the_whole_folder(tmp_path: Path) -> None:
    written(tmp_path / "1", "old")
    with staging(tmp_path / "1") as stage:
        (stage / "new").write_text("new")
        put_in_place(stage, tmp_path / "1", replace=True)
    assert (entries(tmp_path), entries(tmp_path / "1")) == (["1"], ["new"])


def test_replacing_what_is_not_there_just_writes_it(tmp_path: Path) -> None:
    with staging(tmp_path / "1") as stage:
        put_in_place(stage, tmp_path / "1", replace=True)
    assert entries(tmp_path) == ["1"]


def test_the_old_version_comes_back_if_the_new_cannot_take_its_place(tmp_path: Path) -> None:
    written(tmp_path / "1", "old")
    with staging(tmp_path / "1") as stage:
        stage.rmdir()
        with pytest.raises(FileNotFoundError):
            put_in_place(stage, tmp_path / "1", replace=True)
    assert (entries(tmp_path), entries(tmp_path / "1")) == (["1"], ["old"])


def test_a_version_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with staging(tmp_path / "1") as stage:
        (stage / "mine").write_text("mine")
        written(tmp_path / "1", "theirs")
        with pytest.raises(ArtifactExistsError, match="no version at .* Received: one that is already there"):
            put_in_place(stage, tmp_path / "1", replace=False)
    assert (entries(tmp_path), entries(tmp_path / "1")) == (["1"], ["theirs"])


def test_another_failure_of_the_renaming_keeps_its_own_name(tmp_path: Path) -> None:
    with staging(tmp_path / "1") as stage:
        stage.rmdir()
        with pytest.raises(FileNotFoundError):
            put_in_place(stage, tmp_path / "1", replace=False)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}], ids=["old away", "new in place", "new in place, old back"])
def test_the_old_version_survives_whatever_interrupts_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: set[int]
) -> None:
    publish(tmp_path, MINI_BATCH, 1)
    renames = []

    def interrupted(source: Path, target: Path) -> None:
        if str(target).endswith((".old", "/1")):
            renames.append(target)
            if len(renames) - 1 in failing:
                raise error
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(type(error)):
        publish(tmp_path, INDEPENDENT, 1, force=True)
    monkeypatch.undo()
    assert not batching(tmp_path)  # it covers the old version also while that is away
    deployment.sweep(tmp_path)
    assert (truths(tmp_path), batching(tmp_path)) == ([MINI_BATCH], False)
    assert entries(tmp_path) == [".lock", "1", "config.pbtxt"]


# By SIGKILL, at each step that it takes in the filesystem once its files are written.

OPERATIONS = {
    "export": ([INDEPENDENT], [INDEPENDENT, MINI_BATCH]),
    "first export": ([], [MINI_BATCH]),
    "replace": ([MINI_BATCH], [INDEPENDENT]),
    "replace by a coupled one": ([INDEPENDENT], [MINI_BATCH]),
    "remove": ([INDEPENDENT], []),
    "sweep": ([MINI_BATCH], [MINI_BATCH]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whenever_it_is_killed_nothing_is_half_done(operation: str, tmp_path: Path) -> None:
    run_killed(operation, tmp_path)
    before, after = OPERATIONS[operation]
    steps = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    away = 0
    for folder in (step / "tiny" for step in steps):
        seen = truths(folder)
        away += not seen and bool(before) and bool(after)
        assert seen in (before, after, []), folder
        assert not set(seen) - {INDEPENDENT} or not batching(folder), folder
        deployment.sweep(folder)
        assert truths(folder) in (before, after), folder
        assert {name for name in entries(folder) if name.startswith(".")} <= {".lock"}, folder
        assert not truths(folder) or batching(folder) == (set(truths(folder)) == {INDEPENDENT}), folder
    assert truths(steps[-1] / "tiny") == after
    # The one moment without the version: between the two renames of a replacement, until the sweep brings it back.
    assert (away > 0) == (operation in ("replace", "replace by a coupled one", "sweep"))


def run_killed(operation: str, out: Path) -> None:
    command = [sys.executable, "-m", "support.killed", operation, out]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def test_the_check_of_killed_operations_can_fail(tmp_path: Path) -> None:
    run_killed("replace", tmp_path)
    left = [entries(step / "tiny") for step in tmp_path.iterdir()]
    assert any(name.endswith(".old") for names in left for name in names)
    assert any(name.startswith(".config.pbtxt.") for names in left for name in names)
    assert [] in [truths(step / "tiny") for step in tmp_path.iterdir()]


# By SIGKILL, the real command.


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tiny.keras"
    tiny("MMMM", 5, "tiny").save(path)
    return path


@pytest.fixture(scope="module")
def exported(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one coupled version, to be copied."""
    repository = tmp_path_factory.mktemp("exported")
    export(model_file, repository)
    return repository


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    return copy_of(exported, tmp_path / "models")


@pytest.mark.parametrize("moment", [LOADING, WRITING, BETWEEN_THE_RENAMES])
def test_the_next_export_clears_away_what_a_killed_one_left(moment: str, model_file: Path, repository: Path) -> None:
    folder = repository / "tiny"
    before = (folder / "1" / "manifest.json").read_bytes()
    options = ["--version", "1", "--force", "--statistics", "PPMM"]
    with stopped(moment, signal.SIGKILL, model_file, "-o", repository, *options) as process:
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    assert [name for name in entries(folder) if name.startswith(".1.")]
    assert versions_in(folder) == ([] if moment == BETWEEN_THE_RENAMES else [1])
    assert not batching(folder)
    assert main([str(model_file), "-o", str(repository), "--version", "2", "--statistics", "PPMM"]) == 0
    assert entries(folder) == [".lock", "1", "2", "config.pbtxt"]
    assert (folder / "1" / "manifest.json").read_bytes() == before
    assert not batching(folder)
    for version in ("1", "2"):
        Artifact.open(folder / version).check_hashes()


def test_an_export_that_still_runs_is_left_alone(model_file: Path, repository: Path) -> None:
    folder = repository / "tiny"
    killed_between_the_renames(folder, INDEPENDENT, 1)
    with stopped(WRITING, signal.SIGSTOP, model_file, "-o", repository, "--version", "7") as running:
        (stage,) = folder.glob(".7.????????")
        written = entries(stage)
        deployment.sweep(folder)
        publish(folder, INDEPENDENT, 3)
        deployment.remove(folder / "3")
        assert (entries(stage), versions_in(folder)) == (written, [1])
        running.send_signal(signal.SIGCONT)
        assert (running.communicate(timeout=DEADLINE_S)[1], running.returncode) == ("", 0)
    assert entries(folder) == [".lock", "1", "7", "config.pbtxt"]
    Artifact.open(folder / "7").check_hashes()


def test_a_sweep_waits_for_whoever_puts_a_version_in_place(tmp_path: Path) -> None:
    publish(tmp_path, MINI_BATCH, 1)
    killed_between_the_renames(tmp_path, INDEPENDENT, 1)
    sweeping = threading.Thread(target=deployment.sweep, args=[tmp_path])
    with FileLock(tmp_path / ".lock"):
        sweeping.start()
        sweeping.join(0.3)
        assert versions_in(tmp_path) == []
    sweeping.join()
    assert truths(tmp_path) == [MINI_BATCH]


def test_where_nothing_was_left_a_sweep_makes_nothing(tmp_path: Path) -> None:
    deployment.sweep(tmp_path / "tiny")
    (tmp_path / ".1.notes").mkdir()
    (tmp_path / ".hidden").write_text("")
    deployment.sweep(tmp_path)
    assert entries(tmp_path) == [".1.notes", ".hidden"]


# By a full disk.

FULL_AT = """
import resource, sys
limit = int(sys.argv.pop(1))
from bln_serve.cli.export import main
from bln_serve.export import saved_model
write = saved_model.write

def limited(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    write(*arguments, **options)

saved_model.write = limited
sys.exit(main())
"""


def test_a_disk_that_is_full_for_tensorflow_is_one_sentence(model_file: Path, repository: Path) -> None:
    before = sorted(repository.rglob("*"))
    command = [sys.executable, "-c", FULL_AT, "40000", model_file, "-o", repository, "--statistics", "PPMM"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(f"error: Expected room on the disk for {repository}/tiny/2. Received: ")
    assert "File too large" in sentence
    assert sentence.endswith("Nothing was kept: free some space and export again.")
    assert sorted(repository.rglob("*")) == before


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_us_is_one_sentence(
    model_file: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    monkeypatch.setattr(making, "write_samples", no_space)
    assert main([str(model_file), "-o", str(repository), "--version", "1", "--force", "--statistics", "PPMM"]) == 1
    assert "Expected room on the disk for" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_a_disk_too_full_for_the_config_keeps_the_version_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    monkeypatch.setattr(deployment, "write_atomically", no_space)
    with pytest.raises(ArtifactError, match="Expected room on the disk for .*/2. Received: .*No space left"):
        publish(tmp_path, MINI_BATCH, 2)
    assert (truths(tmp_path), batching(tmp_path)) == ([INDEPENDENT], True)
    assert entries(tmp_path) == [".lock", "1", "config.pbtxt"]


def test_a_disk_too_full_to_relax_the_config_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    publish(tmp_path, MINI_BATCH, 2)
    monkeypatch.setattr(deployment, "write_atomically", no_space)
    with pytest.raises(ArtifactError, match="Expected to write .*pbtxt anew. Received: .* The versions are in their"):
        deployment.remove(tmp_path / "2")
    assert (truths(tmp_path), batching(tmp_path)) == ([INDEPENDENT], False)
    monkeypatch.undo()
    with deployment.publishing(tmp_path, manifest(INDEPENDENT, 3)):
        pass
    assert batching(tmp_path)


def test_another_error_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="not yours"), staging(tmp_path / "tiny" / "1"):
        raise PermissionError("not yours")
    assert entries(tmp_path) == []
