"""Whole exports of models whose slots are pooled: any number of rows, each alone where nothing is live over them."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from support.models import bln, one_layer, tiny, with_random_statistics

import bln_serve
from bln_serve.cli.verify import main as verify
from bln_serve.errors import MiniBatchError, ParityError, UnsupportedModelError
from bln_serve.export import conversion, export, freezing, marking, saved_model
from bln_serve.export.pipeline import export_onnx
from bln_serve.layers import bln_layers
from bln_serve.manifest import MINI_BATCHES, read_manifest
from bln_serve.statistics import RowCoupling

M = 5
STEPS = np.array([7.0, 7.0, 6.0, 2.0, 0.0])  # the last slot was never updated
RTOL = 1e-5  # the export's own tolerance


def pooled(model: Any, steps: np.ndarray = STEPS) -> Any:
    for layer in bln_layers(model):
        layer.feature_slots = "pool"
        layer.slot_steps.assign(steps)
    return model


def rows_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(0.3, 1.2, (rows, 6, 4)).astype(np.float32)


def off_by(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("policy", ["PPPP", "PPPM", "PPMP"])
def test_independent_rows(policy: str, tmp_path: Path) -> None:
    model = pooled(tiny(policy, M, "tiny"))
    artifact = export(model, tmp_path)
    manifest = read_manifest(artifact.path)
    assert (manifest.row_coupling, manifest.rule, manifest.max_mini_batch_rows) == (RowCoupling.INDEPENDENT, None, None)
    assert [(layer.policy, layer.m, layer.pooled) for layer in manifest.layers] == [(policy, M, True)] * 2
    assert not manifest.several_mini_batches
    assert MINI_BATCHES not in {value.name for value in onnx.load(artifact.onnx_path).graph.input}
    served = bln_serve.load(artifact.path)
    for rows in (1, M - 1, M, M + 1, 3 * M + 2):
        assert off_by(served.predict(rows_of(rows)), model.predict(rows_of(rows), verbose=0)) <= RTOL, rows
    x = rows_of(2 * M + 1)
    alone = np.concatenate([served.predict(row[None]) for row in x])
    # ONNX Runtime may sum a Dense layer's products in another order for another number of rows.
    assert off_by(alone, served.predict(x)) <= 1e-6
    assert verify([str(artifact.path)]) == 0


def test_live_batch_statistics_still_couple_and_no_slots_limit_the_mini_batch(tmp_path: Path) -> None:
    model = pooled(tiny("MMPP", M, "tiny"))
    artifact = export(model, tmp_path)
    manifest = artifact.manifest
    assert (manifest.row_coupling, manifest.mini_batch_rows) == (RowCoupling.MINI_BATCH, M)
    assert (manifest.min_mini_batch_rows, manifest.max_mini_batch_rows) == (2, None)
    served = bln_serve.load(artifact.path)
    for size in (M, M + 4):
        x = rows_of(3 * size)
        expected = model.predict(x, batch_size=size, verbose=0)
        assert off_by(served.predict(x, mini_batch_rows=size), expected) <= RTOL
    assert off_by(served.predict(x), expected) > 100 * RTOL
    assert verify([str(artifact.path)]) == 0


def test_a_layer_that_keeps_its_slots_beside_a_pooled_one_makes_the_rule(tmp_path: Path) -> None:
    model = tiny("PPPP", M, "tiny")
    first = bln_layers(model)[0]
    first.feature_slots = "pool"
    artifact = export(model, tmp_path)
    manifest = artifact.manifest
    assert [layer.slots for layer in manifest.layers] == [None, M]
    assert (manifest.row_coupling, manifest.max_mini_batch_rows) == (RowCoupling.POSITIONAL, M)
    assert manifest.row_coupling_reason == "bln2: feature mean and feature variance are stored by slot"
    served = bln_serve.load(artifact.path)
    assert off_by(served.predict(rows_of(12)), model.predict(rows_of(12), batch_size=M, verbose=0)) <= RTOL
    with pytest.raises(MiniBatchError, match="at most 5 rows"):
        served.predict(rows_of(6), mini_batch_rows=6)


def test_fewer_slots_than_one_row_makes_are_refused_where_they_are_kept_and_enough_where_pooled(tmp_path: Path) -> None:
    x = keras.Input((6, 4), name="x")
    y = keras.ops.reshape(bln(M, "PPPP", "folded")(keras.ops.reshape(x, (-1, 4))), (-1, 6, 4))
    model = with_random_statistics(keras.Model(x, y, name="folded"))
    with pytest.raises(UnsupportedModelError, match="Expected layer 'folded' to have slots for one row"):
        export(model, tmp_path)
    artifact = export(pooled(model), tmp_path)
    assert artifact.manifest.row_coupling is RowCoupling.INDEPENDENT
    assert off_by(bln_serve.load(artifact.path).predict(rows_of(9)), model.predict(rows_of(9), verbose=0)) <= RTOL


@pytest.mark.parametrize("policy", ["PPPP", "MMPP"])
@pytest.mark.parametrize("fault", ["alike", "one slot", "never updated"])
def test_slots_that_are_weighed_otherwise_are_caught(
    fault: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh = {
        "alike": lambda stored, steps: stored.mean(axis=0, keepdims=True),
        "one slot": lambda stored, steps: stored[:1],
        "never updated": lambda stored, steps: np.average(stored, axis=0, weights=np.maximum(steps, 1), keepdims=True),
    }[fault]
    model = pooled(one_layer((6, 4), M, policy))
    assert export_onnx(model, tmp_path / "whole.onnx").layers[0].pooled
    monkeypatch.setattr(marking, "pooled", weigh)
    with pytest.raises(ParityError, match="(?s)FAIL ONNX = Keras.*FAIL ONNX: bln alone"):
        export_onnx(model, tmp_path / "off.onnx")
    assert not (tmp_path / "off.onnx").exists()


def test_a_graph_that_keeps_its_slots_is_positional_whatever_its_layer_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marking, "pooled", lambda stored, steps: stored)
    model = pooled(one_layer((6, 4), M, "PPPP"))
    found = conversion.convert(saved_model.describe(model), freezing.freeze(model, None))
    assert [layer.row_coupling for layer in found.layers] == [RowCoupling.INDEPENDENT]
    assert found.coupling.row_coupling is RowCoupling.POSITIONAL
