"""--select: what competes, what is taken, what is kept of it, and what is refused before any work."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.keras_files import compiled_like, function, rewrite_config
from support.models import bln, tiny, with_random_statistics

import bln_serve
from bln_serve.artifact import sha256
from bln_serve.cli.export import main
from bln_serve.cli.inspect import main as inspect_command
from bln_serve.errors import ArtifactExistsError, UnsupportedModelError, UsageError
from bln_serve.export import conversion, export, export_onnx
from bln_serve.export.selection import plot
from bln_serve.export.selection.record import Selection
from bln_serve.export.selection.report import read_selection, table
from bln_serve.layers import bln_layers
from bln_serve.statistics import ALL_POLICIES, RowCoupling, StatisticsPolicy

M = 5
GENERATOR = np.random.default_rng(31)
X = GENERATOR.normal(0.5, 1.5, size=(43, 6, 4)).astype(np.float32)
Y = GENERATOR.integers(0, 3, 43)
CALIBRATION = GENERATOR.normal(0.5, 1.5, size=(50, 6, 4)).astype(np.float32)
# A mean of losses of magnitude 1 in float32.
RTOL = 2e-5


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # as a trained model's
    return model


def loss_of(model: keras.Model, policy: str | None = None) -> float:
    """Return what Keras evaluates on the whole mini-batches."""
    for layer in bln_layers(model) if policy else ():
        layer.policy = StatisticsPolicy.from_code(policy)
    model.make_test_function(force=True)
    return model.evaluate(X[:40], Y[:40], batch_size=M, verbose=0, return_dict=True)["loss"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tiny.keras"
    compiled(tiny("MMMM", M, "tiny")).save(path)
    return path


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "validation.npz"
    np.savez(path, x=X, y=Y)
    return path


def selected(model: Any, tmp_path: Path, **options: Any) -> tuple[Any, Selection]:
    artifact = export(model, tmp_path, select=(X, Y), **options)
    return artifact, read_selection(artifact.path / "selection.json")


def test_the_best_of_16_is_taken_and_all_of_it_is_kept(model_file: Path, tmp_path: Path) -> None:
    artifact, selection = selected(model_file, tmp_path, save_model=tmp_path / "best.keras", coupling="independent")
    assert {entry.policy for entry in selection.entries} == {str(policy) for policy in ALL_POLICIES}
    model = keras.saving.load_model(model_file)
    for entry in selection.entries[::5]:
        assert entry.loss == pytest.approx(loss_of(model, entry.policy), rel=RTOL)
    losses = [entry.loss for entry in selection.entries]
    assert losses == sorted(losses)
    chosen = selection.entries[selection.chosen]
    assert (chosen.policy, artifact.manifest.row_coupling) == ("PPMM", RowCoupling.INDEPENDENT)
    assert artifact.manifest.statistics == "PPMM"
    assert (selection.rows, selection.dropped_rows, selection.mini_batches) == (43, 3, 8)
    assert {"selection.json", "selection.png"} <= set(artifact.manifest.files)
    artifact.check_hashes()
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert loss_of(best) == pytest.approx(chosen.loss, rel=RTOL)
    best.fit(X[:10], Y[:10], batch_size=M, verbose=0)  # with its optimizer, to train on


def test_calibrated_and_reference_variants_compete(tmp_path: Path) -> None:
    model = compiled(tiny("MMMM", M, "tiny"))
    before = [weight.numpy() for weight in model.weights]
    artifact, selection = selected(
        model, tmp_path, calibrate=CALIBRATION, reference_batch=CALIBRATION[:M], feature_slots="pool",
        save_model=tmp_path / "best.keras",
    )  # fmt: skip
    origins = [entry.origin for entry in selection.entries]
    assert (origins.count("as trained"), origins.count("calibrated"), origins.count("reference batch")) == (16, 15, 12)
    assert not {entry.row_coupling for entry in selection.entries} & {RowCoupling.POSITIONAL}
    assert all(entry.row_coupling is RowCoupling.INDEPENDENT for entry in selection.entries if "ref" in entry.origin)
    chosen = selection.entries[selection.chosen]
    stored = artifact.manifest.stored_statistics
    assert (stored.origin if stored else "as trained") == chosen.origin
    assert [(each.origin, each.rows) for each in selection.variants] == [("calibrated", 50), ("reference batch", M)]
    # What is exported is what was evaluated, whatever it was.
    assert loss_of(keras.saving.load_model(tmp_path / "best.keras")) == pytest.approx(chosen.loss, rel=RTOL)
    exported = bln_serve.load(artifact.path).predict(X[:40], mini_batch_rows=M)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(Y[:40], exported)
    assert float(loss) == pytest.approx(chosen.loss, rel=RTOL)
    for was, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), was)


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    model = compiled(tiny("MMMM", M, "tiny"))
    bln_layers(model)[1].variance_steps.assign(0.0)
    _, selection = selected(model, tmp_path)
    unusable = [entry for entry in selection.entries if entry.unusable]
    assert {entry.policy[1] for entry in unusable} == {"P"}
    assert len(unusable) == 8
    assert {entry.unusable for entry in unusable} == {"bln2: the stored batch variance was never updated"}
    assert all(entry.loss is None for entry in unusable)


def test_at_m_1_calibration_repairs_what_training_cannot_estimate(tmp_path: Path) -> None:
    x = keras.Input((6, 4))
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(bln(1, "MMMM", "bln")(x))), name="single")
    artifact, selection = selected(
        compiled(with_random_statistics(model)), tmp_path, calibrate=CALIBRATION, coupling="independent"
    )
    as_trained = [entry for entry in selection.entries if entry.origin == "as trained"]
    assert sum(entry.unusable is not None for entry in as_trained) == 12  # a variance of either kind is stored
    assert not [entry for entry in selection.entries if entry.origin == "calibrated" and entry.unusable]
    assert artifact.manifest.row_coupling is RowCoupling.INDEPENDENT


def test_the_command_prints_the_table_and_what_it_wrote(
    model_file: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plot, "write", None)  # a single file keeps no picture, and none is drawn
    out = tmp_path / "one.onnx"
    options = ["--select", str(data_file), "--metric", "accuracy", "--save-model", str(tmp_path / "best.keras")]
    assert main([str(model_file), "-o", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("validation.npz (sha256 ")
    assert len(re.findall(r"(?m)^[* ] +\d+  [PM]{4} +as trained ", said)) == 16
    assert "dropped the last 3 rows: they do not fill a mini-batch of 5" in said
    assert re.search(r"(?m)^chosen: [PM]{4} as trained", said)
    assert f"wrote {tmp_path}/best.keras" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["best.keras", "one.onnx"]


def test_force_says_what_it_replaced_and_a_note_what_is_lost(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, best = tmp_path / "foreign.keras", tmp_path / "best.keras"
    shutil.copy(model_file, foreign)
    best.write_text("old")
    rewrite_config(foreign, compiled_like({"loss": function("hostile", "loss")}))
    options = ["--statistics", "PPMM", "--save-model", str(best), "--force"]
    assert main([str(foreign), "-o", str(tmp_path / "one.onnx"), *options]) == 0
    said = capsys.readouterr().out
    assert f"\n--force replaced {best}\n" in f"\n{said}"
    assert "note: best.keras is not compiled: foreign.keras was compiled with hostile.loss, and no code that" in said
    assert not keras.saving.load_model(best).compiled


def test_the_command_says_what_is_stored_and_so_does_the_file(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "one.onnx", tmp_path / "rows.npy"
    np.save(rows, X[:23])
    assert main([str(model_file), "-o", str(out), "--calibrate", str(rows), "--statistics", "PPPP"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"(?m)^stored statistics: calibrated on rows\.npy \(sha256 [0-9a-f]{12}\), 20 rows$", said)
    assert "note: --calibrate left out the last 3 of 23 rows: they do not fill a mini-batch of 5\n" in said
    assert inspect_command([str(out)]) == 0
    assert 'bln.stored_statistics = {"origin":"calibrated","source":"rows.npy",' in capsys.readouterr().out


def test_a_model_that_comes_out_more_strongly_coupled_is_not_written(
    model_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = conversion.convert

    def convert_badly(*arguments: Any) -> conversion.Conversion:
        made = convert(*arguments)
        return replace(made, coupling=replace(made.coupling, row_coupling=RowCoupling.POSITIONAL))

    monkeypatch.setattr(conversion, "convert", convert_badly)
    with pytest.raises(UnsupportedModelError, match="as --coupling independent allows. Received: positional ones"):
        export(model_file, tmp_path / "out", select=data_file, coupling="independent")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": (X, Y), "statistics": "PPMM"}, "Expected --statistics or --select"),
        ({"loss": "mse"}, "Expected --loss beside --select"),
        ({"metrics": ["mae"]}, "Expected --metric beside --select"),
        ({"coupling": "independent"}, "Expected --coupling beside --select"),
        ({"select": (X, Y), "coupling": "none"}, "Expected --coupling independent, positional, any. Received: 'none'"),
        ({"feature_slots": "drop"}, "Expected --feature-slots keep or pool. Received: 'drop'"),
        ({"calibrate": X, "reference_batch": X}, "Expected --calibrate or --reference-batch. Received: both"),
        ({"save_model": "best.h5"}, "Expected --save-model with a file NAME.keras. Received: best.h5"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export("nobody_looks_for_it.keras", tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Received: statistic"):
        export_onnx("nobody_looks_for_it.keras", tmp_path / "a.onnx", statistic="PPMM")  # type: ignore[call-arg]


def test_a_model_without_a_loss_is_refused_before_any_work(
    tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("MMMM", M, "tiny").save(tmp_path / "tiny.keras")
    assert main([str(tmp_path / "tiny.keras"), "-o", str(tmp_path / "out"), "--select", str(data_file)]) == 2
    assert not (tmp_path / "out").exists()
    assert "Expected a model with a compiled loss, saved as .keras, or --loss." in capsys.readouterr().err


def test_a_metric_of_other_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected metrics that take these targets and answers. Received: .*2D inputs"):
        export(compiled(tiny("MMMM", M, "tiny")), tmp_path, select=(X, Y), metrics=["F1Score"])


def test_too_few_rows_make_no_mini_batch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected at least one mini-batch of 5 rows for --select. Received: 4 rows"):
        export(compiled(tiny("MMMM", M, "tiny")), tmp_path, select=(X[:4], Y[:4]))


def test_layers_of_different_m_need_the_rows_of_a_mini_batch(tmp_path: Path) -> None:
    x = keras.Input((4,))
    y = layers.Dense(3)(bln(7, "MMMM", "seven")(bln(M, "MMMM", "five")(x)))
    model = compiled(with_random_statistics(keras.Model(x, y, name="two")))
    with pytest.raises(UsageError, match=r"different batch sizes \(5, 7\)"):
        export(model, tmp_path, select=(X[:, 0], Y))


def test_a_saved_model_is_never_written_over(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "best.keras").write_text("mine")
    with pytest.raises(ArtifactExistsError, match="Expected no file at .*best.keras. Received: one. Replace it with"):
        export(model_file, tmp_path, statistics="PPMM", save_model=tmp_path / "best.keras")
    assert (tmp_path / "best.keras").read_text() == "mine"


def test_the_models_own_file_stays_and_its_hash_is_kept(model_file: Path, tmp_path: Path) -> None:
    before = sha256(model_file)
    with pytest.raises(UsageError, match="Expected --save-model with a file of its own"):
        export(model_file, tmp_path, statistics="PPMM", save_model=model_file, force=True)
    artifact = export(model_file, tmp_path, statistics="PPMM", save_model=tmp_path / "best.keras")
    assert before == sha256(model_file) == artifact.manifest.source_sha256 != sha256(tmp_path / "best.keras")


@pytest.mark.parametrize("single", [True, False])
def test_where_no_model_can_be_saved_nothing_is_begun(single: bool, model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stages: list[str] = []
    options: Any = {"select": (X, Y), "save_model": tmp_path / "file" / "best.keras", "on_stage": stages.append}
    run: Any = (
        partial(export_onnx, path=tmp_path / "new" / "one.onnx") if single else partial(export, out=tmp_path / "new")
    )
    with pytest.raises(UsageError, match="Expected --save-model in a folder that can be written to"):
        run(model_file, **options)
    assert stages == []
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_model_is_saved_outside_of_the_artifact(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected --save-model outside of the version's folder, .*tiny/1. Received"):
        export(model_file, tmp_path / "out", save_model=tmp_path / "out" / "tiny" / "1" / "best.keras")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["bln_serve.export.making.write_samples", "bln_serve.export.pipeline.put_in_place"])
def test_an_artifact_that_fails_leaves_no_model(
    place: str, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(place, fail)
    (tmp_path / "best.keras").write_text("old")
    for name in ("best.keras", "new/best.keras"):
        with pytest.raises(OSError, match="the disk is gone"):
            export(model_file, tmp_path / "out", statistics="PPMM", save_model=tmp_path / name, force=True)
    assert [each.name for each in tmp_path.iterdir() if each.name != "out"] == ["best.keras"]
    assert (tmp_path / "best.keras").read_text() == "old"


def test_an_onnx_file_that_cannot_be_written_leaves_no_model(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export_onnx(model_file, tmp_path / "file" / "one.onnx", save_model=tmp_path / "best.keras")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_data_that_does_not_fit_leaves_no_folder(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected input"):
        export(model_file, tmp_path / "out", select=(X[:, :3], Y))
    assert not list(tmp_path.iterdir())


def test_one_mini_batch_is_no_reason_for_coupled_rows(model_file: Path, tmp_path: Path) -> None:
    artifact = export(model_file, tmp_path, select=(X[:M], Y[:M]))
    selection = read_selection(artifact.path / "selection.json")
    assert artifact.manifest.row_coupling is RowCoupling.INDEPENDENT
    assert [entry.rows_per_s for entry in selection.entries] == [None] * 16
    assert "nan" not in table(selection).lower()


def test_progress_counts_to_its_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    selected(
        compiled(tiny("MMMM", M, "tiny")), tmp_path, calibrate=CALIBRATION, on_progress=lambda *step: told.append(step)
    )
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
