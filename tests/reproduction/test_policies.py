"""The evaluation of policies, on a tiny model, beside Keras's own."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import tiny

from bln_serve.artifact import sha256
from bln_serve.errors import UsageError
from bln_serve.export import data, freezing, saved_model
from bln_serve.export.selection import scoring
from bln_serve.statistics import ALL_POLICIES
from reproduction import policies

M = 5
GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(0.5, 1.5, size=(60, 6, 4)).astype(np.float32)
Y = GENERATOR.integers(0, 3, 60)
# Means of losses of magnitude 1 in float32, in another order of sums.
RTOL = 2e-5


@pytest.fixture(scope="module")
def subject() -> policies.Subject:
    model = tiny("MMMM", M, "tiny")
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    callee = saved_model.describe(model)
    labelled = {"validation": (X[:20], Y[:20]), "test": (X[20:], Y[20:])}
    rows = {name: data.read(rows, callee.signature, targets=True) for name, rows in labelled.items()}
    for name, count in (("calibration", 40), ("reference", M)):
        rows[name] = data.read(X[:count], callee.signature, targets=False)
    return policies.Subject(callee, scoring.scoring(model, None, None, []), M, rows)


def test_as_trained_is_what_keras_evaluates(subject: policies.Subject) -> None:
    found = policies.evaluate(subject, "as trained")
    assert [entry["policy"] for entry in found["entries"]] == [policy.code for policy in ALL_POLICIES]
    model = subject.callee.model
    for entry in found["entries"]:
        with freezing.applied(model, freezing.with_policies(model, entry["policy"])):
            model.make_test_function(force=True)
            for part, rows in (("validation", slice(20)), ("test", slice(20, None))):
                loss, accuracy = model.evaluate(X[rows], Y[rows], batch_size=M, verbose=0)
                np.testing.assert_allclose(entry[part]["loss"], loss, rtol=RTOL, err_msg=entry["policy"])
                assert entry[part]["accuracy"] == pytest.approx(accuracy)
    assert found["chosen"]["independent"] == "PPMM"
    losses = {entry["policy"]: entry["validation"]["loss"] for entry in found["entries"]}
    assert losses["PPMM"] != pytest.approx(losses["MMMM"])  # so that the comparison above could fail


def test_the_other_origins_store_something_else(subject: policies.Subject) -> None:
    trained, *others = (policies.evaluate(subject, origin) for origin in policies.ORIGINS)
    assert [len(found["entries"]) for found in others] == [12, 15]
    losses = [{one["policy"]: one["test"]["loss"] for one in found["entries"]} for found in (trained, *others)]
    assert losses[1]["MMMM"] != pytest.approx(losses[0]["MMMM"])
    assert losses[2]["PPMM"] != pytest.approx(losses[0]["PPMM"])


def test_rows_that_a_run_was_not_trained_on_are_refused(tmp_path: Path) -> None:
    generator, path = np.random.default_rng(1), tmp_path / "cifar10_20pct.npz"
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = generator.integers(0, 256, (100, 32, 32, 3), np.uint8)
        arrays[f"y_{part}"] = np.arange(100) % 10
    np.savez(path, **arrays)
    measured = {"name": "some-run", "recipe": "cifar10_cnn", "fraction": 0.2, "data": {"sha256": "0"}}
    with pytest.raises(UsageError, match="Expected the data that some-run was trained on"):
        policies.read_parts(measured, tmp_path)


def test_what_was_evaluated_of_another_model_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "KEPT", tmp_path)
    monkeypatch.setattr(policies, "RESULTS", tmp_path)
    measured = {"name": "some-run", "recipe": "cifar10_cnn"}
    path, found = policies.model_file(measured), tmp_path / "policies" / "some-run.json"
    for each in (path, found):
        each.parent.mkdir()
    assert policies.done(measured) == {}
    path.write_text("a model")
    found.write_text(json.dumps({"origins": {"as trained": {}}, "model_sha256": sha256(path)}))
    assert policies.done(measured) == {"as trained": {}}
    path.write_text("trained again")
    assert policies.done(measured) == {}
