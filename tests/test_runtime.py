"""Answers without TensorFlow: the samples' answers, each mini-batch by itself, and clear refusals."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.artifacts import NAMES, TOGETHER, alter_weights, copy_of, rehash

import bln_serve
from bln_serve.artifact import ONNX_MODEL, Artifact, Sample, write_samples
from bln_serve.errors import ArtifactError, IntegrityError, InvalidInputError, MiniBatchError, RunError
from bln_serve.runtime import Model, OnnxSession, as_array, replay
from bln_serve.verification import Tolerance, compare


def load(golden_artifacts: Path, name: str) -> Model:
    return bln_serve.load(golden_artifacts / name / "1", threads=1)


def draw(rows: int, seed: int = 0) -> np.ndarray:
    """Draw a request for the tiny models."""
    return np.random.default_rng(seed).normal(size=(rows, 6, 4)).astype(np.float32)


def same(expected: Any, actual: Any) -> bool:
    return compare("answers", expected, actual, Tolerance()).passed


@pytest.mark.parametrize("name", [*NAMES, *TOGETHER])
def test_predict_gives_the_answers_that_keras_gave(golden_artifacts: Path, name: str) -> None:
    model = load(golden_artifacts, name)
    samples = Artifact.open(golden_artifacts / name / "1").samples()
    assert len({next(iter(sample.inputs.values())).shape[0] for sample in samples}) >= 4
    for sample in samples:
        answers = model.predict(sample.inputs, mini_batch_rows=sample.mini_batch_rows)
        answers = answers if isinstance(answers, dict) else {next(iter(sample.outputs)): answers}
        for output, expected in sample.outputs.items():
            assert same(expected, answers[output])


@pytest.mark.parametrize("name", NAMES)
def test_replay_passes_with_a_check_for_each_sample_and_output(golden_artifacts: Path, name: str) -> None:
    artifact = Artifact.open(golden_artifacts / name / "1")
    report = replay(artifact, Model(artifact))
    assert report.passed, report.table()
    assert len(report.checks) == sum(len(sample.outputs) for sample in artifact.samples())


@pytest.mark.parametrize(("name", "rows", "sizes"), [("tiny_mpmm", 13, (5, 5, 3)), ("tiny_pppp", 9, (4, 4, 1))])
def test_mini_batches_alone_equal_the_same_ones_in_one_request(
    golden_artifacts: Path, name: str, rows: int, sizes: tuple[int, ...]
) -> None:
    model, x = load(golden_artifacts, name), draw(rows)
    together = model.predict(x)
    ends = np.cumsum(sizes)
    alone = np.concatenate([model.predict(x[end - size : end]) for size, end in zip(sizes, ends, strict=True)])
    np.testing.assert_array_equal(together, alone)
    assert model.cut(rows) == sizes


@pytest.mark.parametrize(("name", "size"), [("together_mpmm", 5), ("together_mpmm", 2), ("together_pppp", 4)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_several_mini_batches_in_one_run_each_get_what_they_get_alone(
    golden_artifacts: Path, name: str, size: int, count: int
) -> None:
    model, x = load(golden_artifacts, name), draw(size * count, seed=count)
    together = model.run_mini_batches({"x": x}, count)["score"]
    alone = model.run({"x": x}, (size,) * count)["score"]
    # The same additions in the same order, but perhaps in vectors of another length: a few units in the last place.
    assert np.abs(together - alone).max() <= 1e-6 * np.abs(alone).max()


def test_one_mini_batch_of_them_all_would_be_far_off(golden_artifacts: Path) -> None:
    model, x = load(golden_artifacts, "together_mpmm"), draw(10)
    together, merged = (model.run_mini_batches({"x": x}, count)["score"] for count in (2, 1))
    tolerance = model.manifest.tolerance.limit(together)
    assert np.abs(together - merged).max() > 100 * tolerance


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("together_mpmm", 3, "divides the 10 rows. Received: 3."),
        ("together_mpmm", 0, "divides the 10 rows. Received: 0."),
        ("together_mpmm", -2, "divides the 10 rows. Received: -2."),
        ("together_mpmm", 10, "at least 2 rows"),
        ("together_pppp", 2, "at most 4 rows"),
        ("tiny_two_inputs", 4, "divides the 10 rows. Received: 4."),
    ],
)
def test_a_wrong_number_of_mini_batches_is_refused_before_anything_runs(
    golden_artifacts: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int, message: str
) -> None:
    model = load(golden_artifacts, name)
    monkeypatch.setattr(OnnxSession, "run", None)
    with pytest.raises(MiniBatchError, match=message):
        model.run_mini_batches({"x": draw(10)}, count)


def test_independent_rows_need_no_mini_batches(golden_artifacts: Path) -> None:
    model = load(golden_artifacts, "digits_cnn")
    x = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    together, plain = model.run_mini_batches({"image": x}, 3), model.run({"image": x}, None)
    np.testing.assert_array_equal(together["logits"], plain["logits"])


def test_an_artifact_that_takes_one_mini_batch_a_run_says_so(golden_artifacts: Path) -> None:
    model = load(golden_artifacts, "tiny_mpmm")
    message = r"several mini-batches in one run. Received: tiny_mpmm version 1, which does not \(bln1: batch mean"
    with pytest.raises(RunError, match=message):
        model.run_mini_batches({"x": draw(10)}, 2)


def test_a_session_refuses_parts_that_are_not_equal(golden_artifacts: Path) -> None:
    session = OnnxSession(golden_artifacts / "together_mpmm" / "1" / ONNX_MODEL, threads=1)
    with pytest.raises(MiniBatchError, match="divides the 10 rows. Received: 4."):
        session.run({"x": draw(10)}, 4)


def test_other_mini_batches_change_nothing_and_other_rows_of_the_same_one_do(golden_artifacts: Path) -> None:
    model, x = load(golden_artifacts, "tiny_mpmm"), draw(10)
    answers = model.predict(x)
    elsewhere = np.concatenate([x[:5], draw(5, seed=1)])
    np.testing.assert_array_equal(model.predict(elsewhere)[:5], answers[:5])
    beside = np.concatenate([x[:4], draw(6, seed=1)])
    assert not same(answers[:4], model.predict(beside)[:4])


def test_mini_batch_rows_0_takes_all_rows_as_one_mini_batch(golden_artifacts: Path) -> None:
    model, x = load(golden_artifacts, "tiny_mpmm"), draw(10)
    as_one = model.predict(x, mini_batch_rows=0)
    np.testing.assert_array_equal(as_one, model.predict(x, mini_batch_rows=10))
    assert not same(as_one, model.predict(x))


def test_independent_models_ignore_mini_batch_rows(golden_artifacts: Path) -> None:
    model = load(golden_artifacts, "digits_cnn")
    x = np.random.default_rng(0).uniform(0, 16, (26, 8, 8))
    answers = model.predict(x)
    for rows in (None, 0, 1, 25, 26, 1000):
        np.testing.assert_array_equal(model.predict(x, mini_batch_rows=rows), answers)
    alone = np.concatenate([model.predict(row[None]) for row in x])
    assert same(answers, alone)


def test_too_few_rows_are_refused(golden_artifacts: Path) -> None:
    with pytest.raises(
        MiniBatchError, match=r"at least 2 rows \(bln1: .*live\)\. Received: 26 rows, .* leave 1\. To be"
    ):
        load(golden_artifacts, "digits_rnn").predict(np.zeros((26, 8, 8)))


def test_more_rows_than_slots_are_refused_and_the_graph_itself_would_refuse_them_too(golden_artifacts: Path) -> None:
    model = load(golden_artifacts, "tiny_pppp")
    with pytest.raises(MiniBatchError, match=r"at most 4 rows .* 4 slots\)\. Received: 5 rows with mini_batch_rows=5"):
        model.predict(draw(5), mini_batch_rows=0)
    with pytest.raises(RunError, match="ONNX Runtime refused a run of 5 rows: ."):
        model.run({"x": draw(5)}, None)


def test_several_inputs_and_outputs_go_by_name(golden_artifacts: Path) -> None:
    model = load(golden_artifacts, "tiny_two_inputs")
    answers = model.predict({"tokens": [[0, 1, 2, 3, 19]], "numbers": [[0.5, 1, 2]]})
    assert isinstance(answers, dict)
    assert {name: answer.shape for name, answer in answers.items()} == {"classes": (1, 3), "score": (1, 1)}
    with pytest.raises(InvalidInputError, match="Expected inputs by name: 'numbers' .*'tokens'"):
        model.predict([[0.5, 1, 2]])
    with pytest.raises(InvalidInputError, match="20 at index .* from 0 to 19"):
        model.predict({"tokens": [[0, 1, 2, 3, 20]], "numbers": [[0.5, 1, 2]]})


@pytest.mark.parametrize("value", [[[1.0], [1.0, 2.0]], [[[1.0]], [2.0]]])
def test_ragged_lists_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="Expected a rectangular array of numbers. Received: ."):
        as_array(value)


def test_lists_of_what_is_no_number_are_refused_by_the_signature(golden_artifacts: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"'x' to be float32 \(rows, 6, 4\). Received: shape \(1,\)"):
        load(golden_artifacts, "tiny_mpmm").predict(["six by four"])


def test_mini_batches_that_do_not_add_up_are_refused(golden_artifacts: Path) -> None:
    with pytest.raises(RunError, match=r"add up to 10 rows. Received: \(5, 4\)"):
        load(golden_artifacts, "tiny_mpmm").run({"x": draw(10)}, (5, 4))


def test_load_checks_hashes_before_anything_else(golden_artifacts: Path, tmp_path: Path) -> None:
    folder = copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "1")
    (folder / ONNX_MODEL).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"model\.onnx with SHA-256"):
        bln_serve.load(folder)
    rehash(folder)
    with pytest.raises(RunError, match="ONNX Runtime cannot load the model: ."):
        bln_serve.load(folder)


def test_load_refuses_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"an exported version with a manifest\.json at"):
        bln_serve.load(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_replay_fails_when_a_few_weights_are_off_by_one_percent(
    golden_artifacts: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_of(golden_artifacts / name / "1", tmp_path / "1")
    alter_weights(folder)
    rehash(folder)
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    assert not replay(artifact, Model(artifact)).passed


def test_replay_without_samples_has_not_passed(golden_artifacts: Path, tmp_path: Path) -> None:
    folder = copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "1")
    write_samples(folder, ())
    artifact = Artifact.open(folder)
    assert not replay(artifact, Model(artifact)).passed


def test_replay_fails_on_an_output_that_the_model_does_not_have(golden_artifacts: Path, tmp_path: Path) -> None:
    folder = copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "1")
    artifact = Artifact.open(folder)
    samples = artifact.samples()
    write_samples(folder, (*samples, Sample(samples[0].inputs, {"other": samples[0].outputs["score"]}, None)))
    (failure,) = replay(artifact, Model(artifact)).failures
    assert failure.worst == "no output 'other'"


def test_replay_uses_the_artifacts_own_tolerance(golden_artifacts: Path) -> None:
    artifact = Artifact.open(golden_artifacts / "digits_rnn" / "1")
    strict = replace(artifact, manifest=replace(artifact.manifest, tolerance=Tolerance(rtol=1e-9)))
    assert not replay(strict, Model(artifact)).passed


def test_a_session_takes_bytes_as_well_as_a_path(golden_artifacts: Path) -> None:
    path = golden_artifacts / "tiny_mpmm" / "1" / ONNX_MODEL
    inputs = {"x": draw(5)}
    answers = [OnnxSession(model, threads=1).run(inputs)["score"] for model in (path, path.read_bytes())]
    np.testing.assert_array_equal(*answers)


def output_of(program: str, **environment: str) -> str:
    """Return what a fresh interpreter prints."""
    clean = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_bln_serve_imports_neither_onnxruntime_nor_tensorflow() -> None:
    heavy = "{'onnxruntime', 'tensorflow', 'keras', 'onnx', 'fastapi', 'numpy'}"
    assert output_of(f"import sys, bln_serve; print(sorted({heavy} & set(sys.modules)))") == "[]"
    assert output_of("import sys, bln_serve; bln_serve.load; print('onnxruntime' in sys.modules)") == "True"


def test_the_runtime_needs_neither_tensorflow_nor_onnx() -> None:
    heavy = "{'tensorflow', 'keras', 'onnx', 'tf2onnx', 'fastapi'}"
    assert output_of(f"import sys, bln_serve.runtime; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_telemetry_is_off_unless_somebody_asked_for_it() -> None:
    program = "import os, bln_serve.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert output_of(program) == "1"
    assert output_of(program, ORT_DISABLE_TELEMETRY="0") == "0"


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bln_serve' has no attribute 'serve'"):
        _ = bln_serve.serve
    assert all(hasattr(bln_serve, name) for name in bln_serve.__all__)


RESIDENT = """
import sys
import numpy as np
import bln_serve

def resident_mib():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024

model = bln_serve.load(sys.argv[1], threads=1)
x = {name: np.zeros((int(sys.argv[2]), 8, 8), np.float32) for name in ["image"]}
one = {name: array[:1] for name, array in x.items()}
expected = model.run(one, None)["logits"]
before = resident_mib()
model.run(x, None)
kept = resident_mib()
getattr(model, sys.argv[3])(one, *([None] if sys.argv[3] == "run" else []))
assert (model.run(one, None)["logits"] == expected).all()
print(kept - before, resident_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="what is resident is read from Linux's /proc")
@pytest.mark.parametrize("after", ["trim", "run"])
def test_the_memory_of_a_large_run_goes_back_when_it_is_trimmed(golden_artifacts: Path, after: str) -> None:
    command = [sys.executable, "-c", RESIDENT, golden_artifacts / "digits_cnn" / "1", "20000", after]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept, left = map(float, printed.split())
    assert kept > 60
    assert (left < kept / 3) is (after == "trim"), "and a run that does not trim keeps it"
