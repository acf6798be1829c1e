"""The gates of the export: corrupt one thing at a time, and see that nothing is written."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import models

from bln_serve.artifact import Artifact
from bln_serve.cli import export as export_command
from bln_serve.cli import verify as verify_command
from bln_serve.errors import ParityError, UnsupportedModelError, UsageError
from bln_serve.export import decomposition, export, freezing, marking, saved_model
from bln_serve.statistics import LayerStatistics
from bln_serve.verification import Tolerance

REFUSED = "The exported model does not answer as Keras does, and was not kept:\n"

Patch = Callable[[pytest.MonkeyPatch], None]


def wrap_layer(change: Callable[..., dict[str, Any]]) -> Patch:
    """Corrupt what both branches share."""
    whole = decomposition._Layer

    def make(x: str, **fields: Any) -> Any:
        return whole(x, **{**fields, **change(**fields)})

    return lambda patch: patch.setattr(decomposition, "_Layer", make)


def wrap_branch(change: Callable[[Any, Any], Any]) -> Patch:
    """Corrupt one branch before it is lowered."""
    whole = decomposition._branch

    def lower(emit: Any, layer: Any, branch: Any) -> Any:
        return whole(emit, layer, change(layer, branch))

    return lambda patch: patch.setattr(decomposition, "_branch", lower)


def wrap_cut(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Corrupt the tables that have a row for each slot."""
    whole = decomposition._cut

    def cut(emit: Any, layer: Any, table: np.ndarray) -> str:
        by_slot = table.ndim > 1 and table.shape[0] == layer.m
        return whole(emit, layer, change(table) if by_slot else table)

    return lambda patch: patch.setattr(decomposition, "_cut", cut)


def swapped(batch_scale: np.ndarray, feature_scale: np.ndarray) -> dict[str, np.ndarray]:
    return {"batch_scale": feature_scale, "feature_scale": batch_scale}


def drop_beta(patch: pytest.MonkeyPatch) -> None:
    whole = decomposition._sum
    patch.setattr(decomposition, "_sum", lambda parts, beta: whole(parts, np.zeros_like(beta)))


def unbiased(layer: Any, branch: Any) -> Any:
    n = layer.m if branch.axis == 0 else branch.scale.size
    return branch if branch.var is not None else replace(branch, scale=branch.scale * np.sqrt((n - 1) / n))


def square_about_the_stored_mean(patch: pytest.MonkeyPatch) -> None:
    """Take a live variance about the mean beside it and not about its own."""
    whole = decomposition._Emitter.__call__

    def emit(self: Any, op_type: str, *inputs: str, **attributes: Any) -> str:
        if op_type == "Mul" and len(set(inputs)) == 1:
            inputs = ([node.output[0] for node in self.nodes if node.op_type == "Sub"][-1],) * 2
        return whole(self, op_type, *inputs, **attributes)

    patch.setattr(decomposition._Emitter, "__call__", emit)


CORRUPTIONS: dict[str, tuple[str, Patch]] = {
    "the branches' scales are swapped": (
        "PPMM",
        wrap_layer(lambda batch_scale, feature_scale, **_: swapped(batch_scale, feature_scale)),
    ),
    "the feature branch weighs 1 % less": (
        "PPMM",
        wrap_layer(lambda feature_scale, **_: {"feature_scale": feature_scale * 0.99}),
    ),
    "epsilon is left out of stored variances": ("PPPP", wrap_layer(lambda **_: {"epsilon": 0.0})),
    "epsilon is left out of live variances": ("MMMM", wrap_layer(lambda **_: {"epsilon": 0.0})),
    "beta is left out": ("PPMM", drop_beta),
    "live variances are unbiased": ("MMMM", wrap_branch(unbiased)),
    "only the feature variance is unbiased": (
        "MMMM",
        wrap_branch(lambda layer, branch: branch if branch.axis == 0 else unbiased(layer, branch)),
    ),
    "a live variance is taken about the stored mean": ("PMMM", square_about_the_stored_mean),
    "a live mean is used where the stored one is asked for": (
        "PMMM",
        wrap_branch(lambda layer, branch: replace(branch, mean=None)),
    ),
    "slots are reversed": ("PPPP", wrap_cut(lambda table: table[::-1])),
    "slots are shifted by one": ("PPPP", wrap_cut(lambda table: np.roll(table, 1, axis=0))),
    "every row meets slot 0": ("PPPP", wrap_cut(lambda table: np.repeat(table[:1], len(table), axis=0))),
}


def one_layer(policy: str) -> Any:
    return models.one_layer((6, 4), 4, policy)


def two_layers() -> Any:
    return models.tiny("PPMM", 4, "two_layers")


@pytest.mark.parametrize("policy", sorted({policy for policy, _ in CORRUPTIONS.values()}))
def test_each_policy_of_the_corruptions_is_exported_when_nothing_is_corrupted(tmp_path: Path, policy: str) -> None:
    assert export(one_layer(policy), tmp_path).path.is_dir()


