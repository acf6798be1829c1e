"""bln-verify: an exported version that still answers as Keras did passes; every other one fails with a reason."""

from pathlib import Path

import pytest
from support.artifacts import NAMES, alter_weights, copy_of, edit_manifest, rehash

from bln_serve.artifact import ONNX_MODEL, SAMPLES, Artifact
from bln_serve.cli.verify import main
from bln_serve.verification import Tolerance


@pytest.fixture(params=NAMES)
def folder(golden_artifacts: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of each golden version in turn."""
    return copy_of(golden_artifacts / request.param / "1", tmp_path / request.param / "1")


@pytest.fixture
def tiny(golden_artifacts: Path, tmp_path: Path) -> Path:
    """A copy of one golden version."""
    return copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "1")


def test_a_golden_artifact_is_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    said = capsys.readouterr()
    artifact = Artifact.open(folder)
    first, *checks, last = said.out.splitlines()
    assert first == f"{artifact.manifest.name} version 1: {len(artifact.manifest.files)} files match their SHA-256"
    assert len(checks) == sum(len(sample.outputs) for sample in artifact.samples())
    assert all(line.startswith("ok ") for line in checks)
    assert last.startswith(f"verified: {len(checks)} answers equal Keras's, largest difference ")
    assert said.err == ""


def test_an_altered_file_fails_by_its_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alter_weights(folder)
    assert main([str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: Expected {folder / ONNX_MODEL} with SHA-256 ")
    assert "export the model again" in said.err
    assert said.out == ""


def test_an_altered_file_with_its_hash_made_right_fails_by_replay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alter_weights(folder)
    rehash(folder)
    assert main([str(folder)]) == 1
    said = capsys.readouterr()
    assert "files match their SHA-256" in said.out
    assert "\nFAIL sample " in said.out
    assert said.out.endswith("FAILED: this artifact does not answer as Keras did. Export the model again.\n")
    assert "verified" not in said.out


def test_a_model_that_no_longer_loads_fails_with_a_sentence(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / ONNX_MODEL).write_bytes(b"")
    rehash(tiny)
    assert main([str(tiny)]) == 1
    assert capsys.readouterr().err.startswith("error: ONNX Runtime cannot load the model: ")


def test_samples_that_cannot_be_read_fail_with_a_sentence(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / SAMPLES).write_bytes(b"")
    rehash(tiny)
    assert main([str(tiny)]) == 1
    assert capsys.readouterr().err.startswith("error: Expected requests with answers in ")


def test_an_unknown_file_is_reported_and_does_not_fail(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "notes.txt").write_text("mine")
    assert main([str(tiny)]) == 0
    assert "note: notes.txt is not in the manifest, and is not served\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tolerance", "shown"),
    [(Tolerance(rtol=1e-2), True), (Tolerance(atol=1e-3), True), (Tolerance(), False), (Tolerance(rtol=9e-6), False)],
)
def test_a_wider_tolerance_than_usual_is_shown(
    tiny: Path, capsys: pytest.CaptureFixture[str], tolerance: Tolerance, shown: bool
) -> None:
    edit_manifest(tiny, tolerance=tolerance)
    assert main([str(tiny)]) == 0
    said = f"under a wider tolerance than usual: rtol {tolerance.rtol:g}, atol {tolerance.atol:g}\n"
    assert (said in capsys.readouterr().out) is shown


def test_a_wrong_path_is_answered_with_what_is_expected_there(
    golden_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, received, way_out in (
        (golden_artifacts / "tiny_mpmm", "a folder with the versions 1.", f"{golden_artifacts / 'tiny_mpmm' / '1'}."),
        (golden_artifacts / "absent", "No such", "Make one with bln-export MODEL.keras."),
    ):
        assert main([str(path)]) == 1
        said = capsys.readouterr().err
        expected = f"error: Expected an exported version with a manifest.json at {path}. Received: {received}"
        assert said.startswith(expected)
        assert said.endswith(f"{way_out}\n")


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["--fast", "models/a/1"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: bln-verify" in capsys.readouterr().err


def test_help_says_what_the_path_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "models/NAME/VERSION" in capsys.readouterr().out
