"""Rows to calibrate with, or to select on: read, held against the model's signature, and given out by mini-batches.

An array stays as it came, uint8 images a quarter of what the model sees: one mini-batch at a time is cast to the dtypes
of the model's inputs, and one piece at a time is looked through for what the model cannot take.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError
from bln_serve.export.data import sources
from bln_serve.signature import Arrays, ModelSignature, TensorSpec

_PIECE = 1 << 20  # values
# Kinds of arrays whose values an input of a kind can take; floats for integers if they are whole.
_KINDS = {"f": "fiub", "i": "iubf", "u": "iubf", "b": "b"}
_KIND_NAMES = {"O": "mixed values", "S": "bytes", "U": "text", "b": "booleans", "c": "complex numbers", "f": "floats"}


@dataclass(frozen=True)
class Data:
    """Rows, with targets or without.

    Attributes:
        inputs: an array (rows, ...) for each input of the model, in the signature's order and in the dtype given.
        targets: None; an array (rows, ...); for several outputs a dict by the outputs' names, in the signature's order.
        source: the file's name without folders, module:function, or "arrays".
        sha256: of the file where there is one, else of the arrays' names, dtypes, shapes and bytes.
    """

    inputs: tuple[NDArray[Any], ...]
    targets: Any
    source: str
    sha256: str

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.inputs[0].shape[0])

    def whole_mini_batches(self, size: int) -> int:
        """Return how many mini-batches of `size` rows there are; a partial one at the end does not count."""
        return self.rows // size

    def mini_batches(
        self, signature: ModelSignature, size: int, *, keep_last: bool = False
    ) -> Iterator[tuple[list[NDArray[Any]], Any]]:
        """Yield the whole mini-batches in order.

        Args:
            signature: the dtypes of the inputs.
            size: rows of each.
            keep_last: yield the rows that are left over as well, where their number does not matter.

        Yields:
            An array (size, ...) for each input, C-contiguous in the signature's dtype, and the targets as they are.
        """
        dtypes = [np.dtype(spec.dtype) for spec in signature.inputs]
        for start in range(0, self.rows if keep_last else self.whole_mini_batches(size) * size, size):
            taken = slice(start, start + size)
            inputs = [np.ascontiguousarray(x[taken], dtype) for x, dtype in zip(self.inputs, dtypes, strict=True)]
            yield inputs, None if self.targets is None else keras.tree.map_structure(_rows(taken), self.targets)

    def with_targets_like(self, output: Any) -> "Data":
        """Return the same rows with the targets of several outputs in the structure of `model.output`.

        Keras takes a dict for outputs in a list in the order of the keys' names, where it does not know the names.
        """
        if not isinstance(self.targets, Mapping):
            return self
        return replace(self, targets=keras.tree.pack_sequence_as(output, list(self.targets.values())))


def read(source: Any, signature: ModelSignature, *, targets: bool) -> Data:
    """Read rows.

    Args:
        source: a `.npz` file (arrays x and y; for several inputs or outputs by their names) or `.npy` file (x alone);
            "module:function" or a function, which returns a tf.data.Dataset, batched or not, or arrays; or these
            themselves: x, (x, y), or a dict. Several inputs are a list or a dict.
        signature: the model's inputs and outputs.
        targets: whether they are wanted; if not, those in the source are left alone.

    Raises:
        UsageError: the source cannot be read or lacks an array; an array has another rank, shape, dtype or number of
            rows than the signature asks for, no rows, NaN or infinity, or values that the input cannot take.
    """
    found = sources.find(source, signature, targets=targets)
    for spec in signature.inputs:
        _check_shape(found, spec, found.inputs[spec.name])
    for spec in signature.outputs if targets else ():
        _check_target_shape(found, spec, found.targets[spec.name])
    _check_rows(found)
    for spec in signature.inputs:
        _check_values(found, spec, found.inputs[spec.name])
    for name, target in found.targets.items():
        _check_values(found, TensorSpec(name, "float64", (None, *target.shape[1:])), target)
    labels = found.targets if len(signature.outputs) > 1 else next(iter(found.targets.values()), None)
    sha256 = found.file_sha256 or _sha256({**found.inputs, **{f"y:{name}": y for name, y in found.targets.items()}})
    return Data(tuple(found.inputs.values()), labels if targets else None, found.source, sha256)


def _rows(taken: slice) -> Any:
    return lambda array: array[taken]


def _check_shape(found: sources.Found, spec: TensorSpec, array: NDArray[Any]) -> None:
    if array.ndim != len(spec.shape) or array.shape[1:] != spec.shape[1:]:
        raise UsageError(
            f"Expected input {spec.name!r} in {found.source} to be {spec.describe()}. Received: shape {array.shape}. "
            "Give the rows as the model was trained on them."
        )


def _check_target_shape(found: sources.Found, spec: TensorSpec, array: NDArray[Any]) -> None:
    """Take a value for each of the output's, or a label for each of its last dimension, with or without that."""
    whole = spec.shape[1:]
    allowed = {whole, whole[:-1], (*whole[:-1], 1)}
    if array.shape[1:] not in allowed or not array.ndim:
        shapes = " or ".join(f"({', '.join(['rows', *map(str, each)])})" for each in sorted(allowed, key=str))
        raise UsageError(
            f"Expected targets for output {spec.name!r} in {found.source} of shape {shapes}. Received: {array.shape}. "
            "Give a label or a value for each answer of the model."
        )


