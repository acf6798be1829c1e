"""Tensors of the Open Inference Protocol: numbers in its JSON, or bytes behind it (the binary tensor data extension).

    Inference-Header-Content-Length: H
    body = JSON, H bytes | first binary tensor | second | ...

A tensor is its elements in row-major order: in JSON one list or nested ones; as bytes little-endian without padding, a
BOOL one byte, 0 or 1. With H = 0 the whole body is the only input of a model, whose rows follow from its size.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError, MalformedRequestError
from bln_serve.serving import json_arrays, json_values
from bln_serve.serving.json_arrays import MAX_DIMENSIONS
from bln_serve.serving.json_values import plain, shown
from bln_serve.serving.prediction import Encoded
from bln_serve.signature import ModelSignature

MEDIA_TYPE = "application/octet-stream"
HEADER_LENGTH = "inference-header-content-length"

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
"""The protocol's numbers, as they travel. On a big-endian host NumPy swaps them wherever it computes with them."""

_NAMES = {dtype.str[1:]: name for name, dtype in DATATYPES.items()}  # without the byte order, which stands in front
_JSON_TYPES: Mapping[str, set[type]] = {"b": {bool}, "f": {int, float}, "i": {int}, "u": {int}}
_BUFFER_TYPES: Mapping[str, json_arrays.BufferType] = {"f": "d", "i": "i", "u": "u"}
_MAX_DIGITS = 18  # of a length; Python itself refuses to read thousands


@dataclass(frozen=True, slots=True)
class Head:
    """What a message says of a tensor beside its elements.

    Attributes:
        name: of the input.
        datatype: one of `DATATYPES`.
        shape: sizes from 0.
        count: of the elements, which the sizes make.
    """

    name: str
    datatype: str
    shape: list[int]
    count: int


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a dtype in any byte order, such as FP32."""
    return _NAMES[dtype.str[1:]]


def header_length(headers: Mapping[str, str], body: bytes) -> int:
    """Return how many bytes at the start of a body are JSON: all where no header says otherwise.

    Raises:
        MalformedRequestError: the header is no number, or more than there are.
    """
    if (text := headers.get(HEADER_LENGTH)) is None:
        return len(body)
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS and (length := int(text)) <= len(body):
        return length
    raise MalformedRequestError(
        "Expected Inference-Header-Content-Length to be how many bytes of JSON the body begins with, at most its "
        f"{len(body)}. Received: {shown(text)}."
    )


def head(name: str, datatype: Any, shape: Any) -> Head:
    """Check what a message says of a tensor.

    Raises:
        MalformedRequestError: the datatype is none of the protocol's numbers, or the shape is no shape.
    """
    if type(datatype) is not str or datatype not in DATATYPES:
        hint = " No model here takes text or bytes." if datatype == "BYTES" else ""
        expected = f"datatype of input {shown(name)} to be one of {', '.join(DATATYPES)}"
        raise MalformedRequestError(f"Expected {expected}. Received: {shown(datatype)}.{hint}")
    if not _is_shape(shape := plain(shape), DATATYPES[datatype]):
        raise MalformedRequestError(
            f"Expected shape of input {shown(name)} to be a list of at most {MAX_DIMENSIONS} whole numbers from 0, "
            f"which memory can hold. Received: {shown(shape)}."
        )
    return Head(name, datatype, shape, math.prod(shape))


def checked_size(tensor: Head, size: Any) -> int:
    """Return how many bytes a message says that a tensor has.

    Raises:
        MalformedRequestError: datatype and shape make another size.
    """
    expected = tensor.count * DATATYPES[tensor.datatype].itemsize
    if size != expected or type(size) is not int:
        raise MalformedRequestError(
            f"Expected binary_data_size of input {shown(tensor.name)} to be {expected}, {tensor.datatype} of shape "
            f"{tensor.shape}. Received: {shown(size)}."
        )
    return expected


def from_bytes(tensor: Head, body: bytes, start: int) -> NDArray[Any]:
    """Read a tensor's bytes without copying them.

    Args:
        tensor: what the message says of it.
        body: where they lie.
        start: the first of them.

    Returns:
        A read-only view of the body, (*shape), little-endian, at an address that need not be aligned.

    Raises:
        MalformedRequestError: the body ends earlier.
        InvalidInputError: a BOOL is neither 0 nor 1.
    """
    dtype = DATATYPES[tensor.datatype]
    expected = tensor.count * dtype.itemsize
    if start + expected > len(body):
        raise MalformedRequestError(
            f"Expected {expected} bytes of input {shown(tensor.name)} from byte {start} of the body on. Received: "
            f"{len(body) - start}. They follow the JSON, whose length Inference-Header-Content-Length must name."
        )
    array: NDArray[Any] = np.ndarray(tensor.shape, dtype, body, start)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise InvalidInputError(
            f"Expected each byte of input {shown(tensor.name)}, BOOL, to be 0 or 1. "
            f"Received: {array.view(np.uint8).max()}."
        )
    return array


def from_json(tensor: Head, data: Any, *, flat: bool = False) -> NDArray[Any]:
    """Read a tensor's numbers, flat or nested.

    Args:
        tensor: what the message says of it.
        data: part of a document.
        flat: whether there are no lists in it, which makes reading it faster.

    Returns:
        An array of the datatype, (*shape).

    Raises:
        MalformedRequestError: the data are no list, or have another shape.
        InvalidInputError: they are no rectangular array, or the datatype cannot hold one of them.
    """
    if not json_values.is_list(data):
        raise MalformedRequestError(
            f"Expected data of input {shown(tensor.name)} to be a list. Received: {shown(data)}."
        )
    if flat and len(data) == tensor.count and (array := _at_once(tensor, data)) is not None:
        return array.reshape(tensor.shape)
    items, nesting = json_arrays.levels(tensor.name, data)
    if list(nesting) not in (tensor.shape, [tensor.count]):
        raise MalformedRequestError(
            f"Expected data of input {shown(tensor.name)} to be one list of {tensor.count}, or lists as its shape "
            f"{tensor.shape} says. Received: shape {list(nesting)}."
        )
    return _exact(tensor, items).reshape(tensor.shape)


def only_input(signature: ModelSignature, body: bytes) -> dict[str, NDArray[Any]]:
    """Read a body that is nothing but the bytes of a model's only input, in its own dtype.

    Returns:
        The input by its name, as `from_bytes` returns it.

    Raises:
        MalformedRequestError: the model has several inputs, or the bytes are no whole number of rows.
        InvalidInputError: a BOOL is neither 0 nor 1.
    """
    if len(signature.inputs) != 1:
        raise MalformedRequestError(
            "Expected Inference-Header-Content-Length to be more than 0, since the model has several inputs, which the "
            f"JSON has to tell apart: {', '.join(spec.name for spec in signature.inputs)}. Received: 0."
        )
    spec = signature.inputs[0]
    dtype, row_shape = np.dtype(spec.dtype), [size for size in spec.shape if size is not None]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    rows, left = divmod(len(body), row_bytes) if row_bytes else (0, 0)
    if left or not rows:
        raise MalformedRequestError(
            f"Expected nothing but rows of input {spec.name!r}, {spec.describe()}, {row_bytes} bytes each, since "
            f"Inference-Header-Content-Length is 0. Received: {len(body)} bytes."
        )
    return {spec.name: from_bytes(head(spec.name, datatype_of(dtype), [rows, *row_shape]), body, 0)}


def to_bytes(array: NDArray[Any]) -> bytes:
    """Write a tensor: row-major and little-endian, whatever its order in memory and the platform's."""
    if array.dtype.isnative and sys.byteorder == "little":
        return array.tobytes()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def join(header: bytes, tensors: Sequence[bytes]) -> Encoded:
    """Put a JSON header and the tensors behind it together."""
    return Encoded(b"".join((header, *tensors)), MEDIA_TYPE, {HEADER_LENGTH: str(len(header))})


