"""Loading a .keras file without running any code that the file brings or names.

A .keras file is a zip with a config that names Python classes and functions, which Keras looks up, imports and calls
with arguments from the file. Its safe mode, which is on, refuses lambdas and foreign modules' pickles, and not more. So
the config is read first, and may name only

    classes     Keras's own but those that load programs or call what they are given, bln_serve.layers's, and what the
                calling program registered beforehand
    functions   of Keras's rooms of plain mathematics: activations, initializers, ...

The compile_config at the top is not looked at: it is not loaded.
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
_FUNCTION_MODULES = (
    "builtins",  # Keras's word for the rooms below
    *(f"keras.{room}" for room in ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")),
)
_CARRIERS = ("FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper", "__lambda__")
_CALLERS = (
    *("AssociativeScan", "Cond", "CustomGradient", "ForiLoop", "Map", "Scan", "Switch", "VectorizedMap", "WhileLoop"),
    *("deserialize", "get", "serialize"),
)


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
    for named in _untrusted(_read_config(path)):
        raise ModelLoadError(
            f"Expected a model of Keras's own layers and bln_serve's. Received: {path.name}, which names {named}. "
            "No code that a file names is imported or run: if it is yours, register it with "
            "keras.saving.register_keras_serializable and call bln_serve.export.export on the model from Python."
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


def _untrusted(config: Any) -> Iterator[str]:
    """Yield what the config names and may not."""
    pending = [value for key, value in config.items() if key != "compile_config"] if isinstance(config, dict) else []
    pending.append({key: config.get(key) for key in ("module", "class_name", "registered_name")} if pending else {})
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
            if "class_name" in item and not _is_trusted(item):
                named = item.get("config") if item["class_name"] == "function" else item["class_name"]
                yield f"{item.get('module') or 'no module'}.{named}"


def _is_trusted(item: dict[str, Any]) -> bool:
    """Whether an entry names a class or function that loading may look up."""
    module, name, registered = item.get("module"), item["class_name"], item.get("registered_name")
    if name == "function":
        name, modules = item.get("config"), _FUNCTION_MODULES
        trusted = module is None or module in modules
    else:
        trusted = module is None or any(f"{module}.".startswith(f"{package}.") for package in _TRUSTED_PACKAGES)
    if name in _CARRIERS or name in _CALLERS:
        return False
    return trusted or (isinstance(registered, str) and keras.saving.get_registered_object(registered) is not None)


def _first_line(error: BaseException) -> str:
    """Return the first line of what went wrong first: Keras wraps it in sentences about the outermost object."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip() or type(error).__name__).splitlines()[0]
