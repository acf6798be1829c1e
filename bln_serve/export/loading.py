"""Loading a .keras file without running any code that the file brings or names.

A .keras file is a zip with a config that names Python classes and functions, which Keras looks up, imports and calls
with arguments from the file. Its safe mode, which is on, refuses lambdas and foreign modules' pickles, and not more. So
the config is read first, and may name only

    classes     Keras's own but those that load programs or call what they are given, bln_serve.layers's, and what the
                calling program registered beforehand
    functions   of Keras's rooms of plain mathematics: activations, initializers, ...

The compile_config at the top is not looked at: it is not loaded.

Files of the reference implementation, .h5 or .keras, are read by bln_serve.layers.reference_files, without Keras. A
file of weights alone needs an architecture, which the caller names: a .keras file, or a function of the caller's own.
"""

import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

import bln_serve.layers  # noqa: F401 - registers the layer, so that its files load
from bln_serve.errors import ModelLoadError, UsageError
from bln_serve.layers import reference_files

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


def load(source: Any, architecture: str | Path | Callable[[], Any] | None = None) -> Any:
    """Load a `.keras` or `.h5` file.

    Args:
        source: the path of a file that `model.save("NAME.keras")` wrote, or of one of the reference implementation:
            `best_model.h5`, weights alone, or `.keras` as Keras 2 wrote it. A model is returned as it is.
        architecture: the model that an `.h5` file's weights belong to: a `.keras` file, "module:function" or the
            function itself, which returns a built model. It replaces the architecture in the file, if there is one.

    Returns:
        The Keras model, not compiled.

    Raises:
        ModelLoadError: the file is missing, of another format, damaged, or names code that is not trusted.
        UsageError: the architecture cannot be had, or `source` is no `.h5` file.
    """
    if architecture is not None and not (isinstance(source, Path) and source.suffix in reference_files.SUFFIXES):
        received = source.name if isinstance(source, Path) else "a model"
        raise UsageError(f"Expected --architecture with an .h5 file. Received: {received}, which has its own.")
    if not isinstance(source, Path):
        return source
    path = source
    if not path.is_file():
        raise ModelLoadError(f"Expected a Keras model file. Received: {path}, which is not there or is no file.")
    if path.suffix in reference_files.SUFFIXES:
        return reference_files.load_h5(path, None if architecture is None else _architecture(architecture))
    if path.suffix != ".keras":
        raise ModelLoadError(
            f"Expected a .keras or .h5 file. Received: {path.name}. Load it in Keras and save it again: "
            "model.save('NAME.keras')."
        )
    config = _read_config(path)
    if reference_files.names_reference_layers(config):
        return reference_files.load_keras(path)
    for named in _untrusted(config):
        raise ModelLoadError(
            f"Expected a model of Keras's own layers and bln_serve's. Received: {path.name}, which names {named}. "
            "No code that a file names is imported or run: if it is yours, register it with "
            "keras.saving.register_keras_serializable and call bln_serve.export.export on the model from Python."
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in Keras, zipfile or h5py
        raise ModelLoadError(f"Keras cannot load {path.name}: {_first_line(error)}") from error


def _architecture(source: str | Path | Callable[[], Any]) -> Any:
    """Return the model that the caller names."""
    if isinstance(source, str | Path) and Path(source).suffix == ".keras":
        return load(Path(source))
    make = source if callable(source) else _function(str(source))
    try:
        model = make()
    except Exception as error:
        raise UsageError(f"Expected the architecture {source} to return a model. It raised: {error!r}.") from error
    if not isinstance(model, keras.Model) or not model.built:
        raise UsageError(
            f"Expected the architecture {source} to return a built Keras model. Received: {type(model).__name__}. Give "
            "the model an Input with a fixed shape."
        )
    return model


def _function(name: str) -> Any:
    """Import a function that the caller named, from where Python finds modules or the current folder."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"Expected an architecture as model.keras or module:function. Received: {name!r}.")
    try:
        with _current_folder():
            found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UsageError(f"Expected the architecture's module {module} to import. It raised: {error!r}.") from error
    if not callable(found):
        raise UsageError(f"Expected a function {function} in module {module}. Received: {found!r}.")
    return found


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let modules be imported from the current folder, which an installed command does not look into."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_CONFIG) as file:
            config = json.load(file)
            if not isinstance(config, dict):
                raise ValueError(f"a {_CONFIG} that holds a {type(config).__name__}")
            return config
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"Expected {path.name} to be a .keras file: a zip archive with {_CONFIG}. Received: {_first_line(error)}."
        ) from error


def _untrusted(config: Any) -> Iterator[str]:
    """Yield what the config names and may not."""
    loaded = {key: value for key, value in config.items() if key != "compile_config"}
    for item in reference_files.objects(loaded):
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
