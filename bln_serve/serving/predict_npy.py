"""Requests and answers as one array in NumPy's .npy format, for models with one input and one output.

The header is read by NumPy and believed only where the body agrees; nothing is ever unpickled. The facts that a JSON
answer holds beside its predictions travel as headers: bln-model, bln-version, bln-statistics, bln-mini-batches. The
last two are left out where a JSON answer says null.
"""

import io
import math
import re
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from bln_serve.errors import MalformedRequestError
from bln_serve.serving.prediction import Encoded, Prediction, PredictRequest

MEDIA_TYPE = "application/x-npy"

# As numpy.save writes it, of format version 1.0: the header's size, the dtype, the order, and the shape.
_USUAL = re.compile(
    rb"\x93NUMPY\x01\x00(?s:(..))\{'descr': '([<>|][biuf][1248])', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,18},|\d{1,18}(?:, \d{1,18})+)\), \} *\n"
)
_MAGIC_BYTES = 10  # and the header's size

_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


def read(body: bytes) -> PredictRequest:
    """Read a request's body without copying its numbers.

    Raises:
        MalformedRequestError: the body is no .npy of numbers, or its header and its length disagree.
    """
    shape, fortran_order, dtype, start = _header(body)
    if dtype.kind not in "biuf":
        raise MalformedRequestError(
            f"Expected an .npy body of numbers or booleans. Received: dtype {dtype.str!r}. Objects are never unpickled."
        )
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(body) - start:
        raise MalformedRequestError(
            f"Expected as many bytes after the .npy header as it announces: {dtype.str!r} of shape {shape}. "
            f"Received: {len(body) - start} bytes."
        )
    try:
        array = np.ndarray(shape, dtype, buffer=body, offset=start, order="F" if fortran_order else "C")
    except (ValueError, OverflowError) as error:  # an empty array may announce dimensions that NumPy cannot have
        raise MalformedRequestError(f"Expected an .npy body that NumPy can hold. Received: {error}.") from error
    return PredictRequest(array, write, answers_text=False)


def write(prediction: Prediction) -> Encoded:
    """Write an answer. NaN and infinity are sent as they are: the format can say them.

    Raises:
        MalformedRequestError: the model has several outputs.
    """
    return Encoded(_npy(single_output(list(prediction.outputs), prediction.outputs)), MEDIA_TYPE, prediction.headers)


def single_output(names: list[str], outputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the only output."""
    check_single_output(names)
    return outputs[names[0]]


def check_single_output(names: list[str]) -> None:
    """Refuse a model whose answer .npy cannot hold.

    Raises:
        MalformedRequestError: the model has several outputs.
    """
    if len(names) > 1:
        raise MalformedRequestError(
            f"Expected Accept: application/json, since the model has several outputs ({', '.join(names)}) and .npy "
            f"holds one. Received: Accept: {MEDIA_TYPE}."
        )


def _header(body: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read shape, order, dtype and where the numbers begin."""
    if usual := _USUAL.match(body):
        size, dtype, order, sizes = usual.groups()
        if len(sizes) and usual.end() == _MAGIC_BYTES + int.from_bytes(size, "little"):
            shape = tuple(int(each) for each in sizes.split(b",") if each.strip())
            return shape, order == b"True", np.dtype(dtype.decode()), usual.end()
    return _any_header(body)


def _any_header(body: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read what NumPy reads, which takes ten times as long: it compiles the header as Python's own literal."""
    stream = io.BytesIO(body)
    try:
        version = npy_format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f"format version {version[0]}.{version[1]}")
        shape, fortran_order, dtype = _READERS[version](stream)
    except Exception as error:  # NumPy's reader evaluates text that a stranger wrote: it may raise anything
        raise MalformedRequestError(
            f"Expected an .npy body of format version 1.0 or 2.0, as numpy.save writes it. Received: {error}."
        ) from error
    return shape, fortran_order, dtype, stream.tell()


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    npy_format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()
