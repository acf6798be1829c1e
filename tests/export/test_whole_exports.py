"""Whole exports of models of several kinds: the artifact answers as Keras does, and says what it is."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from support import paper
from support.kinds import KINDS, TIME, WIDTH, M, with_random_weights
from support.models import bln, with_random_statistics

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.cli.verify import main as verify
from bln_serve.errors import MiniBatchError
from bln_serve.export import export
from bln_serve.signature import Arrays
from bln_serve.statistics import RowCoupling
from bln_serve.verification import Tolerance

RTOL = 1e-5  # the export's own tolerance; what each test measures is printed on failure


def request_for(artifact: Artifact, rows: int) -> Arrays:
    """Draw rows that the artifact takes."""
    generator = np.random.default_rng(rows)
    drawn = {}
    for spec in artifact.manifest.signature.inputs:
        shape, kind = (rows, *spec.shape[1:]), np.dtype(spec.dtype).kind
        low, high = spec.value_range or (0, 1)
        values = generator.normal(0.3, 1.2, shape) if kind == "f" else generator.integers(low, high + 1, shape)
        drawn[spec.name] = values.astype(spec.dtype)
    return drawn


def check_answers(artifact: Artifact, model: Any, rows: int, size: int, **named: int) -> None:
    """Compare a request with Keras, and let the command verify the artifact."""
    x = request_for(artifact, rows)
    given = [x[name] for name in (spec.name for spec in artifact.manifest.signature.inputs)]
    expected = model.predict(given[0] if len(given) == 1 else x, batch_size=size, verbose=0)
    answers = bln_serve.load(artifact.path).predict(x, **named)
    expected = expected if isinstance(expected, dict) else {"y": expected}
    answers = answers if isinstance(answers, dict) else {"y": answers}
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        difference = np.abs(answer - expected[name]).max() / np.abs(expected[name]).max()
        assert (answer.dtype, difference <= RTOL) == (expected[name].dtype, True), difference
    assert verify([str(artifact.path)]) == 0


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("subclassed", ["float32"]),
        ("inputs_and_outputs_as_dicts", ["float32", "int32"]),
        ("words_of_64_bits", ["int64"]),
        ("bln_on_bool", ["bool"]),
        ("bln_on_float16", ["float16"]),
    ],
)
def test_a_coupled_model(name: str, dtypes: list[str], tmp_path: Path) -> None:
    model = KINDS[name]("MMPP")
    artifact = export(model, tmp_path, name=name)
    manifest = artifact.manifest
    assert [spec.dtype for spec in manifest.signature.inputs] == dtypes
    assert (manifest.row_coupling, manifest.mini_batch_rows, manifest.several_mini_batches) == ("mini-batch", M, True)
    assert (manifest.min_mini_batch_rows, manifest.max_mini_batch_rows) == (2, M)
    check_answers(artifact, model, 3 * M + 2, M)


def test_time_folded_into_rows(tmp_path: Path) -> None:
    x = keras.Input((TIME, WIDTH), name="x")
    y = ops.reshape(bln(3 * TIME, "MMPP", "folded")(ops.reshape(x, (-1, WIDTH))), (-1, TIME, WIDTH))
    model = with_random_statistics(keras.Model(x, layers.Dense(2, name="y")(y), name="folded"))
    artifact = export(model, tmp_path)
    manifest = artifact.manifest
    assert [(layer.m, layer.rows_per_row, layer.slots) for layer in manifest.layers] == [(9, TIME, 3)]
    assert (manifest.mini_batch_rows, manifest.min_mini_batch_rows, manifest.max_mini_batch_rows) == (3, 1, 3)
    check_answers(artifact, model, 7, 3)
    check_answers(artifact, model, 4, 2, mini_batch_rows=2)
    with pytest.raises(MiniBatchError, match="at most 3 rows"):
        bln_serve.load(artifact.path).predict(request_for(artifact, 4), mini_batch_rows=4)


def test_time_folded_beside_layers_of_another_m_that_mean_the_same_rows(tmp_path: Path) -> None:
    model = KINDS["time_folded_into_rows"]("MMMM")
    artifact = export(model, tmp_path)
    assert [(layer.m, layer.default_rows) for layer in artifact.manifest.layers] == [(TIME * M, M), (M, M)]
    assert artifact.manifest.mini_batch_rows == M
    check_answers(artifact, model, 2 * M + 2, M)


def test_policies_and_m_that_differ(tmp_path: Path) -> None:
    model = KINDS["policies_and_m_that_differ"]("PMPM")
    artifact = export(model, tmp_path, mini_batch_rows=3)
    assert [(layer.policy, layer.m) for layer in artifact.manifest.layers] == [("PMPM", 4), ("PPMM", 6), ("PMPM", 25)]
    assert (artifact.manifest.statistics, artifact.manifest.max_mini_batch_rows) == ("mixed", 4)
    check_answers(artifact, model, 8, 3)
    check_answers(artifact, model, 8, 4, mini_batch_rows=4)


def test_without_bln(tmp_path: Path) -> None:
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.LayerNormalization()(layers.BatchNormalization()(layers.Dense(5, activation="gelu")(x)))
    model = with_random_weights(keras.Model(x, layers.Dense(2, name="y")(layers.GRU(3)(y)), name="plain"))
    artifact = export(model, tmp_path)
    assert (artifact.manifest.row_coupling, artifact.manifest.layers) == (RowCoupling.INDEPENDENT, ())
    check_answers(artifact, model, 11, 4)


@pytest.mark.parametrize("with_bln", [True, False])
def test_rows_that_another_operation_couples_are_cut(with_bln: bool, tmp_path: Path) -> None:
    x = keras.Input((WIDTH,), name="x")
    y = bln(M, "PPMM")(x) if with_bln else layers.Dense(5)(x)
    model = with_random_statistics(keras.Model(x, y - ops.mean(y, axis=0, keepdims=True), name="centered"))
    artifact = export(model, tmp_path, mini_batch_rows=3)
    manifest = artifact.manifest
    assert (manifest.row_coupling, manifest.several_mini_batches) == ("mini-batch", False)
    assert manifest.row_coupling_reason.startswith("ReduceMean")
    assert manifest.row_coupling_path[0] == "x"
    check_answers(artifact, model, 8, 3)
    check_answers(artifact, model, 8, 4, mini_batch_rows=4)


# The paper's own models


@pytest.mark.parametrize("policy", ["MMMM", "PPPP"])
def test_the_papers_cnn(policy: str, tmp_path: Path) -> None:
    model = paper.under(paper.cnn, policy)
    artifact = export(model, tmp_path)
    assert (artifact.manifest.mini_batch_rows, artifact.manifest.several_mini_batches) == (paper.M, True)
    check_answers(artifact, model, 2 * paper.M + 2, paper.M)


def test_the_papers_cnn_under_a_policy_that_needs_a_wider_tolerance(tmp_path: Path) -> None:
    # A stored mean beside a live variance: 1.1e-5 of max|y| apart at two rows, where the answers themselves move by
    # 6.7e-6 with weights moved in their last place.
    manifest = export(paper.under(paper.cnn, "PMPM"), tmp_path, tolerance=Tolerance(rtol=1e-4), force=True).manifest
    assert manifest.sensitivity is not None
    assert Tolerance().rtol / 4 < manifest.sensitivity < Tolerance().rtol
    assert max(check.difference / check.limit for check in manifest.checks if check.limit) <= 0.25


@pytest.fixture(scope="module")
def papers_rnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    model = paper.under(paper.rnn, "MMMM")
    return model, export(model, tmp_path_factory.mktemp("rnn"))


def test_the_papers_rnn_in_full_size(papers_rnn: tuple[Any, Artifact]) -> None:
    model, artifact = papers_rnn
    (words,) = artifact.manifest.signature.inputs
    assert (words.dtype, words.shape, words.value_range) == ("int32", (None, 80), (0, 19_999))
    assert artifact.manifest.notes == ()
    check_answers(artifact, model, paper.M + 2, paper.M)


def test_the_papers_rnn_holds_no_loop(papers_rnn: tuple[Any, Artifact]) -> None:
    import onnx

    _, artifact = papers_rnn
    operators = [node.op_type for node in onnx.load(artifact.onnx_path).graph.node]
    assert (operators.count("LSTM"), operators.count("Gather"), operators.count("Loop")) == (2, 1, 0)


def test_rows_that_are_cut_otherwise_are_seen(papers_rnn: tuple[Any, Artifact]) -> None:
    model, artifact = papers_rnn
    with pytest.raises(AssertionError):
        check_answers(artifact, model, 4, 2)
