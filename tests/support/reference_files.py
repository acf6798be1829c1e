"""Files of the reference implementation: those recorded, altered copies, and models written as Keras 2 would."""

import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from bln_serve.layers import BatchLayerNormalization

LEGACY = Path(__file__).parents[1] / "golden" / "legacy"
FULL = LEGACY / "cnn_bs25_full_noopt.h5"
GAMMA = "model_weights/bn1/bn1/scale1:0"
BATCH_MEAN = "model_weights/bn1/bn1/moving_Bmean:0"
_NAMES = {
    "gamma": "scale1",
    "beta": "shift1",
    "population_batch_mean": "moving_Bmean",
    "population_batch_var": "moving_Bvar",
    "population_feature_mean": "moving_Fmean",
    "population_feature_var": "moving_Fvar",
}


def replace(file: Any, name: str, value: Any) -> None:
    """Put another value in the place of a dataset."""
    del file[name]
    file[name] = value


def paper_cnn(m: int = 25, classes: int = 10) -> Any:
    """Return the paper's CNN, untrained, with the layer names of the recorded files."""
    x = image = keras.Input((32, 32, 3))
    for number, (filters, padding) in enumerate(((6, "same"), (16, "valid")), start=1):
        x = keras.layers.Conv2D(filters, 5, padding=padding, activation="tanh")(x)
        x = BatchLayerNormalization(m, name=f"bn{number}")(keras.layers.AveragePooling2D(2)(x))
    x = keras.layers.Flatten()(x)
    for number, units in ((1, 120), (2, 84)):
        x = keras.layers.Dense(units, activation="tanh", name=f"dense{number}")(x)
        x = BatchLayerNormalization(m, name=f"bn{number + 2}")(x)
    return keras.Model(image, keras.layers.Dense(classes, name="dense3")(x))


def edited(target: Path, change: Callable[[Any], Any], source: Path = FULL) -> Path:
    """Copy a file and let `change` alter it through h5py."""
    shutil.copyfile(source, target)
    target.chmod(0o644)
    with h5py.File(target, "r+") as file:
        change(file)
    return target


def with_config(target: Path, change: Callable[[Any], Any]) -> Path:
    """Copy the recorded full model and let `change` alter its config."""

    def write(file: Any) -> None:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(change(config) or config)

    return edited(target, write)


def layer_of(config: Any, name: str) -> Any:
    """Return a layer's entry in a config."""
    return next(item for item in config["config"]["layers"] if item["config"]["name"] == name)


def write_as_keras_2(model: Any, target: Path, layers: list[Any], batchcount: float = 4.0) -> Path:
    """Write a sequence of layers as a full .h5, with the weights that `model` has under the same names."""
    config = {"class_name": "Sequential", "config": {"name": "sequential", "layers": layers}}
    with h5py.File(target, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        for layer in model.layers:
            for name, value in _stored(layer, batchcount):
                file[f"model_weights/{layer.name}/{layer.name}/{name}:0"] = value
    return target


def write_archive_as_keras_2(model: Any, target: Path, layers: list[Any]) -> Path:
    """Write the same as a .keras file, where groups are named after classes and weights have numbers."""
    order = ("scale1", "shift1", "Variable", "moving_Bmean", "moving_Bvar", "moving_Fmean", "moving_Fvar", "batchcount")
    names = {"TimeDistributed": "time_distributed", "LeakyReLU": "leaky_re_lu"}
    names |= {"BatchNormalization": "batch_normalization", "LayerNormalization": "layer_normalization"}
    seen: Counter[str] = Counter()
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for item in layers[1:]:
            layer = model.get_layer(item["config"]["name"])
            kind = names.get(item["class_name"], item["class_name"].lower())
            place = f"layers/{kind}" + (f"_{seen[kind]}" if seen[kind] else "")
            seen[kind] += 1
            below = "/cell" if hasattr(layer, "cell") else "/layer" if kind == "time_distributed" else ""
            stored = list(_stored(layer, 4.0))
            if isinstance(layer, BatchLayerNormalization):
                stored.sort(key=lambda weight: order.index(weight[0]))
            for number, (_, value) in enumerate(stored):
                file[f"{place}{below}/vars/{number}"] = value
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "sequential", "layers": layers}}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return target


def entry(class_name: str, **config: Any) -> Any:
    """Return a layer's entry in the config of a Sequential model."""
    return {"class_name": class_name, "config": {"trainable": True, "dtype": "float32", **config}}


def _stored(layer: Any, batchcount: float) -> Any:
    cell = getattr(layer, "cell", None)
    for variable in layer.weights:
        name = f"{cell.name}/{variable.name}" if cell is not None else variable.name
        if not isinstance(layer, BatchLayerNormalization):
            yield name, np.asarray(variable)
        elif variable.name in _NAMES:
            yield _NAMES[variable.name], np.asarray(variable, "float32")
    if isinstance(layer, BatchLayerNormalization):
        yield "Variable", np.float32(layer.epsilon)
        yield "batchcount", np.float32(batchcount)
