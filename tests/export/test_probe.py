"""What the probe sees of a model's rows, and that an export ends where it sees more than was proved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import bln, one_layer, with_random_statistics

from bln_serve.errors import ParityError
from bln_serve.export import conversion, pipeline, probe
from bln_serve.export.probe import Observation
from bln_serve.export.samples import draw
from bln_serve.export.saved_model import describe
from bln_serve.signature import Arrays, TensorSpec
from bln_serve.statistics import ALL_POLICIES, LayerStatistics, RowCoupling
from bln_serve.verification import Check, Tolerance

INDEPENDENT, POSITIONAL, MINI_BATCH = RowCoupling
SPEC = TensorSpec("x", "float32", (None, 6))
PASSED, FAILED = Check("passed", 0.0, 1.0, 1.0), Check("failed", 2.0, 1.0, 1.0)


def seen_of(run: probe.Run, rows: int, spec: TensorSpec = SPEC) -> Observation:
    request, strangers = (draw([spec], rows, np.random.default_rng(seed)) for seed in (0, 1))
    return probe.observe("it", run, request, strangers, Tolerance())


def of_model(model: keras.Model) -> probe.Run:
    callee = describe(model)
    return lambda request: {name: np.asarray(y) for name, y in callee(*request.values()).items()}


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("policy", [policy.code for policy in ALL_POLICIES])
def test_every_policy_shows_the_coupling_that_it_has(policy: str, m: int) -> None:
    rows = max(m, 3) if LayerStatistics("bln", policy, m).slots is None else m
    seen = seen_of(of_model(one_layer((6,), m, policy)), rows)
    assert seen.row_coupling is LayerStatistics("bln", policy, m).row_coupling


def plain(run: Callable[[np.ndarray], np.ndarray]) -> probe.Run:
    return lambda request: {"y": run(request["x"])}


def by_slot(x: np.ndarray) -> np.ndarray:
    return x + np.arange(len(x))[:, None]


def last_place_alone(x: np.ndarray) -> np.ndarray:
    return x + (np.arange(len(x)) == len(x) - 1)[:, None]


def by_the_row_before(x: np.ndarray) -> np.ndarray:
    return x + np.concatenate([np.zeros_like(x[:1]), x[:-1]])


RUNS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], RowCoupling]] = {
    "each row": (lambda x: x * 2, INDEPENDENT),
    "constant": (np.zeros_like, INDEPENDENT),
    "mean": (lambda x: x + x.mean(0), MINI_BATCH),
    "largest of all": (lambda x: x + x.max(), MINI_BATCH),
    "sum of those before": (lambda x: np.cumsum(x, axis=0), MINI_BATCH),
    "neighbour": (by_the_row_before, MINI_BATCH),
    "first row": (lambda x: x + x[:1], MINI_BATCH),
    "last row": (lambda x: x + x[-1:], MINI_BATCH),
    "number of rows": (lambda x: x * len(x), MINI_BATCH),
    "place from the end": (last_place_alone, MINI_BATCH),
    "place": (by_slot, POSITIONAL),
    "reversed": (lambda x: x[::-1], MINI_BATCH),
}


@pytest.mark.parametrize("rows", [2, 3, 25])
@pytest.mark.parametrize(("run", "coupling"), RUNS.values(), ids=RUNS.keys())
def test_planted_couplings_are_seen(run: Callable[[np.ndarray], np.ndarray], coupling: RowCoupling, rows: int) -> None:
    assert seen_of(plain(run), rows).row_coupling is coupling


def test_one_row_shows_nothing() -> None:
    assert seen_of(plain(lambda x: x * len(x)), 1).row_coupling is INDEPENDENT


def test_a_coupling_below_the_tolerance_is_not_seen() -> None:
    assert seen_of(plain(lambda x: x + 1e-8 * x.mean(0)), 4).row_coupling is INDEPENDENT
    assert seen_of(plain(lambda x: x + 1e-3 * x.mean(0)), 4).row_coupling is MINI_BATCH


def test_one_output_of_two_is_enough() -> None:
    def run(request: Arrays) -> Arrays:
        return {"alone": request["x"], "mean": request["x"] + request["x"].mean(0)}

    seen = seen_of(run, 4)
    assert seen.row_coupling is MINI_BATCH
    assert {check.name.rpartition(", ")[2] for check in seen.by_others if not check.passed} == {"mean"}


def test_tokens_are_probed_within_their_range() -> None:
    tokens = TensorSpec("x", "int32", (None, 6), value_range=(0, 4))
    table = np.random.default_rng(0).normal(size=(5, 3))
    assert seen_of(plain(lambda x: table[x]), 4, tokens).row_coupling is INDEPENDENT
    assert seen_of(plain(lambda x: table[x] + table[x].mean(0)), 4, tokens).row_coupling is MINI_BATCH


@pytest.mark.parametrize(
    ("others", "place", "coupling", "forbidden"),
    [
        (PASSED, PASSED, INDEPENDENT, {INDEPENDENT: 0, POSITIONAL: 0, MINI_BATCH: 0}),
        (PASSED, FAILED, POSITIONAL, {INDEPENDENT: 1, POSITIONAL: 0, MINI_BATCH: 0}),
        (FAILED, PASSED, MINI_BATCH, {INDEPENDENT: 1, POSITIONAL: 1, MINI_BATCH: 0}),
        (FAILED, FAILED, MINI_BATCH, {INDEPENDENT: 2, POSITIONAL: 1, MINI_BATCH: 0}),
    ],
)
def test_what_must_pass_where_this_much_was_proved(
    others: Check, place: Check, coupling: RowCoupling, forbidden: dict[RowCoupling, int]
) -> None:
    seen = Observation((PASSED, others), (PASSED, place))
    assert seen.row_coupling is coupling
    assert {proved: sum(not check.passed for check in seen.forbidden(proved)) for proved in RowCoupling} == forbidden


def claim(monkeypatch: pytest.MonkeyPatch, coupling: RowCoupling) -> None:
    """Let the analysis say this of every graph."""
    whole = conversion.coupling.analyse

    def analyse(model: Any) -> Any:
        return replace(whole(model), row_coupling=coupling, reason="a claim")

    monkeypatch.setattr(conversion.coupling, "analyse", analyse)


def mixing(policy: str, mix: Callable[[Any], Any]) -> keras.Model:
    x = keras.Input((6,), name="x")
    return with_random_statistics(keras.Model(x, mix(bln(4, policy)(x)), name="mixing"))


def with_the_mean(y: Any) -> Any:
    return y + keras.ops.mean(y, axis=0, keepdims=True)


def summed(y: Any) -> Any:
    return keras.ops.cumsum(y, axis=0)


def numbered(y: Any) -> Any:
    return y + keras.ops.cumsum(keras.ops.ones_like(y), axis=0)


@pytest.mark.parametrize(
    ("mix", "coupling"),
    [(lambda y: y, INDEPENDENT), (numbered, POSITIONAL), (with_the_mean, MINI_BATCH), (summed, MINI_BATCH)],
)
def test_couplings_that_no_policy_tells_of_are_seen(mix: Callable[[Any], Any], coupling: RowCoupling) -> None:
    assert seen_of(of_model(mixing("PPMM", mix)), 4).row_coupling is coupling


@pytest.mark.parametrize(
    ("policy", "mix", "claimed"),
    [
        ("PPMM", with_the_mean, INDEPENDENT),
        ("PPMM", summed, POSITIONAL),
        ("PPPP", summed, POSITIONAL),
        ("PMMM", lambda y: y, INDEPENDENT),
    ],
)
def test_an_export_ends_where_the_probe_sees_more_than_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, mix: Callable[[Any], Any], claimed: RowCoupling
) -> None:
    claim(monkeypatch, claimed)
    with pytest.raises(ParityError, match="FAIL ONNX: rows of . = (among|in other)"):
        pipeline.export_onnx(mixing(policy, mix), tmp_path / "m.onnx", mini_batch_rows=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("policy", "seen"), [("PPMM", INDEPENDENT), ("PPPP", POSITIONAL)])
def test_an_export_passes_where_more_is_claimed_than_the_probe_sees_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, seen: RowCoupling
) -> None:
    claim(monkeypatch, MINI_BATCH)
    manifest = pipeline.export_onnx(mixing(policy, lambda y: y), tmp_path / "m.onnx", mini_batch_rows=4)
    assert manifest.row_coupling is MINI_BATCH
    assert manifest.notes == (
        "one run holds one mini-batch: a claim",
        f"ONNX: the rows of 4 random ones showed {seen} coupling alone; that it is mini-batch was proved on the graph "
        "and holds.",
    )


def test_nothing_is_said_where_the_probe_sees_what_was_proved(tmp_path: Path) -> None:
    manifest = pipeline.export_onnx(mixing("PPMM", with_the_mean), tmp_path / "m.onnx", mini_batch_rows=4)
    assert manifest.row_coupling is MINI_BATCH
    assert manifest.notes == ("one run holds one mini-batch: ReduceMean 'Mean' reduces the row axis",)
