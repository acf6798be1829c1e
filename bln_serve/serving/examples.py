"""A request that a model answers, made from what its artifact says: for people to begin with.

Its numbers are drawn, always the same ones, and have few digits. Its rows are the fewest that make a mini-batch.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.manifest import Manifest
from bln_serve.serving.binary_tensors import datatype_of
from bln_serve.signature import Arrays, TensorSpec

_SEED = 0
_DECIMALS = 2
_INTEGERS = (0, 9)  # which every dtype holds, where an artifact names no range


def request(manifest: Manifest) -> dict[str, Any]:
    """Return the body of a POST to /models/NAME/predict that is answered.

    Args:
        manifest: of the model.

    Returns:
        `instances` for a single input, else `inputs` by name; `mini_batch_rows` where the model's own would not do.
    """
    rows = _mini_batch_rows(manifest)
    return tf_serving(manifest) | ({} if rows is None else {"mini_batch_rows": rows})


def tf_serving(manifest: Manifest) -> dict[str, Any]:
    """Return the same for TensorFlow Serving's protocol, in which the rows of a mini-batch stand in the URL."""
    inputs = {name: array.tolist() for name, array in _inputs(manifest).items()}
    return {"instances": next(iter(inputs.values()))} if len(inputs) == 1 else {"inputs": inputs}


def open_inference(manifest: Manifest) -> dict[str, Any]:
    """Return the same for the Open Inference Protocol."""
    tensors = [
        {
            "name": spec.name,
            "shape": list(array.shape),
            "datatype": datatype_of(np.dtype(spec.dtype)),
            "data": array.ravel().tolist(),
        }
        for spec, array in zip(manifest.signature.inputs, _inputs(manifest).values(), strict=True)
    ]
    rows = _mini_batch_rows(manifest)
    return {"inputs": tensors} | ({} if rows is None else {"parameters": {"bln_mini_batch_rows": rows}})


def number_count(manifest: Manifest) -> int:
    """Return how many numbers a request of these holds."""
    return _rows(manifest) * sum(math.prod(_sizes(spec)) for spec in manifest.signature.inputs)


def _inputs(manifest: Manifest) -> Arrays:
    rng = np.random.default_rng(_SEED)
    return {spec.name: _drawn(spec, _rows(manifest), rng) for spec in manifest.signature.inputs}


def _rows(manifest: Manifest) -> int:
    return manifest.rule.min_rows if manifest.rule else 1


def _mini_batch_rows(manifest: Manifest) -> int | None:
    """Return the rows of a mini-batch if they have to be named."""
    rule = manifest.rule
    return None if rule is None or rule.allows(rule.min_rows, rule.default_rows) else 0


def _drawn(spec: TensorSpec, rows: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = (rows, *_sizes(spec))
    kind = np.dtype(spec.dtype).kind
    if kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if spec.value_range or kind in "iu":
        low, high = spec.value_range or _INTEGERS
        return rng.integers(low, high, shape, endpoint=True)
    low_float, high_float = spec.typical_range or (0.0, 1.0)
    return np.round(rng.uniform(low_float, high_float, shape), _DECIMALS)


def _sizes(spec: TensorSpec) -> list[int]:
    return [size for size in spec.shape if size is not None]
