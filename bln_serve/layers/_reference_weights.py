"""The weights that Keras 2 stored for a model of the reference implementation, put into a Keras 3 model.

    scale1 (d,), shift1 (d,)                     gamma, beta
    Variable ()                                  epsilon
    moving_Bmean, moving_Bvar (1, ..., d)        population_batch_mean, population_batch_var
    moving_Fmean, moving_Fvar (m, ..., 1)        population_feature_mean, population_feature_var
    batchcount ()                                how many steps they rest on: mean_steps, variance_steps, slot_steps
    weights (in, units), bias (units,)           kernel, bias of dense_layer

The stored statistics go in as they are, so that the answers are the reference's. What they rest on is judged from
batchcount, the number of steps of the last epoch, which its callback sets at the epoch's second batch:

    0      never finalised: one step an epoch, a nested model, steps_per_execution > 1, no callback: sums, or unscaled
    2      never finalised either: with two steps an epoch the reference's callback skips it
    else   trusted

and 0 steps, which make a statistic unusable, are recorded for the first two, and for both variances at m = 1. What the
file cannot tell: an epoch broken off or saved half-way, which leaves sums beside a good batchcount; a batchcount left
over from an earlier fit; `stateful=False`, whose second epoch adds to the first; a layer used twice, whose means are
doubled.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from bln_serve.errors import ModelLoadError
from bln_serve.layers._stored_arrays import Arrays
from bln_serve.layers.batch_layer_normalization import BatchLayerNormalization

# The order in which the reference's layer creates its weights, by which a .keras file knows them.
_ORDER = ("scale1", "shift1", "Variable", "moving_Bmean", "moving_Bvar", "moving_Fmean", "moving_Fvar", "batchcount")
_VARIABLES = {
    "scale1": "gamma",
    "shift1": "beta",
    "moving_Bmean": "population_batch_mean",
    "moving_Bvar": "population_batch_var",
    "moving_Fmean": "population_feature_mean",
    "moving_Fvar": "population_feature_var",
}
_NEVER_FINALISED = (0, 2)
_WAY_OUT = "Give the architecture that the weights were trained in."


def assign(model: Any, stored: Mapping[str, Arrays]) -> None:
    """Set every weight of a built model.

    Args:
        model: the Keras model; its seeds and the like are left as they are.
        stored: by layer name, the layer's arrays by the names on the way to them. Where names differ in nothing but
            the numbers that Keras gives in turn (conv2d_1, conv2d_2), layers are taken in their order.

    Raises:
        ModelLoadError: the file's layers, weights or shapes are not the model's.
    """
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    stored = {name: arrays for name, arrays in stored.items() if arrays}
    for ours, theirs in _pairs(list(layers), list(stored)):
        _assign(layers[ours], stored[theirs])


def _pairs(ours: list[str], theirs: list[str]) -> Iterable[tuple[str, str]]:
    if set(ours) == set(theirs):
        return zip(ours, ours, strict=True)
    by_stem = [_by_stem(names) for names in (ours, theirs)]
    if {stem: len(names) for stem, names in by_stem[0].items()} != {
        stem: len(names) for stem, names in by_stem[1].items()
    }:
        raise ModelLoadError(
            f"Expected weights for the layers {_listing(ours)}. Received: weights for {_listing(theirs)}. {_WAY_OUT}"
        )
    return [pair for stem in by_stem[0] for pair in zip(by_stem[0][stem], by_stem[1][stem], strict=True)]


def _by_stem(names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        stem, number = re.fullmatch(r"(.*?)(?:_(\d{1,9}))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        found[stem].append((int(number or 0), name))
    return {stem: [name for _, name in sorted(numbered)] for stem, numbered in found.items()}


def _assign(layer: Any, arrays: Arrays) -> None:
    if isinstance(layer, keras.Model):
        inner = {item.name: _below(item.name, arrays) for item in layer.layers if item.weights}
        if sum(map(len, inner.values())) != len(arrays):
            raise _unexpected(layer, [f"layers {_listing(inner)}"], arrays)
        assign(layer, inner)
    elif isinstance(layer, BatchLayerNormalization):
        _assign_reference(layer, arrays)
    else:
        _assign_standard(layer, arrays)


def _below(name: str, arrays: Arrays) -> Arrays:
    return {way[way.index(name) + 1 :]: array for way, array in arrays.items() if name in way[:-1]}


def _assign_standard(layer: Any, arrays: Arrays) -> None:
    done = 0
    for place, part in _parts(layer):
        here = {way: array for way, array in arrays.items() if any(step.startswith(place) for step in way)}
        names = [variable.name for variable in part.weights]
        named = {_leaf(way, names): array for way, array in here.items()}
        if set(named) != set(names) or len(named) != len(here):
            raise _unexpected(layer, names, arrays)
        for variable in part.weights:
            _set(layer, variable, named[variable.name])
        done += len(here)
    if done != len(arrays):
        raise _unexpected(layer, [variable.name for variable in layer.weights], arrays)


def _parts(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a layer that own weights, each with how a step on the way to its arrays begins."""
    if isinstance(layer, keras.layers.Bidirectional):
        yield "forward_", layer.forward_layer.cell
        yield "backward_", layer.backward_layer.cell
    elif isinstance(layer, keras.layers.TimeDistributed):
        yield "", layer.layer
    else:
        yield "", getattr(layer, "cell", layer)


