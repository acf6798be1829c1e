"""An ONNX file, whoever made it: read safely, and described with its row coupling and index ranges.

Nothing is executed, and no data outside the file is read. A file that is cut short, that claims more than it holds, or
that points out of its own folder, is refused with a sentence.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import defs, helper

from bln_serve.errors import ModelLoadError
from bln_serve.export.coupling import analyse
from bln_serve.export.index_ranges import index_ranges
from bln_serve.statistics import RowCoupling

_STANDARD = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training")
_METADATA_PREFIX = "bln."
_PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)


@dataclass(frozen=True)
class OnnxTensor:
    """One input or output.

    Attributes:
        name: its name.
        dtype: NumPy's name, or ONNX's where NumPy has none.
        shape: numbers, names of free dimensions, and None for a nameless one; None where nothing is said.
        index_range: lowest and highest valid value of an input that indexes a table, both inclusive.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    index_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class OnnxState:
    """What an ONNX file says of itself, and what is proved of it.

    Attributes:
        ir_version: of the file format.
        opsets: the version of each domain's operators; the standard one's name is `ai.onnx`.
        other_operators: operators of other domains than the standard ones, as domain::operator.
        inputs: those that a caller must give.
        outputs: all.
        metadata: the file's `bln.` entries.
        row_coupling: what an answer depends on; mini-batch where nothing weaker is proved.
        row_coupling_reason: why.
        row_coupling_path: the nodes from an input to the first that couples.
        outputs_without_rows: outputs whose axis 0 is not proved to be the rows.
        layer_rows: for each BLN node how many entries of its axis 0 one row makes.
    """

    ir_version: int
    opsets: Mapping[str, int]
    other_operators: tuple[str, ...]
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    metadata: Mapping[str, str]
    row_coupling: RowCoupling
    row_coupling_reason: str
    row_coupling_path: tuple[str, ...]
    outputs_without_rows: tuple[str, ...]
    layer_rows: Mapping[str, int | None]

    @property
    def is_standard(self) -> bool:
        """Whether every runtime that knows its opset runs it."""
        return not self.other_operators and self.opsets.get("ai.onnx", 0) <= defs.onnx_opset_version()


def inspect(path: Path) -> OnnxState:
    """Read an ONNX file and describe it.

    Raises:
        ModelLoadError: it is no ONNX file, or not whole, or not safe to read.
    """
    model = load(path)
    coupling, ranges = analyse(model), index_ranges(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in stored]
    return OnnxState(
        model.ir_version,
        {item.domain or "ai.onnx": item.version for item in model.opset_import},
        _other_operators(model),
        tuple(_describe(value, ranges.get(value.name)) for value in given),
        tuple(_describe(value) for value in model.graph.output),
        {item.key: item.value for item in model.metadata_props if item.key.startswith(_METADATA_PREFIX)},
        coupling.row_coupling,
        coupling.reason,
        coupling.path,
        coupling.outputs_without_rows,
        coupling.layer_rows,
    )


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without what it keeps outside, and check that it is whole.

    Raises:
        ModelLoadError: it is no ONNX file, or not whole, or not safe to read.
    """
    if not path.is_file():
        raise ModelLoadError(f"Expected an ONNX file. Received: {path}, which is no file.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _refused(path, f"its bytes are no ONNX model, or not all of one ({error})") from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise _refused(path, "it has no graph, no operator set or no outputs")
    for tensor in _tensors(model):
        _check(path, tensor)
    return model


def _refused(path: Path, problem: str) -> ModelLoadError:
    return ModelLoadError(
        f"Expected an ONNX model that is whole and keeps to its own folder. Received: {path}, where {problem}. "
        "Export or copy the model again."
    )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _graphs_of(node)


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for held in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graphs(held)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _all_graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _all_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield from _graphs(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _graphs_of(node)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _all_graphs(model):
        yield from graph.initializer
        yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            held = (
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
                *attribute.sparse_tensors,
            )
            yield from (part for sparse in held for part in (sparse.values, sparse.indices))


def _check(path: Path, tensor: onnx.TensorProto) -> None:
    """Check that a stored tensor is what it claims to be.

    Raises:
        ModelLoadError: it is not.
    """
    name = f"tensor {tensor.name!r}"
    if min(tensor.dims, default=0) < 0:
        raise _refused(path, f"{name} has the shape {list(tensor.dims)}")
    entries = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(path, tensor, name)
    elif tensor.HasField("raw_data"):
        size = _size(tensor.data_type, entries)
        if size is None or size != len(tensor.raw_data):
            raise _refused(path, f"{name} of shape {list(tensor.dims)} holds {len(tensor.raw_data)} bytes, not {size}")
    elif entries and not _listed(tensor, entries):
        raise _refused(path, f"{name} of shape {list(tensor.dims)} does not hold {entries} entries")


def _size(dtype: int, entries: int) -> int | None:
    """Return how many bytes entries of a dtype take, None for a dtype that has no size."""
    if dtype in _PACKED:
        return (entries + 1) // 2
    try:
        itemsize = helper.tensor_dtype_to_np_dtype(dtype).itemsize
    except (KeyError, TypeError, ValueError):
        return None
    return entries * itemsize


def _listed(tensor: onnx.TensorProto, entries: int) -> bool:
    """Whether a tensor lists as many entries as its shape says; packed and complex ones take more or fewer numbers."""
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.uint64_data, tensor.double_data)
    held = max(*map(len, fields), len(tensor.string_data))
    return entries <= 2 * held and held <= 2 * entries


def _check_external(path: Path, tensor: onnx.TensorProto, name: str) -> None:
    """Check where a tensor says that its entries are; they are not read.

    Raises:
        ModelLoadError: outside the file's folder, or nowhere.
    """
    said = {item.key: item.value for item in tensor.external_data}
    folder = path.parent.resolve()
    location = said.get("location", "")
    try:
        target = (folder / location).resolve()
        offset, length = (int(said.get(key) or 0) for key in ("offset", "length"))
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused(path, f"{name} keeps its entries in {location!r}: {error}") from error
    if not target.is_relative_to(folder) or target == folder:
        raise _refused(path, f"{name} keeps its entries in {location!r}, outside the model's folder")
    if not target.is_file():
        raise _refused(path, f"{name} keeps its entries in {location!r}, which is missing")
    size = length or _size(tensor.data_type, math.prod(tensor.dims)) or 0
    if offset < 0 or length < 0 or offset + size > target.stat().st_size:
        raise _refused(path, f"{name} keeps its entries behind the end of {location!r}")


def _other_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    local = {(function.domain, function.name) for function in model.functions}
    found = {(node.domain, node.op_type) for node in _nodes(model) if node.domain not in _STANDARD}
    return tuple(f"{domain}::{op_type}" for domain, op_type in sorted(found - local))


def _describe(value: onnx.ValueInfoProto, index_range: tuple[int, int] | None = None) -> OnnxTensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return OnnxTensor(value.name, (kind or "unknown type").removesuffix("_type"), None)
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return OnnxTensor(
        value.name, _dtype_name(tensor.elem_type), dims if tensor.HasField("shape") else None, index_range
    )


def _dtype_name(dtype: int) -> str:
    if dtype == onnx.TensorProto.STRING:
        return "string"
    try:
        return str(helper.tensor_dtype_to_np_dtype(dtype).name)
    except (KeyError, TypeError, ValueError):
        return f"dtype {dtype}"
