"""Hostile configs in a file of the reference: an error, and nothing that they name is looked up or run."""

import json
import marshal
import os
import pickle
import sys
import zipfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import keras
import pytest
from support.models import bln
from support.reference_files import LEGACY, layer_of, with_config

from bln_serve.errors import ModelLoadError
from bln_serve.layers import bln_layers
from bln_serve.layers.reference_files import load_h5, load_keras, names_reference_layers

# Hostile configs.


class Runs:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


CODE = b64encode(marshal.dumps(compile("import os; os.mkdir('ran')", "hostile", "exec"))).decode()
FUNCTION = {"class_name": "__lambda__", "config": {"code": CODE, "defaults": None, "closure": None}}


def lambda_layer(config: Any) -> None:
    layer_of(config, "flatten").update(
        class_name="Lambda",
        config={"name": "flatten", "function": [CODE, None, None], "function_type": "lambda", "module": "__main__"},
    )


def marshalled_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = FUNCTION


def pickled_setting(config: Any) -> None:
    pickled = {"class_name": "__bytes__", "config": b64encode(pickle.dumps(Runs())).decode()}
    layer_of(config, "conv2d")["config"]["padding"] = pickled


def marshalled_regularizer(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["kernel_regularizer"] = FUNCTION


def constraint_as_regularizer(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["kernel_regularizer"] = {"class_name": "NonNeg", "config": {}}


def looked_up_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = "deserialize"


def changed_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = "hard_sigmoid"


def unknown_setting(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["surprise"] = 1


def new_setting(config: Any) -> None:
    layer_of(config, "conv2d")["config"].update(lora_rank=10**9)
    layer_of(config, "dense1").update(class_name="Dense")
    layer_of(config, "dense1")["config"].update(lora_rank=10**9)


def foreign_layer(config: Any) -> None:
    layer_of(config, "flatten").update(class_name="hostile>Layer", module="hostile")


def file_reader(config: Any) -> None:
    layer_of(config, "flatten").update(class_name="TFSMLayer", config={"name": "flatten", "filepath": "/nowhere"})


def wrapped_lambda(config: Any) -> None:
    inner = {"class_name": "Lambda", "config": {"function": [CODE, None, None]}}
    layer_of(config, "flatten").update(class_name="TimeDistributed", config={"name": "flatten", "layer": inner})


def huge_layer(config: Any) -> None:
    layer_of(config, "dense1")["config"]["units"] = 10**12


def huge_input(config: Any) -> None:
    layer_of(config, "input")["config"]["batch_input_shape"] = [25, 10**6, 10**6, 3]


def huge_m(config: Any) -> None:
    layer_of(config, "bn1")["config"]["self.batchsize"] = 10**12


def no_m(config: Any) -> None:
    del layer_of(config, "bn1")["config"]["self.batchsize"]


def loop(config: Any) -> None:
    layer_of(config, "conv2d")["inbound_nodes"] = [[["dense3", 0, 0, {}]]]


def call_arguments(config: Any) -> None:
    layer_of(config, "bn1")["inbound_nodes"] = [[["average_pooling2d", 0, 0, {"training": True}]]]


def nodes_of_keras_3(config: Any) -> None:
    layer_of(config, "conv2d")["inbound_nodes"] = [{"args": [FUNCTION], "kwargs": {}}]


def no_such_output(config: Any) -> None:
    config["config"]["output_layers"] = [["dense3", 7, 0]]


def twice_the_name(config: Any) -> None:
    config["config"]["layers"].append(layer_of(config, "conv2d"))


def many_layers(config: Any) -> None:
    config["config"]["layers"] *= 200


def a_layer_as_the_model(config: Any) -> Any:
    return layer_of(config, "conv2d")


def bad_value(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["padding"] = "sideways"


CONFIGS = [
    (
        lambda_layer,
        r"standard layers and the reference's\. Received: one that names Lambda\. No code that a file names is",
    ),
    (marshalled_activation, r"Expected an activation among .*\. Received: dict .*\. No code that a file names"),
    (pickled_setting, r"Expected numbers, texts and lists as a layer's settings\. Received: dict .*\. No code"),
    (marshalled_regularizer, r"Expected a kernel_regularizer among L1, .*\. Received: '__lambda__'"),
    (constraint_as_regularizer, r"Expected a kernel_regularizer\. Received: NonNeg"),
    (looked_up_activation, r"Expected an activation among .*\. Received: 'deserialize'"),
    (changed_activation, r"Expected an activation among .*\. Received: 'hard_sigmoid'"),
    (unknown_setting, r"Expected settings of Conv2D that Keras 3 has\. Received: 'surprise', 1"),
    (new_setting, r"Expected settings of Conv2D that Keras 3 has\. Received: 'lora_rank', 1000000000"),
    (foreign_layer, r"Received: one that names Layer\. No code that a file names is imported or run"),
    (file_reader, r"Received: one that names TFSMLayer\. No code"),
    (wrapped_lambda, r"Received: one that names TimeDistributed\. No code"),
    (huge_layer, r"Received: a weight of shape \(576, 1000000000000\), 576000000000000 numbers where \d+ are left"),
    (huge_input, r"Expected the layers to have the weights that the file stores\. Received: a weight of shape"),
    (huge_m, r"Expected the layers to have the weights that the file stores\. Received: a weight of shape"),
    (no_m, r"Expected a config of Keras 2, with a int 'self\.batchsize'\. Received: None"),
    (loop, r"Expected every layer to be reached\. Received: 'conv2d' is not"),
    (call_arguments, r"Expected \[layer, node, tensor\] without further arguments\. Received: list .*'training': True"),
    (nodes_of_keras_3, r"Expected the nodes of Keras 2, which are lists\. Received: dict"),
    (no_such_output, r"Expected output_layers to name tensors of the model\. Received: list"),
    (twice_the_name, r"Expected layers with different names\. Received: conv2d twice"),
    (many_layers, r"Expected at most 2000 layers\. Received: 3000"),
    (a_layer_as_the_model, r"Received: one that names Conv2D\. No code"),
    (bad_value, r"Expected a model that Keras 3 can build\. Received: .*\. No code that a file names"),
]


@pytest.mark.parametrize(("change", "sentence"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_config_that_names_or_asks_for_what_it_may_not(change, sentence: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('ran')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=sentence):
        load_h5(with_config(tmp_path / "a.h5", change))
    assert not (tmp_path / "ran").exists()
    assert "hostile" not in sys.modules


def test_what_leaves_a_mark_can_leave_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs()))
    assert (tmp_path / "ran").exists()


def test_the_module_that_a_keras_file_names_for_the_layer_is_not_imported(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "helpers"
    package.mkdir()
    for name in ("__init__", "bln_layer", "dense_layer"):
        (package / f"{name}.py").write_text("import os\nos.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(bln_layers(load_keras(LEGACY / "cnn_bs25_full.keras"))) == 4
    assert not (tmp_path / "ran").exists()
    assert not any(name.startswith("helpers") for name in sys.modules)


def test_the_layers_of_the_reference_are_told_from_ours() -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        assert names_reference_layers(json.loads(archive.read("config.json")))
    model = keras.Sequential([keras.Input((3,)), bln(4, "PPMM"), keras.layers.Dense(1)])
    assert not names_reference_layers(json.loads(model.to_json()))
