"""Loading a .keras file without running any code that the file brings or names.

A .keras file is a zip with a config that names Python classes and functions, which Keras looks up, imports and calls
with arguments from the file. Its safe mode, which is on, refuses lambdas and foreign modules' pickles, and not more. So
the config is read first, and may name only

    classes     Keras's own but those that load programs or call what they are given, bln_serve.layers's, and what the
                calling program registered beforehand
    functions   of Keras's rooms of plain mathematics: activations, initializers, ...

The compile_config at the top is not looked at unless it is asked for: `load(compiled=True)` compiles the model, and
`scoring` takes its loss and metrics. It then may name only Keras's own losses, metrics and optimizers, and what the
calling program registered.

Files of the reference implementation, .h5 or .keras, are read by bln_serve.layers.reference_files, without Keras. A
file of weights alone needs an architecture, which the caller names: a .keras file, or a function of the caller's own.
"""

import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

import bln_serve.layers  # noqa: F401 - registers the layer, so that its files load
from bln_serve.errors import ModelLoadError, UsageError
from bln_serve.layers import reference_files

_CONFIG = "config.json"
_TRUSTED_PACKAGES = ("keras", "builtins", "bln_serve.layers")
_COMPILE_PACKAGES = (
    "builtins",
    *(f"{package}.{room}" for package in ("keras", "keras.src") for room in ("losses", "metrics", "optimizers")),
)
_FUNCTION_MODULES = (
    "builtins",  # Keras's word for the rooms below
    *(f"keras.{room}" for room in ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")),
)
_CARRIERS = ("FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper", "__lambda__")
_CALLERS = (
    *("AssociativeScan", "Cond", "CustomGradient", "ForiLoop", "Map", "Scan", "Switch", "VectorizedMap", "WhileLoop"),
    *("deserialize", "get", "serialize"),
)


def load(
    source: Any,
    architecture: str | Path | Callable[[], Any] | None = None,
    *,
    compiled: bool = False,
    notes: list[str] | None = None,
) -> Any:
    """Load a `.keras` or `.h5` file.

    Args:
        source: the path of a file that `model.save("NAME.keras")` wrote, or of one of the reference implementation:
            `best_model.h5`, weights alone, or `.keras` as Keras 2 wrote it. A model is returned as it is.
        architecture: the model that an `.h5` file's weights belong to: a `.keras` file, "module:function" or the
            function itself, which returns a built model. It replaces the architecture in the file, if there is one.
        compiled: compile the model as a `.keras` file says, with the optimizer's state, if all that it names is
            trusted and Keras can build it. Otherwise the model comes without, as its `compiled` says.
        notes: takes why a model that was compiled comes without.

    Returns:
        The Keras model, not compiled unless asked for.

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
    _require_file(path)
    if path.suffix in reference_files.SUFFIXES:
        return reference_files.load_h5(path, None if architecture is None else _architecture(architecture))
    config = _read_config(path)
    if reference_files.names_reference_layers(config):
        return reference_files.load_keras(path)
    compile_config = config.pop("compile_config", None)
    for named in _untrusted(config, _TRUSTED_PACKAGES):
        raise ModelLoadError(
            f"Expected a model of Keras's own layers and bln_serve's. Received: {path.name}, which names {named}. "
            "No code that a file names is imported or run: if it is yours, register it with "
            "keras.saving.register_keras_serializable and call bln_serve.export.export on the model from Python."
        )
    notes = [] if notes is None else notes
    if not compiled or not compile_config:
        return _loaded(path, None)
    if untrusted := untrusted_compiled(compile_config):
        notes.append(f"{path.name} was compiled with {untrusted[0]}, and no code that a file names is imported or run")
        return _loaded(path, None)
    return _loaded(path, notes)


def compile_config(path: Path) -> dict[str, Any]:
    """Read what a model file says of how it was compiled, without building any of it.

    Returns:
        The loss, metrics and optimizer as Keras serialised them, which `untrusted_compiled` must see before Keras does;
        nothing for a model that was not compiled and for the reference implementation's files.

    Raises:
        ModelLoadError: the file is missing, of another format or damaged.
    """
    _require_file(path)
    if path.suffix in reference_files.SUFFIXES:
        return {}
    config = _read_config(path)
    found = None if reference_files.names_reference_layers(config) else config.get("compile_config")
    return found if isinstance(found, dict) else {}


def untrusted_compiled(part: Any) -> tuple[str, ...]:
    """Return what a compile_config, or a part of one, names other than Keras's own losses, metrics and optimizers."""
    return tuple(_untrusted(part, _COMPILE_PACKAGES))


def imported(name: str, what: str, forms: str) -> Any:
    """Import a function that the caller named, from where Python finds modules or the current folder.

    Args:
        name: "module:function".
        what: what it stands for, for messages, such as "an architecture".
        forms: what the caller may write, for messages.

    Raises:
        UsageError: the name has another form, the module does not import, or it has no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"Expected {what} as {forms}. Received: {name!r}.")
    try:
        with _current_folder():
            found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UsageError(f"Expected {what}'s module {module} to import. It raised: {error!r}.") from error
    if not callable(found):
        raise UsageError(f"Expected a function {function} in module {module}. Received: {found!r}.")
    return found


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelLoadError(f"Expected a Keras model file. Received: {path}, which is not there or is no file.")
    if path.suffix not in (".keras", *reference_files.SUFFIXES):
        raise ModelLoadError(
            f"Expected a .keras or .h5 file. Received: {path.name}. Load it in Keras and save it again: "
            "model.save('NAME.keras')."
        )


def _loaded(path: Path, compiled: list[str] | None) -> Any:
    """Load a file, compiled if there is a list, which takes why it cannot be."""
    try:
        return keras.saving.load_model(path, compile=compiled is not None, safe_mode=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in Keras, zipfile or h5py
        if compiled is not None:
            model = _loaded(path, None)
            compiled.append(f"Keras cannot build what {path.name} was compiled with: {_first_line(error)[:200]}")
            return model
        raise ModelLoadError(f"Keras cannot load {path.name}: {_first_line(error)}") from error


def _architecture(source: str | Path | Callable[[], Any]) -> Any:
    """Return the model that the caller names."""
    if isinstance(source, str | Path) and Path(source).suffix == ".keras":
        return load(Path(source))
    make = source if callable(source) else imported(str(source), "an architecture", "model.keras or module:function")
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


def _untrusted(config: Any, packages: Sequence[str]) -> Iterator[str]:
    """Yield what a config names and may not, where its classes may be of some packages."""
    for item in reference_files.objects(config):
        if "class_name" in item and not _is_trusted(item, packages):
            named = item.get("config") if item["class_name"] == "function" else item["class_name"]
            yield f"{item.get('module') or 'no module'}.{named}"


def _is_trusted(item: dict[str, Any], packages: Sequence[str]) -> bool:
    """Whether an entry names a class or function that loading may look up."""
    module, name, registered = item.get("module"), item["class_name"], item.get("registered_name")
    if name == "function":
        name = registered = item.get("config")  # Keras looks a function up by this name alone
        trusted = module is None or module in _FUNCTION_MODULES
    else:
        trusted = module is None or any(f"{module}.".startswith(f"{package}.") for package in packages)
    if name in _CARRIERS or name in _CALLERS:
        return False
    return trusted or (isinstance(registered, str) and keras.saving.get_registered_object(registered) is not None)


def _first_line(error: BaseException) -> str:
    """Return the first line of what went wrong first: Keras wraps it in sentences about the outermost object."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip() or type(error).__name__).splitlines()[0]
