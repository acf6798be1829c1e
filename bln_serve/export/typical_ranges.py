"""Where the values of an input are expected to lie, from the model's own first layer.

    Rescaling       y = x * scale + offset is meant to give 0 to 1, or -1 to 1 about 0 where it has an offset:
                    x from 0 to 1 / scale, or from 0 to -2 * offset / scale
    Normalization   y = (x - mean) / sqrt(variance): x within three standard deviations of the mean

Values outside are taken too. Clients are told the range, and the verification draws its requests from it.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from bln_serve.export.saved_model import Callee
from bln_serve.layers.population import layers_of

Range = tuple[float, float]
_WIDEST = 2.0**31  # no NaN, no infinity, and nothing that the integers of an input cannot hold


def with_typical_ranges(callee: Callee) -> Callee:
    """Return the callee with the typical range of each input that a Rescaling or Normalization takes directly."""
    ranges = dict(_ranges(callee))
    inputs = tuple(replace(spec, typical_range=ranges.get(spec.name)) for spec in callee.signature.inputs)
    return replace(callee, signature=replace(callee.signature, inputs=inputs))


def _ranges(callee: Callee) -> Iterator[tuple[str, Range]]:
    names = {id(tensor): spec.name for tensor, spec in zip(callee.flat_inputs(), callee.signature.inputs, strict=True)}
    for kind, range_of in ((keras.layers.Rescaling, _of_rescaling), (keras.layers.Normalization, _of_normalization)):
        for layer in layers_of(callee.model, kind):
            found = range_of(layer)
            tensors = (tensor for node in layer._inbound_nodes for tensor in node.input_tensors)
            if found is not None and max(map(abs, found)) < _WIDEST:
                yield from ((names[id(tensor)], found) for tensor in tensors if id(tensor) in names)


def _of_rescaling(layer: Any) -> Range | None:
    scale, offset = np.asarray(layer.scale, float), np.asarray(layer.offset, float)
    if scale.size != 1 or offset.size != 1 or scale <= 0 or offset > 0:
        return None
    return 0.0, float((-2 * offset if offset else 1) / scale)


def _of_normalization(layer: Any) -> Range | None:
    if layer.mean is None or layer.invert:
        return None
    mean, deviation = np.asarray(layer.mean, float), np.sqrt(np.asarray(layer.variance, float))
    return float((mean - 3 * deviation).min()), float((mean + 3 * deviation).max())