def _check_rows(found: sources.Found) -> None:
    rows = {name: array.shape[0] for name, array in [*found.inputs.items(), *found.targets.items()]}
    if len(set(rows.values())) > 1:
        raise UsageError(
            f"Expected the same number of rows in every array of {found.source}. Received: {rows}. Give every row its "
            "inputs and targets."
        )
    if not next(iter(rows.values())):
        raise UsageError(f"Expected rows in {found.source}. Received: none. Give at least one mini-batch.")


def _check_values(found: sources.Found, spec: TensorSpec, array: NDArray[Any]) -> None:
    """Make sure that casting keeps the values what they are."""
    target = np.dtype(spec.dtype)
    what = f"Expected {spec.name!r} in {found.source} to be {spec.describe()}."
    if array.dtype.kind not in _KINDS[target.kind]:
        kind = _KIND_NAMES.get(array.dtype.kind, array.dtype.name)
        raise UsageError(f"{what} Received: {kind}. Convert it to {spec.dtype}.")
    for start, piece in _pieces(array):
        if (wrong := _wrong(piece, spec, target)) is not None and wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            row = (start + place[0], *place[1:])
            raise UsageError(f"{what} Received: {piece[place]} at index {list(row)}. {_rule(spec, target)}")


def _pieces(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield rows with the number of the first of them, so few that a copy of them costs nothing."""
    step = max(1, _PIECE * len(array) // max(array.size, 1))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def _wrong(piece: NDArray[Any], spec: TensorSpec, target: np.dtype[Any]) -> NDArray[np.bool_] | None:
    """Return which values an input cannot take; None if the dtype alone says that there are none."""
    wrong = None
    if target.kind == "f" and (piece.dtype.kind == "f" or target.itemsize < 4):
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(piece.astype(target))
    limits = _limits(spec, target)
    if limits is not None and (spec.value_range or piece.dtype != target) and piece.dtype.kind != "b":
        low, high = limits
        if target.kind in "iu" and piece.dtype.kind == "f":
            # A float cannot hold every highest integer, but it holds the one above, a power of two.
            inside = (piece >= low) & (piece < high + 1) & (piece == np.floor(piece))
        else:
            inside = (piece >= low) & (piece <= high)
        wrong = ~inside if wrong is None else wrong | ~inside
    return wrong


def _limits(spec: TensorSpec, target: np.dtype[Any]) -> tuple[int, int] | None:
    if spec.value_range or target.kind not in "iu":
        return spec.value_range
    return int(np.iinfo(target).min), int(np.iinfo(target).max)


def _rule(spec: TensorSpec, target: np.dtype[Any]) -> str:
    limits = _limits(spec, target)
    if limits is None:
        return f"Every value must be finite and fit {spec.dtype}."
    return f"Every value must be {'a whole number ' if target.kind in 'iu' else ''}from {limits[0]} to {limits[1]}."


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        for _, piece in _pieces(array):
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()
