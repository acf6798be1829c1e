"""The values in a config that Keras 2 wrote, as arguments that a Keras 3 layer may be called with.

Only plain values pass: numbers, texts, None and lists of them. A text that Keras would look something up by, such as an
activation, is on a list here. Initializers are left out, since the weights are loaded; penalties and constraints are
kept, so that the model can be trained on.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from bln_serve.errors import ModelLoadError

WAY_OUT = (
    "No code that a file names is imported or run. Build the model in Keras 3 and take the weights alone: "
    "--architecture module:function or --architecture model.keras."
)

# Not hard_sigmoid: the same name is another function in Keras 3.
_ACTIVATIONS = (
    *("elu", "exponential", "gelu", "leaky_relu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softplus", "softsign", "swish", "tanh"),
)
_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16"),
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
_PENALTIES = ("L1", "L2", "L1L2", "MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm")
# Arguments that Keras 3 has added, each with a meaning of its own.
_NEW = ("lora_rank", "lora_alpha", "quantization_config", "weights")
# Keys that Keras 2 wrote and that change no answer.
_WITHOUT_EFFECT = ("batch_input_shape", "fused", "implementation", "input_length", "module", "registered_name")
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope"}
_MAX_DEPTH = 64


def parse(text: str | bytes) -> Any:
    """Read a config's JSON.

    Raises:
        ModelLoadError: it is no JSON, or lists and objects are nested more than 64 deep.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"Expected a config in JSON. Received: {error}. {WAY_OUT}") from error
    level = [config]
    for _ in range(_MAX_DEPTH):
        level = [value for item in level if isinstance(item, dict | list) for value in _values(item)]
    if level:
        raise ModelLoadError(f"Expected a config nested at most {_MAX_DEPTH} deep. Received: a deeper one. {WAY_OUT}")
    return config


def _values(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item


def class_of(item: Any) -> str:
    """Return the class that an entry of a config names, without the package it was registered under."""
    return str(field(item, "class_name", str).rpartition(">")[2])


def field(item: Any, key: str, kind: type) -> Any:
    """Return a value of an entry.

    Raises:
        ModelLoadError: it is not there, or of another type.
    """
    value = item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelLoadError(
            f"Expected a config of Keras 2, with a {kind.__name__} {key!r}. Received: {short(value)}. {WAY_OUT}"
        )
    return value


def short(value: Any) -> str:
    """Return what a message shows of a value from a file."""
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__ + " " + str(value)[:60]
    return text[:80]


def plain(value: Any) -> Any:
    """Return a plain value, lists as tuples.

    Raises:
        ModelLoadError: it is or holds an object.
    """
    if isinstance(value, list):
        return tuple(plain(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelLoadError(
        f"Expected numbers, texts and lists as a layer's settings. Received: {short(value)}. {WAY_OUT}"
    )


def dtype(value: Any) -> str | None:
    """Return a dtype or the name of a dtype policy."""
    if isinstance(value, Mapping):
        value = value.get("config", {}).get("name") if isinstance(value.get("config"), Mapping) else value
    return None if value is None else _listed(value, _DTYPES, "a dtype")


def arguments(kind: str, layer_class: Any, config: Mapping[str, Any], initializer: Any) -> dict[str, Any]:
    """Translate a standard layer's config, but for its name, trainable and dtype.

    Args:
        kind: the layer's class, as the file names it.
        layer_class: the same class in Keras 3.
        config: as Keras 2 wrote it.
        initializer: for every weight.

    Raises:
        ModelLoadError: a key has no meaning in Keras 3, or its value is none of a plain kind.
    """
    known = [name for name in inspect.signature(layer_class.__init__).parameters if name not in _NEW]
    translated = dict(_translated(kind, config, known))
    return translated | {name: initializer for name in known if name.endswith("_initializer")}


def _translated(kind: str, config: Mapping[str, Any], known: list[str]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = _RENAMED.get((kind, key), key)
        if key in ("name", "trainable", "dtype", *_WITHOUT_EFFECT) or key.endswith("_initializer"):
            continue
        if name.endswith(("_regularizer", "_constraint")):
            yield name, _penalty(value, name)
        elif name.endswith("activation") and value is not None:
            yield name, _listed(value, _ACTIVATIONS, "an activation")
        elif name not in known:
            if value:
                raise ModelLoadError(
                    f"Expected settings of {kind} that Keras 3 has. Received: {short(key)}, {short(value)}. {WAY_OUT}"
                )
        elif (kind, name) == ("BatchNormalization", "axis") and isinstance(value, list) and len(value) == 1:
            yield name, plain(value[0])
        else:
            yield name, plain(value)


def _penalty(value: Any, name: str) -> Any:
    if value is None:
        return None
    kind = _listed(class_of(value), _PENALTIES, f"a {name}")
    room = keras.regularizers if name.endswith("_regularizer") else keras.constraints
    if not hasattr(room, kind):
        raise ModelLoadError(f"Expected a {name}. Received: {kind}. {WAY_OUT}")
    return getattr(room, kind)(**{key: plain(item) for key, item in field(value, "config", dict).items()})


def _listed(value: Any, allowed: tuple[str, ...], what: str) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    raise ModelLoadError(f"Expected {what} among {', '.join(allowed)}. Received: {short(value)}. {WAY_OUT}")
