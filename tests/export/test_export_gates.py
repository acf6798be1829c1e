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
from bln_serve.export import conversion, decomposition, export, graphs, layer_node, marking, saved_model, tf_to_onnx
from bln_serve.export.pipeline import export_onnx
from bln_serve.manifest import MINI_BATCHES
from bln_serve.statistics import LayerStatistics, RowCoupling
from bln_serve.verification import Tolerance

REFUSED = "The exported model does not answer as Keras does, and was not kept:\n"

Patch = Callable[[pytest.MonkeyPatch], None]


def change_epsilon(change: Callable[[float], float]) -> Patch:
    """Corrupt what is added to every variance."""
    whole = layer_node.Layer.epsilon
    return lambda patch: patch.setattr(layer_node.Layer, "epsilon", property(lambda self: change(whole.fget(self))))


def change_scale(change: Callable[[Callable[[str], np.ndarray], str], np.ndarray]) -> Patch:
    """Corrupt how much a branch weighs."""
    whole = layer_node.Layer.scale
    return lambda patch: patch.setattr(
        layer_node.Layer, "scale", lambda self, branch: change(lambda kind: whole(self, kind), branch)
    )


def weigh(kind: str, factor: float) -> Patch:
    return change_scale(lambda scale, branch: scale(branch) * (factor if branch == kind else 1.0))


def change_branch(change: Callable[[Any, Any], Any]) -> Patch:
    """Corrupt one branch before it is lowered."""
    whole = decomposition._branch
    return lambda patch: patch.setattr(
        decomposition, "_branch", lambda scope, branch: whole(scope, change(scope.layer, branch))
    )


