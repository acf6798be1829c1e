"""A model file is data: what it names is not imported, what it carries is not run, what is broken is said."""

import json
import zipfile
from pathlib import Path

import keras
import pytest
from support.models import tiny

from bln_serve.errors import ModelLoadError
from bln_serve.export.loading import load


def rewrite_config(path: Path, change) -> Path:
    """Apply `change` to the config inside a .keras file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


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


def function(module: str, name: str) -> dict:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


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
