"""A Keras 3 model built from the config that Keras 2 wrote for a model of the reference implementation.

Nothing is looked up by a name from the file: a class is one of the closed lists below or the file is refused, and it is
called with plain values, under names that its own signature has. A module that the file names is not read at all.

    bln_layer      BatchLayerNormalization; the reference's key for m is misspelt, 'self.batchsize'
    dense_layer    Dense: y = x @ weights + bias
    Model, Functional, Sequential    keras.Model

What a config may make Keras allocate is bounded by what the file stores: all variables together may hold twice as many
numbers, so that a model of about the right size gets to the comparison of shapes, which says more. Every model takes
any number of rows, whatever static batch size it was written with.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import keras

from bln_serve.errors import ModelLoadError
from bln_serve.layers._reference_config import WAY_OUT, arguments, class_of, dtype, field, plain, short
from bln_serve.layers._weight_budget import Budget
from bln_serve.layers.batch_layer_normalization import BatchLayerNormalization

_MODELS = ("Functional", "Model", "Sequential")
_RANKED = ("AveragePooling", "MaxPooling", "GlobalAveragePooling", "GlobalMaxPooling", "Conv", "Cropping", "UpSampling")
_LAYERS = frozenset(
    f"{kind}{rank}D" for kind in (*_RANKED, "ZeroPadding", "SpatialDropout") for rank in (1, 2, 3)
) | frozenset(
    [
        "Activation",
        "Add",
        "AlphaDropout",
        "Average",
        "BatchNormalization",
        "Concatenate",
        "Conv1DTranspose",
        "Conv2DTranspose",
        "Conv3DTranspose",
        "Dense",
        "DepthwiseConv1D",
        "DepthwiseConv2D",
        "Dot",
        "Dropout",
        "ELU",
        "Embedding",
        "Flatten",
        "GRU",
        "GaussianDropout",
        "GaussianNoise",
        "LSTM",
        "LayerNormalization",
        "LeakyReLU",
        "Masking",
        "Maximum",
        "Minimum",
        "Multiply",
        "PReLU",
        "Permute",
        "ReLU",
        "RepeatVector",
        "Rescaling",
        "Reshape",
        "SeparableConv1D",
        "SeparableConv2D",
        "SimpleRNN",
        "Softmax",
        "Subtract",
    ]
)
_FLAGS = ("batch_moving_mean", "batch_moving_var", "feature_moving_mean", "feature_moving_var")
_MAX_LAYERS = 2000


def build(config: Any, numbers: int) -> Any:
    """Build a model.

    Args:
        config: of the whole model, as Keras 2 wrote it.
        numbers: how many numbers the file stores.

    Returns:
        A `keras.Model`, its weights not yet set.

    Raises:
        ModelLoadError: the config is damaged, or names what is on none of the lists.
    """
    budget = Budget(2 * numbers)
    model = _model(config, budget)
    budget.leave(model)
    return model


def _model(item: Any, budget: Budget) -> Any:
    kind, config = class_of(item), field(item, "config", dict)
    if kind not in _MODELS:
        raise _refused(kind)
    layers = field(config, "layers", list)
    if len(layers) > _MAX_LAYERS:
        raise ModelLoadError(f"Expected at most {_MAX_LAYERS} layers. Received: {len(layers)}. {WAY_OUT}")
    inputs, outputs = _sequence(layers, budget) if kind == "Sequential" else _graph(config, layers, budget)
    return keras.Model(inputs, outputs, name=field(config, "name", str))


def _sequence(layers: list[Any], budget: Budget) -> tuple[Any, Any]:
    if not layers:
        raise ModelLoadError(f"Expected layers in a Sequential model. Received: none. {WAY_OUT}")
    starts_with_input = class_of(layers[0]) == "InputLayer"
    inputs = tensor = _input(field(layers[0], "config", dict), named=starts_with_input)
    for item in layers[starts_with_input:]:
        tensor = _call(_layer(item, budget), tensor, budget)
    return inputs, tensor


def _graph(config: Mapping[str, Any], layers: list[Any], budget: Budget) -> tuple[Any, Any]:
    """Call each layer as its nodes say, once what it takes is there."""
    made: dict[str, list[list[Any]]] = {}
    pending: list[tuple[str, Any, list[Any]]] = []
    for item in layers:
        name = field(item, "name", str)
        if name in made:
            raise ModelLoadError(f"Expected layers with different names. Received: {name} twice. {WAY_OUT}")
        if class_of(item) == "InputLayer":
            made[name] = [[_input(field(item, "config", dict))]]
        else:
            # A nested model comes with a call of its own, which Keras 2 counts.
            made[name] = [[]] if class_of(item) in _MODELS else []
            layer = _layer(item, budget)
            pending += [(name, layer, _references(node)) for node in field(item, "inbound_nodes", list)]
    while pending:
        waiting = []
        for name, layer, references in pending:
            tensors = [_tensor(made, *reference) for reference in references]
            if any(tensor is None for tensor in tensors):
                waiting.append((name, layer, references))
            else:
                made[name].append(keras.tree.flatten(_call(layer, _single(tensors), budget)))
        if len(waiting) == len(pending):
            raise ModelLoadError(f"Expected every layer to be reached. Received: {waiting[0][0]!r} is not. {WAY_OUT}")
        pending = waiting
    return _ends(made, config, "input_layers"), _ends(made, config, "output_layers")


def _ends(made: Mapping[str, Any], config: Mapping[str, Any], key: str) -> Any:
    ends = field(config, key, list)
    tensors = [_tensor(made, *reference) for reference in _references(ends)]
    if any(tensor is None for tensor in tensors):
        raise ModelLoadError(f"Expected {key} to name tensors of the model. Received: {short(ends)}. {WAY_OUT}")
    return _single(tensors)


def _single(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def _references(node: Any) -> list[tuple[str, int, int]]:
    if not isinstance(node, list) or not node:
        raise ModelLoadError(f"Expected the nodes of Keras 2, which are lists. Received: {short(node)}. {WAY_OUT}")
    return [_reference(item) for item in ([node] if isinstance(node[0], str) else node)]


def _reference(item: Any) -> tuple[str, int, int]:
    """Read [layer, node, tensor] or [layer, node, tensor, arguments]."""
    match item:
        case [str(name), int(node), int(tensor), *rest] if node >= 0 <= tensor and not any(map(_has_effect, rest)):
            return name, node, tensor
    raise ModelLoadError(
        f"Expected [layer, node, tensor] without further arguments. Received: {short(item)}. {WAY_OUT}"
    )


def _has_effect(arguments: Any) -> bool:
    return not isinstance(arguments, dict) or any(value not in (None, False) for value in arguments.values())


def _tensor(made: Mapping[str, Any], name: str, node: int, tensor: int) -> Any | None:
    nodes = made.get(name, [])
    return nodes[node][tensor] if node < len(nodes) and tensor < len(nodes[node]) else None


def _call(layer: Any, value: Any, budget: Budget) -> Any:
    if isinstance(layer, BatchLayerNormalization):
        position = value.shape[1:]
        budget.take(2 * prod(position) + 2 * layer.batch_size * prod(position[:-1]), (layer.batch_size, *position))
    return layer(value)


def _input(config: Mapping[str, Any], named: bool = True) -> Any:
    if config.get("sparse") or config.get("ragged"):
        raise ModelLoadError(f"Expected a dense input. Received: a sparse or ragged one. {WAY_OUT}")
    shape = plain(field(config, "batch_input_shape", list))[1:]
    return keras.Input(shape, dtype=dtype(config.get("dtype")), name=field(config, "name", str) if named else None)


def _layer(item: Any, budget: Budget) -> Any:
    kind, config = class_of(item), field(item, "config", dict)
    if kind in _MODELS:
        return _model(item, budget)
    name, trainable = field(config, "name", str), bool(config.get("trainable", True))
    common: dict[str, Any] = {"name": name, "trainable": trainable, "dtype": dtype(config.get("dtype"))}
    if kind == "bln_layer":
        m = config.get("self.batchsize", config.get("batchsize"))
        flags: dict[str, Any] = {name: bool(config[name]) for name in _FLAGS if name in config}
        return BatchLayerNormalization(field({"self.batchsize": m}, "self.batchsize", int), **flags, **common)
    if kind == "dense_layer":
        common |= {"kernel_initializer": budget, "bias_initializer": budget}
        return keras.layers.Dense(field(config, "units", int), **common)
    if kind == "TimeDistributed" and class_of(config.get("layer")) in _LAYERS:
        return keras.layers.TimeDistributed(_layer(config["layer"], budget), **common)
    if kind not in _LAYERS:
        raise _refused(kind)
    made = getattr(keras.layers, kind)
    return made(**(arguments(kind, made, config, budget) | common))


def _refused(kind: str) -> ModelLoadError:
    return ModelLoadError(
        f"Expected a model of Keras's standard layers and the reference's. Received: one that names {kind[:80]}. "
        f"{WAY_OUT}"
    )