def change_slots(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Corrupt the tables that have a row for each slot."""
    whole = decomposition._Scope.stored

    def stored(self: Any, table: np.ndarray) -> str:
        by_slot = table.ndim > 1 and table.shape[0] == self.layer.m
        return whole(self, change(table) if by_slot else table)

    return lambda patch: patch.setattr(decomposition._Scope, "stored", stored)


def change_inputs(change: Callable[[graphs.Emitter, str, tuple[str, ...]], tuple[str, ...]]) -> Patch:
    """Corrupt what single operators take."""
    whole = graphs.Emitter.__call__

    def emit(self: graphs.Emitter, op_type: str, *inputs: str, **attributes: Any) -> str:
        return whole(self, op_type, *change(self, op_type, inputs), **attributes)

    return lambda patch: patch.setattr(graphs.Emitter, "__call__", emit)


def drop_beta(patch: pytest.MonkeyPatch) -> None:
    whole = decomposition._sum
    patch.setattr(decomposition, "_sum", lambda parts, beta: whole(parts, np.zeros_like(beta)))


def add_beta_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer_node.Layer, "offset", property(lambda self: self.tables["beta"]))


def drop_the_bias(emitter: graphs.Emitter, op_type: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    return inputs[:2] if op_type == "LayerNormalization" else inputs


def unbiased(layer: Any, branch: Any) -> Any:
    n = layer.m if branch.over_rows else branch.scale.size
    return branch if branch.var is not None else replace(branch, scale=branch.scale * np.sqrt((n - 1) / n))


def square_about_the_stored_mean(emitter: graphs.Emitter, op_type: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Take a live variance about the mean beside it and not about its own."""
    if op_type != "Mul" or len(set(inputs)) != 1:
        return inputs
    return ([node.output[0] for node in emitter.nodes if node.op_type == "Sub"][-1],) * 2


CORRUPTIONS: dict[str, tuple[str, Patch]] = {
    "the branches' scales are swapped": (
        "PPMM",
        change_scale(lambda scale, branch: scale("feature" if branch == "batch" else "batch")),
    ),
    "the feature branch weighs 1 % less": ("PPMM", weigh("feature", 0.99)),
    "the batch branch weighs 1 % less": ("MMMM", weigh("batch", 0.99)),
    "epsilon is left out of stored variances": ("PPPP", change_epsilon(lambda _: 0.0)),
    "epsilon is left out of live variances": ("MMMM", change_epsilon(lambda _: 0.0)),
    "beta is left out": ("PPMM", drop_beta),
    "LayerNormalization's bias is left out": ("MMMM", change_inputs(drop_the_bias)),
    "beta is added beside LayerNormalization's bias": ("MMMM", add_beta_twice),
    "live variances are unbiased": ("MMMM", change_branch(unbiased)),
    "only the feature variance is unbiased": (
        "MMMM",
        change_branch(lambda layer, branch: branch if branch.over_rows else unbiased(layer, branch)),
    ),
    "a live variance is taken about the stored mean": ("PMMM", change_inputs(square_about_the_stored_mean)),
    "a live mean is used where the stored one is asked for": (
        "PMMM",
        change_branch(lambda layer, branch: replace(branch, mean=None)),
    ),
    "slots are reversed": ("PPPP", change_slots(lambda table: table[::-1])),
    "slots are shifted by one": ("PPPP", change_slots(lambda table: np.roll(table, 1, axis=0))),
    "every row meets slot 0": ("PPPP", change_slots(lambda table: np.repeat(table[:1], len(table), axis=0))),
    "slots beside live rows are shifted by one": ("MMPP", change_slots(lambda table: np.roll(table, 1, axis=0))),
}


def over_all_mini_batches(emitter: graphs.Emitter, op_type: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    rows = emitter.integers(1)
    return (inputs[0], emitter.integers(0, 1)) if op_type == "ReduceMean" and inputs[1] == rows else inputs


def slots_in_turn(patch: pytest.MonkeyPatch) -> None:
    """Give K mini-batches the slots 0, 0, ..., 1, 1, ... and not 0, 1, ..., 0, 1, ..."""

    def make(self: Any, rows_per_row: int) -> str:
        rows = self.emit("Squeeze", self.emit("Shape", self._rows, start=0, end=1))
        every = self.emit("Range", self.emit.integer(0), rows, self.emit.integer(1))
        return str(self.emit("Div", every, MINI_BATCHES))

    patch.setattr(decomposition._Slots, "_make", make)


# Right while a run holds one mini-batch, and wrong where it holds several.
SIDE_BY_SIDE: dict[str, tuple[str, Patch]] = {
    "statistics over all mini-batches": ("MMMM", change_inputs(over_all_mini_batches)),
    "slots in turn": ("PPPP", slots_in_turn),
}


def one_layer(policy: str) -> Any:
    return models.one_layer((6, 4), 4, policy)


def two_layers() -> Any:
    return models.tiny("PPMM", 4, "two_layers")


@pytest.mark.parametrize("policy", sorted({policy for policy, _ in CORRUPTIONS.values()}))
def test_each_policy_of_the_corruptions_is_exported_when_nothing_is_corrupted(tmp_path: Path, policy: str) -> None:
    export_onnx(one_layer(policy), tmp_path / "one_layer.onnx")
    assert (tmp_path / "one_layer.onnx").is_file()


@pytest.mark.parametrize(("policy", "corrupt"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupted_decomposition_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, corrupt: Patch
) -> None:
    corrupt(monkeypatch)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX = Keras"):
        export_onnx(one_layer(policy), tmp_path / "one_layer.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupted_decomposition_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_beta(monkeypatch)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX = Keras"):
        export(one_layer("PPMM"), tmp_path)
    assert files_below(tmp_path) == []
    assert not (tmp_path / "one_layer" / "1").exists()


def test_a_fault_that_no_sample_shows_is_caught_by_the_layer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = graphs.Emitter.__call__

    def emit_without_epsilon(self: Any, op_type: str, *inputs: str, **attributes: Any) -> str:
        attributes.pop("epsilon", None)  # ONNX's own is 1e-5
        return whole(self, op_type, *inputs, **attributes)

    monkeypatch.setattr(graphs.Emitter, "__call__", emit_without_epsilon)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX: bln alone") as caught:
        export_onnx(models.one_layer((16,), 256, "PPMM"), tmp_path / "one_layer.onnx")
    assert str(caught.value).count("FAIL") == 1


@pytest.mark.parametrize(("policy", "corrupt"), SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE.keys())
def test_mini_batches_that_mix_in_one_run_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, corrupt: Patch
) -> None:
    corrupt(monkeypatch)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL ONNX: 3 mini-batches of 4 in one run") as caught:
        export_onnx(one_layer(policy), tmp_path / "one_layer.onnx")
    assert "FAIL ONNX = Keras" not in str(caught.value)
    assert files_below(tmp_path) == []


def test_a_saved_models_mini_batches_that_mix_in_one_call_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved_model.read

    def read_and_mix(folder: Path) -> Any:
        serve = whole(folder)
        return lambda inputs, mini_batches: serve(inputs, 1)

    monkeypatch.setattr(saved_model, "read", read_and_mix)
    with pytest.raises(ParityError, match=REFUSED + "(?s:.*)FAIL SavedModel: 3 mini-batches of 4 in one run") as caught:
        export(one_layer("MMMM"), tmp_path)
    assert "FAIL ONNX" not in str(caught.value)


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
    weaker, whole = LayerStatistics("bln", claimed, 4), conversion.coupling.analyse
    monkeypatch.setattr(conversion, "_layer", lambda item, rows_per_row: weaker)
    monkeypatch.setattr(
        conversion.coupling, "analyse", lambda model: replace(whole(model), row_coupling=weaker.row_coupling)
    )
    with pytest.raises(ParityError, match=REFUSED + r"(?s:.*)FAIL ONNX: .*row.* = "):
        export_onnx(one_layer(policy), tmp_path / "one_layer.onnx")
    assert files_below(tmp_path) == []


def test_what_a_layer_declares_cannot_weaken_what_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_layer", lambda item, rows_per_row: LayerStatistics("bln", "PPMM", 4))
    assert export_onnx(one_layer("MPMM"), tmp_path / "one_layer.onnx").row_coupling is RowCoupling.MINI_BATCH


def test_a_layer_lost_on_the_way_to_onnx_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tf_to_onnx.convert

    def convert_and_lose_one(*arguments: Any) -> Any:
        model = whole(*arguments)
        lost = marking.marked_nodes(model)[0]
        lost.domain, lost.op_type = "", "Identity"
        del lost.attribute[:]
        return model

    monkeypatch.setattr(tf_to_onnx, "convert", convert_and_lose_one)
    message = "Expected 2 marked nodes in the main graph, one a call of a Batch Layer Normalization, .* Received: 1."
    with pytest.raises(UnsupportedModelError, match=message):
        export(two_layers(), tmp_path)
    assert files_below(tmp_path) == []


def test_a_layer_that_stands_twice_for_one_call_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tf_to_onnx.convert

    def convert_and_confuse(*arguments: Any) -> Any:
        model = whole(*arguments)
        first, second = marking.marked_nodes(model)
        second.attribute[0].CopyFrom(first.attribute[0])
        return model

    monkeypatch.setattr(tf_to_onnx, "convert", convert_and_confuse)
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
    weigh("batch", 1 + 1e-4)(monkeypatch)
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
        export_onnx(one_layer("PPMM"), tmp_path / "one_layer.onnx", tolerance=Tolerance(rtol=1e-12))
    assert files_below(tmp_path) == []