def _leaf(way: tuple[str, ...], order: Iterable[str]) -> str:
    """Return a weight's name: from its place where the file numbers them, else without TensorFlow's numbers."""
    if len(way) > 1 and way[-2] == "vars" and way[-1].isdecimal():
        return dict(enumerate(order)).get(int(way[-1]), way[-1])
    name = way[-1].partition(":")[0]
    return "kernel" if name == "weights" else name


def _assign_reference(layer: BatchLayerNormalization, arrays: Arrays) -> None:
    named = {re.sub(r"_\d+$", "", _leaf(way, _ORDER)): array for way, array in arrays.items()}
    if set(named) != set(_ORDER) or len(named) != len(arrays):
        raise _unexpected(layer, _ORDER, arrays)
    slots = named["moving_Fmean"].shape[:1]
    if slots != (layer.batch_size,):
        raise ModelLoadError(
            f"Expected statistics of m = {layer.batch_size} slots in layer {layer.name!r}. Received: "
            f"{slots[0] if slots else 'none'}. {_WAY_OUT}"
        )
    for name, variable in _VARIABLES.items():
        if name.endswith("var") and (named[name] < 0).any():
            raise ModelLoadError(f"Expected variances in {name} of layer {layer.name!r}. Received: negative numbers.")
        _set(layer, getattr(layer, variable), named[name])
    layer.epsilon = _epsilon(layer, named["Variable"])
    steps = _steps(named["batchcount"])
    layer.mean_steps.assign(steps)
    layer.variance_steps.assign(steps if layer.batch_size > 1 else 0.0)
    layer.slot_steps.assign(np.full(layer.batch_size, steps))


def _epsilon(layer: Any, stored: np.ndarray[Any, Any]) -> float:
    if stored.shape != () or not np.isfinite(stored) or stored < 0:
        raise ModelLoadError(
            f"Expected one number of at least 0 as the epsilon (Variable) of layer {layer.name!r}. Received: "
            f"{str(stored)[:40]} of shape {stored.shape}."
        )
    # The shortest decimal of the stored float32: 0.001 and not 0.0010000000474974513.
    return float(str(stored[()]))


def _steps(batchcount: np.ndarray[Any, Any]) -> float:
    count = float(batchcount) if batchcount.shape == () else 0.0
    return count if np.isfinite(count) and count >= 1 and count not in _NEVER_FINALISED else 0.0


def _set(layer: Any, variable: Any, array: np.ndarray[Any, Any]) -> None:
    if tuple(variable.shape) != array.shape:
        raise ModelLoadError(
            f"Expected {variable.name} of layer {layer.name!r} in shape {tuple(variable.shape)}. Received: "
            f"{array.shape}. {_WAY_OUT}"
        )
    variable.assign(array)


def _unexpected(layer: Any, names: Iterable[str], arrays: Arrays) -> ModelLoadError:
    received = _listing("/".join(way) for way in arrays) or "none"
    return ModelLoadError(
        f"Expected {_listing(names)} as the weights of layer {layer.name!r}. Received: {received}. {_WAY_OUT}"
    )


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(name[:60] for name in names[:20]) + (", ..." if len(names) > 20 else "")
