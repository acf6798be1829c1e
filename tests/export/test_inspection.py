"""bln-inspect: m, policy, usability and steps of every layer, before anything is exported."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from support.models import bln

from bln_serve.cli.inspect import main

HEADING = "  statistic         source  stored estimate"
MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def half_trained(tmp_path: Path) -> Path:
    """A model with three layers: trained on one full and one short batch, never trained, and of m = 1."""
    x = keras.Input((3,))
    trained, single = bln(4, "PPMM", "trained"), bln(1, "MMMM", "single")
    model = keras.Model(x, bln(4, "MMPP", "fresh")(single(trained(x))))
    data = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    trained(data, training=True)
    trained(data[:3], training=True)
    single(data[:1], training=True)
    model.save(tmp_path / "half.keras")
    return tmp_path / "half.keras"


def test_each_layer_is_shown_with_what_its_estimates_rest_on(half_trained: Path, capsys) -> None:
    assert main([str(half_trained)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "trained: m = 4, policy PPMM",
        HEADING,
        "  batch mean        stored  usable, 2 steps",
        "  batch variance    stored  usable, 2 steps",
        "  feature mean      live    usable, 1 to 2 steps",
        "  feature variance  live    usable, 1 to 2 steps",
        "single: m = 1, policy MMMM",
        HEADING,
        "  batch mean        live    usable, 1 step",
        "  batch variance    live    NOT usable: a batch variance cannot be estimated at m = 1",
        "  feature mean      live    usable, 1 step",
        "  feature variance  live    NOT usable: a feature variance cannot be estimated at m = 1",
        "fresh: m = 4, policy MMPP",
        HEADING,
        "  batch mean        live    NOT usable: the stored batch mean was never updated",
        "  batch variance    live    NOT usable: the stored batch variance was never updated",
        "  feature mean      stored  NOT usable: the stored feature mean was never updated",
        "  feature variance  stored  NOT usable: the stored feature variance was never updated",
        "what is not usable can be estimated from data: bln-export --calibrate DATA",
        "row coupling by BLN layers: mini-batch (single: batch mean and batch variance are live); "
        "of the whole model it is proved at export",
    ]


def test_json_holds_the_same(half_trained: Path, capsys) -> None:
    assert main([str(half_trained), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["row_coupling"] == "mini-batch"
    assert [layer["layer"]["m"] for layer in document["layers"]] == [4, 1, 4]
    assert document["layers"][0]["statistics"][2] == {
        "statistic": "feature_mean",
        "source": "mini-batch",
        "problem": None,
        "min_steps": 1,
        "max_steps": 2,
    }


def test_an_artifact_is_shown_from_its_manifest(golden_artifacts: Path, capsys) -> None:
    assert main([str(golden_artifacts / "tiny_pppp" / "1")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bln1: m = 4, policy PPPP",
        "bln2: m = 4, policy PPPP",
        "row coupling: positional (bln1: feature mean and feature variance are stored by slot)",
    ]


def test_the_shipped_models_estimates_are_usable(capsys) -> None:
    assert main([str(MODELS / "digits_cnn.keras")]) == 0
    said = capsys.readouterr().out
    assert "NOT usable" not in said
    assert "--calibrate" not in said


def test_what_is_no_model_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "none.keras")]) == 1
    assert capsys.readouterr().err.startswith("error: Expected a Keras model file. Received: ")
