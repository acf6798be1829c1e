"""The files of the reference implementation's users, as Keras 3 models: .h5, and .keras as Keras 2 wrote it.

    best_model.h5      the config as JSON in the attribute model_config, weights by layer name under model_weights/
    weights.h5         weights by layer name: the model comes from elsewhere
    model.keras        a zip of config.json and model.weights.h5, weights by class and number: layers/bln_layer_1/vars/0

The reference itself cannot load a model it saved (its config has a key 'self.batchsize' that its constructor does not
know). Neither Keras's loaders nor any class or module that a file names have a part in this; see the modules used.
"""

import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bln_serve.errors import ModelLoadError
from bln_serve.layers._reference_config import WAY_OUT, class_of, field, parse
from bln_serve.layers._reference_model import build
from bln_serve.layers._reference_weights import assign
from bln_serve.layers._stored_arrays import Arrays, Way, opened

SUFFIXES = (".h5", ".hdf5")
_ARCHIVED_WEIGHTS = "model.weights.h5"
_MAX_INFLATION = 100


def load_h5(path: Path, architecture: Any | None = None) -> Any:
    """Load a full model or weights that Keras 2 wrote as HDF5.

    Args:
        path: the file.
        architecture: a built Keras 3 model to put the weights into; it is changed. None to build the file's own.

    Returns:
        The Keras model, not compiled: `architecture` if given.

    Raises:
        ModelLoadError: the file is damaged, foreign or not safe to read, is of another model, or holds no model and
            `architecture` is None.
    """
    with _named(path):
        with opened(path) as file:
            config = file.text("model_config")
            group = file.group("model_weights")
            if config is None and architecture is None:
                raise ModelLoadError(
                    "Expected a model with its config. Received: a file of weights, or of something else. Name the "
                    "model the weights belong to: --architecture model.keras or --architecture module:function."
                )
            arrays = file.arrays(file.root if group is None else group)
        stored: dict[str, Arrays] = {}
        for (layer, *below), array in arrays.items():
            stored.setdefault(layer, {})[tuple(below)] = array
        model = _built(parse(config or ""), arrays) if architecture is None else architecture
        assign(model, stored)
        return model


def load_keras(path: Path) -> Any:
    """Load a `.keras` file that Keras 2 wrote for a model of the reference.

    Args:
        path: the file, of which `names_reference_layers` is true.

    Returns:
        The Keras model, not compiled.

    Raises:
        ModelLoadError: the file is damaged, or not safe to read.
    """
    with _named(path):
        config_text, weights = (_member(path, name) for name in ("config.json", _ARCHIVED_WEIGHTS))
        config = parse(config_text)
        with opened(io.BytesIO(weights)) as file:
            arrays = {
                way: array
                for name in ("layers", "_layer_checkpoint_dependencies")
                if (group := file.group(name)) is not None
                for way, array in file.arrays(group).items()
            }
        model = _built(config, arrays)
        assign(model, {name: dict(_below(place, arrays, item)) for name, place, item in _places(config)})
        return model


def names_reference_layers(config: Any) -> bool:
    """Whether a `.keras` file's config is Keras 2's, of a model with the reference's own layers."""
    keys = {"bln_layer": "self.batchsize", "dense_layer": "random_seed"}
    for item in objects(config):
        inner, kind = item.get("config"), str(item.get("class_name")).rpartition(">")[2]
        if isinstance(inner, dict) and kind in keys and keys[kind] in inner:
            return True
    return False


def objects(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a parsed JSON document, at any depth."""
    pending = [config]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
            yield item


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it, and what Keras has to say into a sentence."""
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"{path.name}: {error}") from error
    except Exception as error:  # whatever a damaged or hostile file provokes in Keras or zipfile
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f"{path.name}: Expected a model that Keras 3 can build. Received: {reason[:200]}. {WAY_OUT}"
        ) from error


def _built(config: Any, arrays: Arrays) -> Any:
    return build(config, sum(array.size for array in arrays.values()))


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(name)
            if info.file_size > _MAX_INFLATION * info.compress_size:
                raise ModelLoadError(
                    f"Expected {name} to be at most {_MAX_INFLATION} times its compressed size. Received: "
                    f"{info.file_size} bytes from {info.compress_size}. {WAY_OUT}"
                )
            return archive.read(info)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise ModelLoadError(
            f"Expected a whole .keras file, a zip archive with {name}. Received: {error}. Copy or save it again."
        ) from error


def _places(config: Any) -> Iterator[tuple[str, Way, Any]]:
    """Yield each layer of a config by name, the group it has among its model's, and its own entry."""
    before: Counter[str] = Counter()
    for item in field(field(config, "config", dict), "layers", list):
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", class_of(item)).lower()
        place = f"{kind}_{before[kind]}" if before[kind] else kind
        before[kind] += 1
        # A layer of a Sequential has its name in its config alone.
        yield field(field(item, "config", dict), "name", str), (place,), item


def _below(place: Way, arrays: Arrays, item: Any) -> Iterator[tuple[Way, Any]]:
    """Yield the arrays of a layer by the way below it, where a nested model's layers go by their names."""
    here = {way[len(place) :]: array for way, array in arrays.items() if way[: len(place)] == place}
    if "layers" not in item["config"]:
        yield from here.items()
        return
    for name, inner, inner_item in _places(item):
        for way, array in _below(("layers", *inner), here, inner_item):
            yield (name, *way), array