@pytest.mark.parametrize(("policy", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupted_decomposition_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, corrupt: Patch
) -> None:
    corrupt(monkeypatch)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX = Keras"):
        export(one_layer(policy), tmp_path)
    assert files_below(tmp_path) == []
    assert not (tmp_path / "one_layer" / "1").exists()


def files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("variable", ["kernel", "gamma", "population_batch_mean"])
def test_a_corrupted_saved_model_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    whole = saved_model.write

    def write_with_one_weight_altered(callee: saved_model.Callee, folder: Path) -> None:
        weight = next(weight for weight in callee.model.weights if weight.name == variable)
        before = weight.numpy()
        weight.assign(before * 1.01)
        whole(callee, folder)
        weight.assign(before)

    monkeypatch.setattr(saved_model, "write", write_with_one_weight_altered)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL SavedModel = Keras") as caught:
        export(two_layers(), tmp_path)
    assert "FAIL ONNX" not in str(caught.value)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(("policy", "claimed"), [("MPMM", "PPMM"), ("PMMM", "PPMM"), ("PMPP", "PPPP")])
def test_a_model_whose_declared_row_coupling_is_too_weak_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, claimed: str
) -> None:
    monkeypatch.setattr(
        freezing.FrozenLayer,
        "statistics",
        property(lambda self: LayerStatistics(self.layer.name, claimed, self.layer.batch_size)),
    )
    with pytest.raises(ParityError, match=REFUSED + r"(?s:.*)FAIL ONNX: .*row.* = "):
        export(one_layer(policy), tmp_path)
    assert files_below(tmp_path) == []


def test_a_layer_lost_on_the_way_to_onnx_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = marking._convert

    def convert_and_lose_one(*arguments: Any) -> Any:
        model = whole(*arguments)
        lost = marking.marked_nodes(model)[0]
        lost.domain, lost.op_type = "", "Identity"
        del lost.attribute[:]
        return model

    monkeypatch.setattr(marking, "_convert", convert_and_lose_one)
    message = "Expected 2 marked Batch Layer Normalization nodes in the main graph, one a call. Received: 1."
    with pytest.raises(UnsupportedModelError, match=message):
        export(two_layers(), tmp_path)
    assert files_below(tmp_path) == []


def test_a_layer_that_stands_twice_for_one_call_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = marking._convert

    def convert_and_confuse(*arguments: Any) -> Any:
        model = whole(*arguments)
        first, second = marking.marked_nodes(model)
        second.attribute[0].CopyFrom(first.attribute[0])
        return model

    monkeypatch.setattr(marking, "_convert", convert_and_confuse)
    with pytest.raises(UnsupportedModelError, match="Expected 2 marked .* Received: 2"):
        export(two_layers(), tmp_path)


WIDE = Tolerance(rtol=1e-3)


@pytest.mark.parametrize("tolerance", [WIDE, Tolerance(atol=1e-9), Tolerance(rtol=1e30)])
def test_a_wider_tolerance_cannot_be_had_without_force(tmp_path: Path, tolerance: Tolerance) -> None:
    received = re.escape(f"Received: rtol {tolerance.rtol:g}, atol {tolerance.atol:g}.")
    message = rf"at most rtol 1e-05 and atol 0\. {received} A wider one needs --force"
    with pytest.raises(UsageError, match=message):
        export(one_layer("PPMM"), tmp_path, tolerance=tolerance)
    assert list(tmp_path.iterdir()) == []


def test_the_command_asks_for_force_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_layer("PPMM").save(tmp_path / "small.keras")
    order = [str(tmp_path / "small.keras"), "-o", str(tmp_path / "models"), "--tolerance", "0.001"]
    assert export_command.main(order) == 2
    assert "A wider one needs --force" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    assert export_command.main([*order, "--force"]) == 0
    assert "note: --force allowed a wider tolerance than usual: rtol 0.001\n" in capsys.readouterr().out
    assert Artifact.open(tmp_path / "models" / "small" / "1").manifest.tolerance == WIDE


def test_a_wider_tolerance_with_force_lets_a_difference_pass_and_is_shown_ever_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slightly_off = wrap_layer(lambda batch_scale, **_: {"batch_scale": batch_scale * (1 + 1e-4)})
    slightly_off(monkeypatch)
    with pytest.raises(ParityError, match=REFUSED):
        export(one_layer("PPMM"), tmp_path)
    with pytest.raises(ParityError, match=REFUSED):  # force replaces; it does not close an eye
        export(one_layer("PPMM"), tmp_path, force=True)
    artifact = export(one_layer("PPMM"), tmp_path, tolerance=WIDE, force=True)
    assert artifact.manifest.tolerance == WIDE
    assert verify_command.main([str(artifact.path)]) == 0
    note = "note: exported with --force under a wider tolerance than usual: rtol 0.001, atol 0\n"
    assert note in capsys.readouterr().out


def test_a_narrower_tolerance_needs_no_force_and_is_kept_to(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX"):
        export(one_layer("PPMM"), tmp_path, tolerance=Tolerance(rtol=1e-12))
    assert files_below(tmp_path) == []
