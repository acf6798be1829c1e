"""Models that the reference implementation trained give the reference's answers, in Keras and as artifacts."""

from pathlib import Path

import keras
import numpy as np
import pytest
from support.reference_files import FULL, LEGACY, paper_cnn

import bln_serve
from bln_serve.cli.export import main
from bln_serve.errors import ModelLoadError, UnusableStatisticsError, UsageError
from bln_serve.export import export
from bln_serve.export.loading import load
from bln_serve.layers import bln_layers
from bln_serve.statistics import ALL_POLICIES, RowCoupling, StatisticsPolicy

# Of the largest logit. Keras 2.15 computed in float32 with another order of summation; 6e-7 was measured.
RTOL = 1e-5

FILES = [
    ("cnn_bs25_full_noopt.h5", None, 25),
    ("cnn_bs25_best_model.h5", None, 25),
    ("cnn_bs25_full_tf21style_SYNTHETIC.h5", None, 25),
    ("cnn_bs25_full.keras", None, 25),
    ("cnn_bs25_weights.h5", paper_cnn, 25),
    ("cnn_bs25_best_model.h5", paper_cnn, 25),
    ("cnn_bs1_weights.h5", lambda: paper_cnn(1), 1),
]


def golden(m: int) -> dict[str, np.ndarray]:
    with np.load(LEGACY / f"cnn_bs{m}_golden.npz") as stored:
        return {name: stored[name] for name in ("x_eval", "logits", "configs")}


def assert_same(received: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(received, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def predict(model, policy: StatisticsPolicy, x: np.ndarray, m: int) -> np.ndarray:
    for layer in bln_layers(model):
        layer.policy = policy
    return np.concatenate([np.asarray(model(rows, training=False)) for rows in np.split(x, len(x) // m)])


@pytest.mark.parametrize(("file", "architecture", "m"), FILES, ids=[f"{file}-{a and 'given'}" for file, a, _ in FILES])
def test_all_policies_give_the_recorded_logits(file: str, architecture, m: int) -> None:
    recorded = golden(m)
    model = load(LEGACY / file, architecture)
    compared = 0
    for policy, logits in zip(ALL_POLICIES, recorded["logits"], strict=True):
        if np.isfinite(logits).all():
            assert_same(predict(model, policy, recorded["x_eval"], m), logits)
            compared += 1
    assert compared == (16 if m > 1 else 8)


def test_the_recorded_policies_are_in_our_order_and_tell_apart() -> None:
    recorded = golden(25)
    letters = [str(config).replace("T", "P").replace("F", "M") for config in recorded["configs"]]
    assert letters == [policy.code for policy in ALL_POLICIES]
    logits = recorded["logits"]
    for one in range(16):
        for other in range(one):
            with pytest.raises(AssertionError):
                assert_same(logits[one], logits[other])


@pytest.mark.parametrize("policy", ["PPPP", "PPMM", "MMMM"])
def test_the_artifact_gives_the_recorded_logits(policy: str, tmp_path: Path) -> None:
    recorded = golden(25)
    artifact = export(FULL, tmp_path, name="cnn", statistics=policy)
    logits = recorded["logits"][[item.code for item in ALL_POLICIES].index(policy)]
    assert_same(bln_serve.load(artifact.path).predict(recorded["x_eval"]), logits)


def test_the_command_exports_weights_into_the_architecture_that_a_function_of_the_users_builds(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "my_model.py").write_text(
        "from support.reference_files import paper_cnn\n\n\ndef make():\n    return paper_cnn(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    recorded = golden(1)
    weights = str(LEGACY / "cnn_bs1_weights.h5")
    assert main([weights, "-o", "models", "--architecture", "my_model:make", "--statistics", "PMPM"]) == 0
    assert "trained with m = 1, statistics PMPM" in capsys.readouterr().out
    answers = bln_serve.load(tmp_path / "models" / "cnn_bs1_weights" / "1").predict(recorded["x_eval"])
    assert_same(answers, recorded["logits"][[item.code for item in ALL_POLICIES].index("PMPM")])


def test_the_architecture_may_be_a_keras_file(tmp_path: Path) -> None:
    paper_cnn().save(tmp_path / "cnn.keras")
    model = load(LEGACY / "cnn_bs25_weights.h5", tmp_path / "cnn.keras")
    recorded = golden(25)
    assert_same(predict(model, ALL_POLICIES[-1], recorded["x_eval"], 25), recorded["logits"][-1])


def test_a_loaded_model_saves_and_loads_as_keras_3(tmp_path: Path) -> None:
    load(FULL).save(tmp_path / "new.keras")
    recorded = golden(25)
    model = load(tmp_path / "new.keras")
    assert_same(predict(model, ALL_POLICIES[0], recorded["x_eval"], 25), recorded["logits"][0])


def test_variances_at_one_row_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnusableStatisticsError, match="bn1: the stored batch variance holds NaN or infinity"):
        export(LEGACY / "cnn_bs1_weights.h5", tmp_path, architecture=lambda: paper_cnn(1), statistics="PPPP")


@pytest.mark.parametrize("policy", ["PPMM", "PPPP"])
def test_calibration_repairs_what_was_trained_on_single_rows(policy: str, tmp_path: Path) -> None:
    recorded = golden(1)
    artifact = export(
        LEGACY / "cnn_bs1_weights.h5", tmp_path, architecture=lambda: paper_cnn(1), statistics=policy,
        calibrate=recorded["x_eval"],
    )  # fmt: skip
    assert artifact.manifest.row_coupling is RowCoupling.INDEPENDENT
    answers = bln_serve.load(artifact.path).predict(recorded["x_eval"])
    live = recorded["logits"][[item.code for item in ALL_POLICIES].index("MMMM")]
    assert np.isfinite(answers).all()
    if policy == "PPMM":  # The batch branch weighs 1e-4 at m = 1, each of four layers.
        assert np.abs(answers - live).max() < 1e-2 * np.abs(live).max()


def test_weights_alone_ask_for_an_architecture() -> None:
    with pytest.raises(ModelLoadError, match=r"a file of weights, or of something else\. Name the model .*--architect"):
        load(LEGACY / "cnn_bs25_weights.h5")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: paper_cnn(5),
            r"Expected statistics of m = 5 slots in layer 'bn1'\. Received: 25\. Give the architect",
        ),
        (lambda: paper_cnn(25, 7), r"Expected kernel of layer 'dense3' in shape \(84, 7\)\. Received: \(84, 10\)"),
        (
            lambda: keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="other")]),
            r"Expected weights for the layers other\. Received: weights for .*bn1",
        ),
    ],
    ids=["m", "shape", "layers"],
)
def test_another_architecture_is_refused(make, sentence: str) -> None:
    with pytest.raises(ModelLoadError, match=sentence):
        load(LEGACY / "cnn_bs25_weights.h5", make)


