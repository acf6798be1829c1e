"""A model file is data: what it names is not imported, what it carries is not run, what is broken is said."""

import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from support.keras_files import HOSTILE, compiled_like, function, rewrite_config
from support.models import tiny
from support.reference_files import LEGACY

from bln_serve.errors import ModelLoadError
from bln_serve.export.loading import compile_config, load, untrusted_compiled


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    tiny("PPMM", 5, "tiny").save(path)
    return path


def test_a_saved_model_loads(model_file: Path) -> None:
    assert load(model_file).name == "tiny"


def test_a_class_of_another_module_is_not_imported(model_file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def name_it(config: dict) -> None:
        config["config"]["layers"][1] |= {"module": "hostile", "class_name": "Layer", "registered_name": "Layer"}

    with pytest.raises(ModelLoadError, match="which names hostile.Layer. No code that a file names is imported"):
        load(rewrite_config(model_file, name_it))
    assert not (tmp_path / "ran").exists()


def test_a_lambda_is_not_run(tmp_path: Path) -> None:
    x = keras.Input((3,))
    path = tmp_path / "lambda.keras"
    keras.Model(x, keras.layers.Lambda(lambda value: value * 2)(x)).save(path)
    with pytest.raises(ModelLoadError, match="which names keras.layers.Lambda. No code"):
        load(path)


def functional_config(*layers: dict, arguments: list | None = None) -> dict:
    """Return the config of a model whose second node calls a class of the file's choice."""
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None, 3], "keras_history": ["x", 0, 0]}}
    return {
        "module": "keras",
        "class_name": "Functional",
        "registered_name": "Functional",
        "config": {
            "name": "hostile",
            "layers": [
                {
                    "module": "keras.layers",
                    "class_name": "InputLayer",
                    "config": {"batch_shape": [None, 3], "name": "x"},
                    "name": "x",
                    "inbound_nodes": [],
                },
                *({**layer, "inbound_nodes": [{"args": arguments or [tensor], "kwargs": {}}]} for layer in layers),
            ],
            "input_layers": [["x", 0, 0]],
            "output_layers": [["x", 0, 0]],
        },
    }


@pytest.mark.parametrize(
    ("layer", "arguments", "named"),
    [
        (
            {"module": "keras.src.ops.core", "class_name": "Switch", "config": {"name": "s"}, "name": "s"},
            [0, [function("keras.layers", "TFSMLayer")], "/nowhere"],
            "keras.src.ops.core.Switch",
        ),
        (
            {"module": "keras.layers", "class_name": "Activation", "config": {"name": "s"}, "name": "s"},
            [function("keras.saving", "KerasFileEditor"), "/nowhere"],
            "keras.saving.KerasFileEditor",
        ),
        (
            {
                "module": "keras.layers",
                "class_name": "Dense",
                "config": {"units": 1, "activation": function("keras.activations", "deserialize")},
                "name": "s",
            },
            None,
            "keras.activations.deserialize",
        ),
        (
            {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "/nowhere"}, "name": "s"},
            None,
            "keras.layers.TFSMLayer",
        ),
        (
            {"module": "kerasplus", "class_name": "Layer", "config": {}, "registered_name": ["x"], "name": "s"},
            None,
            "kerasplus.Layer",
        ),
    ],
    ids=["switch", "function", "deserialize", "saved model", "look-alike"],
)
def test_what_calls_or_carries_code_is_refused_by_name(
    model_file: Path, layer: dict, arguments: list | None, named: str
) -> None:
    def become_hostile(config: dict) -> None:
        config.clear()
        config.update(functional_config(layer, arguments=arguments))

    with pytest.raises(ModelLoadError, match=f"which names {named}. No code that a file names is imported or run"):
        load(rewrite_config(model_file, become_hostile))


def test_the_loss_a_model_was_compiled_with_is_not_looked_up(model_file: Path) -> None:
    def compile_with_own_loss(config: dict) -> None:
        config["compile_config"] = {"loss": {"module": "mymod", "class_name": "MyLoss", "config": {}}}

    assert load(rewrite_config(model_file, compile_with_own_loss)).name == "tiny"


def test_a_model_is_compiled_where_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny("PPMM", 5, "tiny")
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.Huber(),
        metrics=["mae", keras.metrics.MeanMetricWrapper(keras.metrics.mean_squared_error, name="own")],
    )
    x = np.random.default_rng(3).normal(size=(5, 6, 4)).astype("float32")
    model.fit(x, np.ones((5, 3)), batch_size=5, verbose=0)
    model.save(tmp_path / "model.keras")
    assert not load(tmp_path / "model.keras").compiled
    notes: list[str] = []
    loaded = load(tmp_path / "model.keras", compiled=True, notes=notes)
    assert loaded.compiled
    assert notes == []
    assert int(loaded.optimizer.iterations) == 1
    for one, other in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    expected, found = (each.evaluate(x, np.ones((5, 3)), 5, verbose=0, return_dict=True) for each in (model, loaded))
    assert expected == pytest.approx(found, rel=1e-5, abs=0)  # float32 sums


