"""Keras files whose config says what no model of anybody's says."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
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


def function(module: str, name: str) -> dict[str, Any]:
    """Return how a config names a function."""
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def compiled_like(part: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return a change of a config that compiles the model with a part, and otherwise as Keras does."""
    adam = {"module": "keras.optimizers", "class_name": "Adam", "config": {"name": "adam", "learning_rate": 0.001}}
    return lambda config: config.update(compile_config={"optimizer": adam, "loss": "mse", **part})


# What a loss, a metric or an optimizer might name, and what is said of it.
HOSTILE = {
    "class": ({"module": "hostile", "class_name": "Loss", "config": {}, "registered_name": "Loss"}, "hostile.Loss"),
    "function": (function("os", "system"), "os.system"),
    "loader": (function("keras.saving", "load_model"), "keras.saving.load_model"),
    "registered": (
        function("keras.saving", "load_model") | {"registered_name": "bln_serve>BatchLayerNormalization"},
        "keras.saving.load_model",
    ),
    "deserialize": (function("builtins", "deserialize"), "builtins.deserialize"),
    "lambda": ({"class_name": "__lambda__", "config": {"value": ["", None, None]}}, "no module.__lambda__"),
    "layer": ({"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}}, "keras.layers.Dense"),
    "look-alike": ({"module": "keras.lossesplus", "class_name": "L", "config": {}}, "keras.lossesplus.L"),
    "within": (
        {
            "module": "keras.metrics",
            "class_name": "MeanMetricWrapper",
            "config": {"name": "n", "fn": function("hostile", "metric")},
        },
        "hostile.metric",
    ),
}
