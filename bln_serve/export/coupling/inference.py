"""Sizes and dtypes of a node's outputs, by ONNX's own shape inference, one node at a time.

Nothing is executed. A size that is a monomial is handed over under a name of its own, and recognised when it comes out.
"""

from collections.abc import Sequence

import onnx
from onnx import defs, helper, shape_inference

from bln_serve.export.coupling.calls import Inferred
from bln_serve.export.coupling.constants import LONGEST
from bln_serve.export.coupling.sizes import Dims, Size
from bln_serve.export.coupling.states import Tensor

_WHOLE = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_UNKNOWN = Inferred(0, None)


class _Names:
    """Names for sizes that are no numbers."""

    def __init__(self) -> None:
        self._of: dict[Size, str] = {}
        self._sizes: dict[str, Size] = {}

    def write(self, size: Size | None) -> int | str | None:
        if size is None or size.number is not None:
            return None if size is None or size.factor < 0 else size.factor
        name = self._of.setdefault(size, f"size{len(self._of)}")
        self._sizes[name] = size
        return name

    def read(self, dim: onnx.TensorShapeProto.Dimension) -> Size | None:
        if dim.HasField("dim_value"):
            return Size(dim.dim_value) if dim.dim_value >= 0 else None
        return self._sizes.get(dim.dim_param)


def infer(node: onnx.NodeProto, inputs: Sequence[Tensor | None], version: int, ir_version: int) -> tuple[Inferred, ...]:
    """Return what is known of each output.

    Args:
        node: of the standard operators, without subgraphs.
        inputs: what is known of each input.
        version: of the standard operators.
        ir_version: of the model.
    """
    unknown = (_UNKNOWN,) * len(node.output)
    if any(tensor is not None and (tensor.is_sequence or not tensor.dtype) for tensor in inputs):
        return unknown
    names = _Names()
    present = [(name, tensor) for name, tensor in zip(node.input, inputs, strict=True) if tensor is not None]
    types = {name: helper.make_tensor_type_proto(t.dtype, _shape(t.dims, names)) for name, t in present}
    data = {name: proto for name, tensor in present if (proto := _data(name, tensor)) is not None}
    try:
        schema = defs.get_schema(node.op_type, version, "")
        imports = [helper.make_opsetid("", version)]
        found = shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=imports, ir_version=ir_version
        )
    except Exception:
        return unknown
    return tuple(_read(found.get(name), names) for name in node.output)


def _shape(dims: Dims | None, names: _Names) -> list[int | str | None] | None:
    return None if dims is None else [names.write(size) for size in dims]


def _data(name: str, tensor: Tensor) -> onnx.TensorProto | None:
    """Return the entries of a small constant, which may be axes, sizes or the like."""
    if tensor.array is not None and tensor.array.size <= LONGEST and tensor.array.ndim <= 1:
        return onnx.numpy_helper.from_array(tensor.array, name)
    numbers = tensor.numbers
    if numbers is None or tensor.dims is None or len(tensor.dims) > 1 or tensor.dtype not in _WHOLE:
        return None
    return helper.make_tensor(name, tensor.dtype, [len(numbers)] if tensor.dims else [], numbers)


def _read(found: onnx.TypeProto | None, names: _Names) -> Inferred:
    if found is None or not found.HasField("tensor_type"):
        return _UNKNOWN
    tensor = found.tensor_type
    dims = tuple(names.read(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return Inferred(tensor.elem_type, dims)