@pytest.mark.parametrize("part", ["optimizer", "loss", "metrics", "weighted_metrics"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_model_was_compiled_with_is_not_imported(
    hostile: str, part: str, model_file: Path, tmp_path: Path, monkeypatch
) -> None:
    item, named = HOSTILE[hostile]
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Loss: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite_config(model_file, compiled_like({part: [item] if "metrics" in part else item}))
    assert untrusted_compiled(compile_config(model_file)) == (named,)
    notes: list[str] = []
    model = load(model_file, compiled=True, notes=notes)
    assert (model.name, model.compiled) == ("tiny", False)
    assert notes == [f"model.keras was compiled with {named}, and no code that a file names is imported or run"]
    assert "hostile" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "part",
    [
        {"loss": function("builtins", "eval")},
        {"optimizer": {"module": "keras.optimizers", "class_name": "Adam", "config": {"no": "such"}}},
        {"no_such_argument": 1},
    ],
    ids=["unknown function", "arguments", "key"],
)
def test_what_keras_cannot_compile_is_loaded_without(part: dict, model_file: Path) -> None:
    notes: list[str] = []
    model = load(rewrite_config(model_file, compiled_like(part)), compiled=True, notes=notes)
    assert (model.name, model.compiled) == ("tiny", False)
    assert [note.partition(": ")[0] for note in notes] == ["Keras cannot build what model.keras was compiled with"]


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # the config alone was compiled
def test_a_file_says_what_it_was_compiled_with(model_file: Path) -> None:
    assert compile_config(model_file) == {}
    notes: list[str] = []
    assert not load(model_file, compiled=True, notes=notes).compiled
    assert notes == []  # nothing is lost
    rewrite_config(model_file, compiled_like({}))
    assert compile_config(model_file)["loss"] == "mse"
    assert untrusted_compiled(compile_config(model_file)) == ()
    assert load(model_file, compiled=True).compiled
    assert compile_config(rewrite_config(model_file, lambda config: config.update(compile_config=["mse"]))) == {}


@pytest.mark.parametrize("name", ["cnn_bs25_full.keras", "cnn_bs25_weights.h5"])
def test_the_reference_implementations_files_are_not_compiled(name: str) -> None:
    assert compile_config(LEGACY / name) == {}


def test_a_function_of_the_files_choice_is_none_of_the_callers(model_file: Path) -> None:
    """A class that is registered lends its name to no function: Keras looks one up by its own name."""
    name = function("keras.saving", "load_model") | {"registered_name": "bln_serve>BatchLayerNormalization"}

    def become_hostile(config: dict) -> None:
        dense = {
            "module": "keras.layers",
            "class_name": "Dense",
            "config": {"units": 1, "activation": name},
            "name": "s",
        }
        config.clear()
        config.update(functional_config(dense))

    with pytest.raises(ModelLoadError, match="which names keras.saving.load_model"):
        load(rewrite_config(model_file, become_hostile))


def test_every_activation_initializer_and_regularizer_of_keras_is_welcome(tmp_path: Path) -> None:
    x = keras.Input((3,))
    y = keras.layers.Dense(
        4, "gelu", kernel_initializer="he_normal", kernel_regularizer="l2", bias_constraint="non_neg"
    )(x)
    y = keras.layers.Activation(keras.activations.swish)(keras.ops.reshape(y, (-1, 2, 2)) + 1.0)
    path = tmp_path / "plain.keras"
    keras.Model(x, keras.layers.LSTM(2, dropout=0.1, recurrent_dropout=0.1)(y)).save(path)
    assert load(path).output_shape == (None, 2)


def test_a_registered_class_of_the_callers_is_welcome(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable(package="callers")
    class Doubling(keras.layers.Layer):
        def call(self, x):
            return x * 2

    x = keras.Input((3,))
    path = tmp_path / "own.keras"
    keras.Model(x, Doubling()(x)).save(path)
    assert isinstance(load(path).layers[-1], Doubling)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="which is not there or is no file"):
        load(tmp_path / "none.keras")


def test_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.pb").write_bytes(b"\x0a")
    with pytest.raises(ModelLoadError, match=r"Expected a \.keras or \.h5 file\. Received: model\.pb"):
        load(tmp_path / "model.pb")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_what_is_no_zip(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(content)
    with pytest.raises(ModelLoadError, match="to be a .keras file: a zip archive"):
        load(tmp_path / "model.keras")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", "[]")
    with pytest.raises(ModelLoadError, match="a config.json that holds a list"):
        load(tmp_path / "model.keras")


def test_a_truncated_file(model_file: Path) -> None:
    model_file.write_bytes(model_file.read_bytes()[:-2000])
    with pytest.raises(ModelLoadError, match="a zip archive"):
        load(model_file)


def test_weights_that_are_damaged(model_file: Path) -> None:
    with zipfile.ZipFile(model_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["model.weights.h5"] = members["model.weights.h5"][:500]
    with zipfile.ZipFile(model_file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelLoadError, match="Keras cannot load model.keras: "):
        load(model_file)