def _is_shape(value: Any, dtype: np.dtype[Any]) -> bool:
    if type(value) is not list or len(value) > MAX_DIMENSIONS:
        return False
    for size in value:
        if type(size) is not int or size < 0:
            return False
    if 0 in value:  # nothing to hold, and yet there are sizes that NumPy refuses
        try:
            np.empty(value, dtype)
        except (ValueError, OverflowError):
            return False
    return True


def _at_once(tensor: Head, data: Any) -> NDArray[Any] | None:
    """Return numbers as an array of the datatype, or None where it cannot hold one of them, or they are none."""
    dtype = DATATYPES[tensor.datatype]
    if dtype.kind not in _BUFFER_TYPES:
        return None
    numbers = json_arrays.flat_numbers(data, [_BUFFER_TYPES[dtype.kind]])
    if numbers is None or not numbers.size:
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = numbers.astype(dtype)
        return array if np.isfinite(array).all() else None
    limits = np.iinfo(dtype)
    return numbers.astype(dtype) if limits.min <= numbers.min() and numbers.max() <= limits.max else None


def _exact(tensor: Head, items: list[Any]) -> NDArray[Any]:
    """Make an array of parsed JSON, each of which the datatype must be able to hold."""
    dtype = DATATYPES[tensor.datatype]
    types = _JSON_TYPES[dtype.kind]
    if not json_arrays.types_of(items) <= types:
        raise _misfit(tensor, items, next(i for i, item in enumerate(items) if type(item) not in types))
    try:
        with np.errstate(over="ignore"):
            array = json_arrays.packed(items, dtype)
    except OverflowError as error:
        limits = np.iinfo(dtype)
        outside = next(i for i, item in enumerate(items) if not limits.min <= item <= limits.max)
        raise _misfit(tensor, items, outside) from error
    if not (finite := np.isfinite(array)).all():
        raise _misfit(tensor, items, int(finite.argmin()))
    return array


def _misfit(tensor: Head, items: list[Any], index: int) -> InvalidInputError:
    return InvalidInputError(
        f"Expected each of data of input {shown(tensor.name)} to be {tensor.datatype}. "
        f"Received: {shown(items[index])} at index {index}."
    )
