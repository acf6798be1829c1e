"""The export as a caller sees it: what is written, what is refused, and that nothing half-made is left."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers
from support.models import bln, tiny, two_inputs, with_random_statistics

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.errors import (
    ArtifactExistsError,
    ParityError,
    UnsupportedModelError,
    UnusableStatisticsError,
    UsageError,
)
from bln_serve.export import coupling, decomposition, deployment, export
from bln_serve.layers import BatchLayerNormalization, bln_layers
from bln_serve.statistics import RowCoupling
from bln_serve.verification import Tolerance

X = np.random.default_rng(3).normal(size=(10, 6, 4)).astype(np.float32)


def rtol_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def model_under(policy: str, m: int = 5) -> keras.Model:
    return tiny(policy, m, "tiny")


@pytest.mark.parametrize("policy", ["PPMM", "MMMM", "PPPP", "MPMM", "PMPM", "MMPP"])
def test_the_exported_model_answers_as_keras_does(policy: str, tmp_path: Path) -> None:
    model = model_under(policy)
    artifact = export(model, tmp_path)
    exported = bln_serve.load(artifact.path)
    assert rtol_difference(exported.predict(X), model.predict(X, batch_size=5, verbose=0)) <= 1e-5
    assert artifact.manifest.statistics == policy


def test_everything_that_the_manifest_names_is_there_and_nothing_else(tmp_path: Path) -> None:
    artifact = export(model_under("PPMM"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == [".lock", "1", "config.pbtxt"]
    artifact.check_hashes()
    assert artifact.unknown_files == ()
    assert {"model.onnx", "samples.npz", "saved_model.pb", "fingerprint.pb"} <= set(artifact.manifest.files)


def test_the_saved_model_is_read_from_the_version_folder(tmp_path: Path) -> None:
    model = model_under("PPMM")
    served = tf.saved_model.load(str(export(model, tmp_path).path))
    assert {"serve", "serving_default"} <= set(served.signatures)
    answer = served.signatures["serving_default"](x=tf.constant(X))["score"].numpy()
    assert rtol_difference(answer, model.predict(X, verbose=0)) <= 1e-5


def test_the_onnx_file_explains_itself(tmp_path: Path) -> None:
    model = onnx.load(export(model_under("MPMM"), tmp_path).onnx_path)
    properties = {item.key: item.value for item in model.metadata_props}
    assert properties["bln.row_coupling"] == "mini-batch"
    assert properties["bln.mini_batch_rows"] == "5"
    assert [layer["policy"] for layer in json.loads(properties["bln.layers"])] == ["MPMM", "MPMM"]


def test_statistics_override_the_flags_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = model_under("MMMM")
    before = model.predict(X, batch_size=5, verbose=0)
    artifact = export(model, tmp_path, statistics="PPMM")
    assert artifact.manifest.row_coupling is RowCoupling.INDEPENDENT
    assert [layer.policy.code for layer in bln_layers(model)] == ["MMMM", "MMMM"]
    np.testing.assert_array_equal(model.predict(X, batch_size=5, verbose=0), before)


def test_several_inputs_and_outputs_by_name_with_the_range_of_an_index(tmp_path: Path) -> None:
    artifact = export(two_inputs(), tmp_path)
    signature = artifact.manifest.signature
    assert {spec.name: spec.value_range for spec in signature.inputs} == {"numbers": None, "tokens": (0, 19)}
    assert {spec.name for spec in signature.outputs} == {"score", "classes"}
    with pytest.raises(bln_serve.errors.InvalidInputError, match="Received: -1 at index .* from 0 to 19"):
        bln_serve.load(artifact.path).predict({"numbers": np.zeros((1, 3)), "tokens": np.full((1, 5), -1)})


def test_a_static_batch_size_is_freed(tmp_path: Path) -> None:
    x = keras.Input((6, 4), batch_size=5, name="x")
    y = layers.Dense(3)(layers.Flatten()(layers.LSTM(4, return_sequences=True)(bln(5, "PPMM")(x))))
    model = with_random_statistics(keras.Model(x, y, name="static"))
    assert bln_serve.load(export(model, tmp_path).path).predict(X[:7]).shape == (7, 3)


def test_a_model_without_bln_is_exported_as_independent(tmp_path: Path) -> None:
    x = keras.Input((6, 4), name="x")
    manifest = export(keras.Model(x, layers.Dense(2)(layers.Flatten()(x)), name="plain"), tmp_path).manifest
    assert (manifest.row_coupling, manifest.statistics, manifest.mini_batch_rows) == ("independent", None, None)


def test_a_higher_opset(tmp_path: Path) -> None:
    path = export(model_under("PPMM"), tmp_path, opset=20).onnx_path
    assert [item.version for item in onnx.load(path).opset_import if item.domain == ""] == [20]


@pytest.mark.parametrize("opset", [17, 1, 999])
def test_an_opset_out_of_range(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"Expected an opset from 18 to .* Received: {opset}"):
        export(model_under("PPMM"), tmp_path, opset=opset)


def test_versions_count_up_and_are_never_overwritten(tmp_path: Path) -> None:
    first = export(model_under("PPMM"), tmp_path)
    text = (first.path / "manifest.json").read_bytes()
    assert export(model_under("MMMM"), tmp_path).manifest.version == 2
    with pytest.raises(ArtifactExistsError, match="that is already there. Give another --version"):
        export(model_under("PPMM"), tmp_path, version=1)
    assert (first.path / "manifest.json").read_bytes() == text
    assert export(model_under("MMMM"), tmp_path, version=1, force=True).manifest.statistics == "MMMM"


def test_triton_may_batch_only_while_every_version_is_independent(tmp_path: Path) -> None:
    config = tmp_path / "tiny" / "config.pbtxt"
    export(model_under("PPMM"), tmp_path)
    assert "dynamic_batching" in config.read_text()
    export(model_under("MMMM"), tmp_path)
    assert "max_batch_size: 0" in config.read_text()
    export(model_under("PPMM"), tmp_path)
    assert "max_batch_size: 0" in config.read_text()
    export(model_under("PPMM"), tmp_path, version=2, force=True)
    assert "dynamic_batching" in config.read_text()


def test_triton_may_not_batch_beside_a_version_whose_manifest_cannot_be_read(tmp_path: Path) -> None:
    manifest = export(model_under("PPMM"), tmp_path).path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    export(model_under("PPMM"), tmp_path)
    config = (tmp_path / "tiny" / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in config
    assert "a version's manifest cannot be read" in config


def test_another_export_waits_while_a_version_is_put_in_place(tmp_path: Path) -> None:
    manifest = export(model_under("MMMM"), tmp_path).manifest
    order = []

    def other() -> None:
        with deployment.publishing(tmp_path / "tiny", manifest):
            order.append("other")

    with deployment.publishing(tmp_path / "tiny", manifest):
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join()
    assert order == ["first", "other"]


def test_the_config_is_as_before_if_the_version_cannot_be_put_in_place(tmp_path: Path) -> None:
    export(model_under("PPMM"), tmp_path)
    config = tmp_path / "tiny" / "config.pbtxt"
    before, seen = config.read_text(), []
    coupled = replace(artifact_of(tmp_path).manifest, row_coupling=RowCoupling.MINI_BATCH)

    def fail() -> None:
        with deployment.publishing(tmp_path / "tiny", coupled):
            seen.append(config.read_text())
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - this very one
        fail()
    assert "max_batch_size: 0" in seen[0]
    assert config.read_text() == before


def artifact_of(repository: Path) -> Artifact:
    return Artifact.open(repository / "tiny" / "1")


def test_every_slot_is_verified_also_where_mini_batches_are_smaller_than_m(tmp_path: Path) -> None:
    names = [check.name for check in export(model_under("PPPP"), tmp_path, mini_batch_rows=2).manifest.checks]
    assert "ONNX = Keras, 5 rows" in names


@pytest.mark.parametrize("policy", ["PPPP", "PPMM"])
@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (keras.ops.cumsum, "CumSum .* accumulates along the row axis"),
        (lambda x, axis: x + keras.ops.mean(x, axis=axis, keepdims=True), "ReduceMean .* reduces the row axis"),
    ],
)
def test_rows_that_something_else_mixes_are_exported_as_mini_batches(tmp_path: Path, policy: str, mix, reason) -> None:
    x = keras.Input((6,), name="x")
    model = with_random_statistics(keras.Model(x, mix(bln(5, policy)(x), axis=0), name="mixing"))
    manifest = export(model, tmp_path).manifest
    assert manifest.row_coupling is RowCoupling.MINI_BATCH
    assert re.fullmatch(reason, manifest.row_coupling_reason), manifest.row_coupling_reason
    assert (manifest.mini_batch_rows, manifest.several_mini_batches) == (5, False)


@pytest.mark.parametrize(
    ("policy", "claimed", "failed"),
    [
        ("PPPP", RowCoupling.POSITIONAL, "FAIL .*: rows of 5 = among other rows"),
        ("PPMM", RowCoupling.INDEPENDENT, "FAIL .*: 5 rows together = each alone"),
    ],
)
def test_a_proof_that_claims_too_little_does_not_get_past_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, claimed: RowCoupling, failed: str
) -> None:
    whole = coupling.analyse
    monkeypatch.setattr(coupling, "analyse", lambda model: replace(whole(model), row_coupling=claimed))
    x = keras.Input((6,), name="x")
    model = keras.Model(x, keras.ops.cumsum(bln(5, policy)(x), axis=0), name="mixing")
    with pytest.raises(ParityError, match=failed):
        export(with_random_statistics(model), tmp_path)


def test_a_model_that_answers_nan_is_told_so(tmp_path: Path) -> None:
    x = keras.Input((6,), name="x")
    model = with_random_statistics(keras.Model(x, keras.ops.log(bln(5, "PPMM")(x)), name="log"))
    with pytest.raises(UnsupportedModelError, match="Received: NaN or infinity in output 'log'"):
        export(model, tmp_path)


def test_bln_directly_on_integers(tmp_path: Path) -> None:
    x = keras.Input((6,), dtype="int32", name="x")
    model = with_random_statistics(keras.Model(x, bln(5, "PPMM")(x), name="integers"))
    assert export(model, tmp_path).manifest.signature.outputs[0].dtype == "float32"


def test_a_stateful_model_is_refused(tmp_path: Path) -> None:
    x = keras.Input((6, 4), batch_size=5, name="x")
    with pytest.raises(UnsupportedModelError, match="a stateful recurrent layer, for one"):
        export(keras.Model(x, layers.LSTM(3, stateful=True)(x), name="stateful"), tmp_path)


def test_at_m_1_nobody_is_sent_to_train_further(tmp_path: Path) -> None:
    x = keras.Input((6,), name="x")
    model = with_random_statistics(keras.Model(x, bln(1, "PPMM", "one")(x), name="one"))
    with pytest.raises(UnusableStatisticsError, match="variance cannot be estimated at m = 1\nEstimate them"):
        export(model, tmp_path)


def test_an_empty_policy_is_no_default(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected a policy: four letters.* population or mini-batch .* Received: ''"):
        export(model_under("PPMM"), tmp_path, statistics="")


def test_a_wider_tolerance_needs_force_and_shows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A wider one needs --force"):
        export(model_under("PPMM"), tmp_path, tolerance=Tolerance(rtol=1e-3))
    assert not (tmp_path / "tiny").exists()
    manifest = export(model_under("PPMM"), tmp_path, tolerance=Tolerance(rtol=1e-3), force=True).manifest
    assert manifest.tolerance.rtol == 1e-3


def test_an_export_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "decompose", _with_beta_doubled(decomposition.decompose))
    with pytest.raises(ParityError, match="does not answer as Keras does(.|\n)*FAIL ONNX = Keras"):
        export(model_under("PPMM"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def _with_beta_doubled(decompose: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
    def wrong(marked: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        for item in marked.graph.initializer:
            if item.name.endswith("/beta"):
                item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * 2, item.name))
        return decompose(marked, **options)

    return wrong


def test_statistics_that_were_never_estimated_are_named(tmp_path: Path) -> None:
    x = keras.Input((6,))
    untrained = keras.Model(x, BatchLayerNormalization(4, name="fresh")(x))
    with pytest.raises(UnusableStatisticsError, match="fresh: the stored batch mean was never updated"):
        export(untrained, tmp_path)
    assert export(untrained, tmp_path, name="live", statistics="mini-batch").manifest.statistics == "MMMM"


def test_slots_that_no_full_batch_reached_are_named(tmp_path: Path) -> None:
    layer = bln(4, "MMPP", "short")
    x = keras.Input((6,))
    model = keras.Model(x, layer(x))
    layer(np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32), training=True)
    with pytest.raises(UnusableStatisticsError, match="in 1 of 4 slots, the first of them slot 3"):
        export(model, tmp_path)


def test_layers_of_different_batch_size_need_a_choice_where_rows_are_coupled(tmp_path: Path) -> None:
    x = keras.Input((6,))
    model = with_random_statistics(keras.Model(x, bln(4, "MMMM", "b")(bln(5, "MMMM", "a")(x)), name="two"))
    with pytest.raises(UsageError, match=r"Expected --mini-batch-rows, .* \(\[4, 5\]\)"):
        export(model, tmp_path)
    assert export(model, tmp_path, mini_batch_rows=4).manifest.mini_batch_rows == 4
    assert export(model, tmp_path, statistics="PPMM").manifest.mini_batch_rows is None


def test_mini_batch_rows_beyond_the_slots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected --mini-batch-rows from 1 to 5 .* Received: 6"):
        export(model_under("PPPP"), tmp_path, mini_batch_rows=6)


def test_a_model_without_known_inputs_is_refused(tmp_path: Path) -> None:
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(UnsupportedModelError, match="Received: Subclassed without. Wrap it"):
        export(Subclassed(name="subclassed"), tmp_path)


def test_a_free_dimension_is_refused(tmp_path: Path) -> None:
    x = keras.Input((None, 4), name="x")
    with pytest.raises(UnsupportedModelError, match=r"input 'x' .* Received: shape \(None, None, 4\)"):
        export(keras.Model(x, layers.Dense(2)(x), name="free"), tmp_path)
