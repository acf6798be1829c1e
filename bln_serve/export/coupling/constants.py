"""Reading what a graph holds as constants: sizes always, entries of the short ones only.

A file may claim a tensor of any size and hold none of it. Only tensors whose entries stand in the file, and are few,
are read; data outside the file never is.
"""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bln_serve.export.coupling.sizes import Dims, Size
from bln_serve.export.coupling.states import Array, Tensor

_MOST_ENTRIES = 4096
LONGEST = 64
"""Of the vectors whose entries are followed: longer ones are nobody's shape."""


def of_tensor(proto: onnx.TensorProto) -> Tensor:
    """Return what is known of a stored tensor."""
    array = read(proto)
    values = None if array is None else _whole(array)
    return Tensor(proto.data_type, tuple(map(Size, proto.dims)), values=values, array=array)


def read(proto: onnx.TensorProto) -> Array | None:
    """Return the entries of a small tensor, None of a large one or one whose entries do not stand in the file."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return None
    entries = 1
    for size in proto.dims:
        entries *= size
    if not 0 <= entries <= _MOST_ENTRIES or min(proto.dims, default=1) < 0:
        return None
    try:
        return np.asarray(numpy_helper.to_array(proto))
    except (TypeError, ValueError):  # fewer entries than the sizes say, or a dtype that NumPy has no word for
        return None


def whole_numbers(proto: onnx.TensorProto) -> Dims | None:
    """Return the entries of a stored scalar or vector of whole numbers, None for any other."""
    array = read(proto)
    return None if array is None else _whole(array)


def of_attributes(attributes: dict[str, Any]) -> Tensor | None:
    """Return what a Constant node holds; None for a form that is not known."""
    if isinstance(proto := attributes.get("value"), onnx.TensorProto):
        return of_tensor(proto)
    forms = (
        ("value_int", np.int64, onnx.TensorProto.INT64),
        ("value_ints", np.int64, onnx.TensorProto.INT64),
        ("value_float", np.float32, onnx.TensorProto.FLOAT),
        ("value_floats", np.float32, onnx.TensorProto.FLOAT),
    )
    for name, dtype, number in forms:
        if name in attributes:
            array = np.asarray(attributes[name], dtype)
            return Tensor(number, tuple(map(Size, array.shape)), values=_whole(array), array=array)
    return None


def _whole(array: Array) -> Dims | None:
    """Return the entries of a scalar or a short vector where each is a whole number."""
    if array.ndim > 1 or array.size > LONGEST or array.dtype.kind not in "iufb":
        return None
    flat = array.reshape(-1)
    if array.dtype.kind == "f" and not (np.isfinite(flat).all() and (flat == np.floor(flat)).all()):
        return None
    return tuple(Size(int(entry)) for entry in flat)