def broken() -> None:
    raise RuntimeError("no such data")


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("nothing", r"Expected an architecture as model\.keras or module:function\. Received: 'nothing'"),
        ("no_such_module:make", r"module no_such_module to import\. It raised: ModuleNotFoundError"),
        ("json:no_such_function", "Expected a function no_such_function in module json. Received: None"),
        ("json:JSONEncoder", "to return a built Keras model. Received: JSONEncoder"),
        (broken, r"to return a model\. It raised: RuntimeError\('no such data'\)"),
        (lambda: keras.Sequential([keras.layers.Dense(1)]), "to return a built Keras model. Received: Sequential"),
    ],
    ids=["no colon", "no module", "no function", "no model", "raises", "not built"],
)
def test_an_architecture_that_cannot_be_had(architecture, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load(LEGACY / "cnn_bs25_weights.h5", architecture)


@pytest.mark.parametrize("source", [LEGACY / "cnn_bs25_full.keras", "model"])
def test_only_an_h5_file_takes_an_architecture(source, tmp_path: Path) -> None:
    model = paper_cnn() if source == "model" else source
    with pytest.raises(
        UsageError, match=r"Expected --architecture with an \.h5 file\. Received: .*, which has its own"
    ):
        export(model, tmp_path, name="cnn", architecture=paper_cnn)
    assert not any((tmp_path / "cnn").glob("[0-9]*"))


def test_the_folder_searched_for_the_users_module_is_searched_no_longer(tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(UsageError, match="to import"):
        load(LEGACY / "cnn_bs25_weights.h5", "no_such_module:make")
    assert sys.path == before
