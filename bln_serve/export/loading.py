"""Loading a .keras file without running any code that the file brings or names.

A .keras file is a zip with a config that names Python classes. Keras imports the module of a class it does not know;
here a config may name only Keras itself, bln_serve.layers, and what the calling program registered beforehand. Keras's
safe mode, which is on, refuses lambdas.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

import bln_serve.layers  # noqa: F401 - registers the layer, so that its files load
from bln_serve.errors import ModelLoadError

_CONFIG = "config.json"
_TRUSTED_PACKAGES = ("keras", "builtins", "bln_serve.layers")


def load(path: Path) -> Any:
    """Load a `.keras` file.

    Args:
        path: a file that `model.save("NAME.keras")` wrote.

    Returns:
        The Keras model, not compiled.

    Raises:
        ModelLoadError: the file is missing, of another format, damaged, or names code that is not trusted.
    """
    if not path.is_file():
        raise ModelLoadError(f"Expected a Keras model file. Received: {path}, which is not there or is no file.")
    if path.suffix != ".keras":
        raise ModelLoadError(
            f"Expected a .keras file. Received: {path.name}. Load it in Keras and save it again: "
            "model.save('NAME.keras')."
        )
    for named in _foreign_classes(_read_config(path)):
        raise ModelLoadError(
            f"Expected a model of Keras's own layers and bln_serve's. Received: {path.name}, which names {named}. "
            "No code that a file names is imported: register the class with keras.saving.register_keras_serializable "
            "and call bln_serve.export.export on the loaded model from Python."
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in Keras, zipfile or h5py
        raise ModelLoadError(f"Keras cannot load {path.name}: {_first_line(error)}") from error


def _read_config(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_CONFIG) as config:
            return json.load(config)
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"Expected {path.name} to be a .keras file: a zip archive with {_CONFIG}. Received: {_first_line(error)}."
        ) from error


def _foreign_classes(config: Any) -> Iterator[str]:
    """Yield what the config names outside the trusted packages and the caller's registered classes."""
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        pending.extend(item.values())
        module, name = item.get("module"), item.get("class_name")
        if name is None or not isinstance(module, str):
            continue
        trusted = any(module == package or module.startswith(f"{package}.") for package in _TRUSTED_PACKAGES)
        registered = item.get("registered_name")
        if not trusted and keras.saving.get_registered_object(registered) is None:
            yield f"{module}.{name}"
        if name == "Lambda":
            yield "a Lambda layer, which carries code"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
