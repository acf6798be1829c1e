"""Which inputs index a table, and with what values: read off the graph, from each look-up back to the model's inputs.

A look-up Gather(table, indices) or com.bln::Embedding(ids, table) of n entries takes indices from 0 to n - 1. A
negative one is counted from the end by ONNX and by Keras's take, and refused by TensorFlow's look-ups: since what one
runtime answers another refuses, none is valid here. On the way back a range
low..high passes through what keeps entries as they are, or moves them by constants:

    Cast, Reshape, Transpose, Concat, ...              low..high
    x + c,  x - c,  c - x                              low - c..high - c,  low + c..high + c,  c - high..c - low
    Max(x, c), Min(x, c), Clip(x, c, d)                an end that the bound keeps is a limit no more
    Where(x < 0, x + n, x), or that as products        low..high: how the converter writes negative indices

Anything else ends it: nothing is claimed then. Where several look-ups read the same entries, all their limits hold.
Where each reads its own part, as in x[:, 0] and x[:, 1], a whole input can only be held to the widest of them, and to
nothing at all if a part of it is not looked up.
"""

from contextlib import suppress
from math import ceil, floor, inf

import numpy as np
import onnx
from onnx import helper

from bln_serve.export.coupling import MALFORMED, tensors_of
from bln_serve.export.index_ranges.limits import NO_LIMITS, Range
from bln_serve.export.index_ranges.walk import Walk

__all__ = ["index_ranges"]


def index_ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Return the lowest and the highest valid value, both inclusive, of each input that indexes a table.

    Args:
        model: any ONNX model, marked or not. Look-ups inside Loop, Scan and If bodies are not followed.

    Returns:
        By input name. An input without limits is left out; one with a limit on one side has its dtype's on the other.
    """
    graph, tensors = tensors_of(model)
    walk = Walk(graph, tensors)
    walk.run()
    stored = {tensor.name for tensor in graph.initializer}
    found: dict[str, tuple[int, int]] = {}
    for value in graph.input:
        if value.name in stored or value.name not in walk.needs:
            continue
        dims = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
        with suppress(*MALFORMED):
            limits = walk.needs[value.name].of_all(dims)
            if limits != NO_LIMITS:
                found[value.name] = _whole_numbers(limits, value.type.tensor_type.elem_type)
    return found


def _whole_numbers(limits: Range, dtype: int) -> tuple[int, int]:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    if np.issubdtype(kind, np.integer):
        lowest, highest = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    else:  # the whole numbers that a float tells apart
        highest = 2 ** (np.finfo(kind).nmant + 1) if np.issubdtype(kind, np.floating) else 2**8
        lowest = -highest
    return (
        lowest if limits.low == -inf else max(lowest, ceil(limits.low)),
        highest if limits.high == inf else min(highest, floor(limits.high)),
    )
