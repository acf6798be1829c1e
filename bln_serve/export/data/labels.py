"""Labels held against the loss that they are for.

A label out of range is no error in Keras that says where: the loss is a wrong number or NaN, or TensorFlow stops.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError
from bln_serve.export.data.rows import Data
from bln_serve.signature import ModelSignature, TensorSpec

_KINDS = {
    "binary": ("BinaryCrossentropy", "BinaryFocalCrossentropy", "bce"),
    "categorical": ("CategoricalCrossentropy", "CategoricalFocalCrossentropy"),
    "sparse": ("SparseCategoricalCrossentropy",),
}


def check_labels(data: Data, signature: ModelSignature, loss: Any) -> None:
    """Make sure that a crossentropy can be taken of the targets; other losses take any numbers.

    Args:
        data: with targets.
        signature: whose outputs' last dimension is the classes.
        loss: as `model.compile` takes it, for one output or several.

    Raises:
        UsageError: a label is out of range, or the targets' shape is for another loss.
    """
    for spec, target, each in _pairs(data.targets, signature, loss):
        kind = _kind_by_shapes(spec, target) if _is_by_shapes(each) else _kind(each)
        if kind == "sparse":
            _check_sparse(data, spec, target, getattr(each, "ignore_class", None))
        elif kind is not None:
            _check_like_output(data, spec, target, kind)
            if kind == "binary":
                _check_range(data, spec, target, ~((target >= 0) & (target <= 1)), "from 0 to 1")


def _pairs(targets: Any, signature: ModelSignature, loss: Any) -> Iterator[tuple[TensorSpec, NDArray[Any], Any]]:
    """Yield each output's targets and loss; one loss is for all."""
    for place, spec in enumerate(signature.outputs):
        target = targets[spec.name] if isinstance(targets, Mapping) else targets
        if isinstance(loss, Mapping):
            yield spec, target, loss.get(spec.name)
        elif isinstance(loss, list | tuple):
            yield spec, target, loss[place] if place < len(loss) else None
        else:
            yield spec, target, loss


def _kind(loss: Any) -> str | None:
    """Return which crossentropy a loss is, by its class or by its name in either spelling; None for another loss."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", "")
    for kind, names in _KINDS.items():
        classes = tuple(getattr(keras.losses, each) for each in names if hasattr(keras.losses, each))
        if isinstance(loss, classes) or name.replace("_", "").lower() in [each.lower() for each in names]:
            return kind
    return None


def _is_by_shapes(loss: Any) -> bool:
    """Whether Keras makes one of the three crossentropies of this name, by the shapes that it meets."""
    return isinstance(loss, str) and loss.lower() in ("crossentropy", "ce")


def _kind_by_shapes(spec: TensorSpec, target: NDArray[Any]) -> str:
    if spec.shape[-1] == 1:
        return "binary"
    return "sparse" if target.ndim < len(spec.shape) or target.shape[-1] == 1 else "categorical"


def _check_sparse(data: Data, spec: TensorSpec, target: NDArray[Any], ignored: int | None) -> None:
    classes = spec.shape[-1] or 0
    if target.ndim == len(spec.shape) and target.shape[-1] != 1:
        raise UsageError(
            f"Expected labels for output {spec.name!r} in {data.source} of shape "
            f"{_shape(target.shape[:-1])}, one a row. Received: {_shape(target.shape)}. For one-hot targets take "
            "categorical_crossentropy."
        )
    wrong = ~((target >= 0) & (target < classes))
    if target.dtype.kind == "f":
        wrong |= target != np.floor(target)
    if ignored is not None:
        wrong &= target != ignored
    _check_range(data, spec, target, wrong, f"a whole number from 0 to {classes - 1}")


def _check_like_output(data: Data, spec: TensorSpec, target: NDArray[Any], kind: str) -> None:
    whole = (len(target), *spec.shape[1:])
    if target.shape == whole or (kind == "binary" and (*target.shape, 1) == whole):
        return
    advice = "For a label a row take sparse_categorical_crossentropy" if kind == "categorical" else "Give a 0 or 1 each"
    raise UsageError(
        f"Expected targets for output {spec.name!r} in {data.source} of shape {_shape(whole)}, as the answers are. "
        f"Received: {_shape(target.shape)}. {advice}."
    )


def _check_range(data: Data, spec: TensorSpec, target: NDArray[Any], wrong: NDArray[Any], allowed: str) -> None:
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise UsageError(
            f"Expected every label for output {spec.name!r} in {data.source} to be {allowed}. Received: "
            f"{target[place]} in row {place[0]}. Correct the labels, or take another loss."
        )


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
