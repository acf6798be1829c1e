"""What is proved of a whole model."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import defs

from bln_serve.export.coupling.functions import inlined
from bln_serve.export.coupling.operators import STANDARD
from bln_serve.export.coupling.sizes import ONE, Size
from bln_serve.export.coupling.states import Cause, Dependence, Tensor, Trail, lost, rows_of
from bln_serve.export.coupling.walk import Walk
from bln_serve.statistics import RowCoupling

_COUPLING = {Dependence.NOTHING: RowCoupling.INDEPENDENT, Dependence.SLOT: RowCoupling.POSITIONAL}
_ALONE = "every operation treats each row alone"


@dataclass(frozen=True)
class GraphCoupling:
    """How a graph couples rows, as far as its operations show.

    Attributes:
        row_coupling: of all outputs together, the strongest; mini-batch where nothing weaker is proved.
        reason: why, half a sentence.
        path: the nodes from a model input to the first that couples: names, or operators where they have none.
        layer_rows: for each BLN node, by name, how many entries of its axis 0 one row makes, side by side: 1, or the
            number of steps where time is folded into the rows; None where that is not proved.
        outputs_without_rows: the outputs whose axis 0 is not proved to be the rows.
    """

    row_coupling: RowCoupling
    reason: str
    path: tuple[str, ...]
    layer_rows: Mapping[str, int | None]
    outputs_without_rows: tuple[str, ...]


@dataclass(frozen=True)
class _Verdict:
    """Of one output."""

    name: str
    row_coupling: RowCoupling
    cause: Cause | None
    has_rows: bool


def analyse(model: onnx.ModelProto) -> GraphCoupling:
    """Prove how a graph couples rows; nothing is executed.

    Every model input that is no initializer has its rows on axis 0, and all inputs have as many. An initializer that a
    caller may override is taken at its default.

    Args:
        model: any ONNX model, marked or not; `com.bln` nodes are known.
    """
    newest = defs.onnx_opset_version()
    if any(item.domain in STANDARD and item.version > newest for item in model.opset_import):
        cause = Cause(f"its operators are newer than opset {newest}, the newest known here", None)
        unknown = [_Verdict(value.name, RowCoupling.MINI_BATCH, cause, False) for value in model.graph.output]
        return _together(unknown, {})
    graph, walk, scope = _walked(model)
    outputs = [scope.get(value.name) or lost(Cause("nothing makes it", None)) for value in graph.output]
    names = [value.name for value in graph.output]
    verdicts = [_verdict(name, tensor) for name, tensor in zip(names, outputs, strict=True)]
    return _together(verdicts, walk.layer_rows)


def tensors_of(model: onnx.ModelProto) -> tuple[onnx.GraphProto, Mapping[str, Tensor]]:
    """Return a model's graph, its functions written out, and what is known of each tensor in it by name."""
    graph, _, scope = _walked(model)
    return graph, scope


def _walked(model: onnx.ModelProto) -> tuple[onnx.GraphProto, Walk, Mapping[str, Tensor]]:
    model = inlined(model)
    versions = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in model.opset_import}
    walk = Walk(versions, model.ir_version, _fixed_rows(model.graph))
    scope = ChainMap(_inputs(model.graph))
    walk.graph(model.graph, scope)
    return model.graph, walk, scope


def _together(verdicts: Sequence[_Verdict], layer_rows: Mapping[str, int | None]) -> GraphCoupling:
    if not verdicts:
        return GraphCoupling(RowCoupling.MINI_BATCH, "the graph has no outputs", (), layer_rows, ())
    strongest = max(verdicts, key=lambda verdict: verdict.row_coupling.strength)
    without = tuple(verdict.name for verdict in verdicts if not verdict.has_rows)
    cause = strongest.cause
    if cause is None:
        return GraphCoupling(strongest.row_coupling, _ALONE, (), layer_rows, without)
    path = cause.trail.names() if cause.trail else ()
    return GraphCoupling(strongest.row_coupling, cause.reason, path, layer_rows, without)


def _verdict(name: str, tensor: Tensor) -> _Verdict:
    has_rows = (tensor.axis, tensor.fold, tensor.is_sequence) == (0, ONE, False) and not tensor.may_end_early
    coupling = _COUPLING.get(tensor.dependence, RowCoupling.MINI_BATCH)
    if coupling is RowCoupling.MINI_BATCH or has_rows:
        if tensor.dependence is Dependence.ROW_COUNT:
            return _Verdict(name, coupling, Cause(f"output {name!r} holds the number of rows", tensor.trail), has_rows)
        return _Verdict(name, coupling, tensor.cause, has_rows)
    if tensor.axis is None:  # a constant
        return _Verdict(name, coupling, None, has_rows)
    return _Verdict(name, RowCoupling.MINI_BATCH, Cause(f"output {name!r} {_place(tensor)}", tensor.trail), has_rows)


def _place(tensor: Tensor) -> str:
    if tensor.axis:
        return f"has its rows on axis {tensor.axis}"
    if tensor.fold != ONE:
        return f"has {tensor.fold} entries of axis 0 a row"
    return "has fewer entries than there may be rows"


def _given(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that a caller must give."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def _fixed_rows(graph: onnx.GraphProto) -> int | None:
    """Return the number of rows that the model is made for, None where it takes any."""
    lengths = {_first_length(value) for value in _given(graph)}
    return lengths.pop() if len(lengths) == 1 else None


def _first_length(value: onnx.ValueInfoProto) -> int | None:
    dims = value.type.tensor_type.shape.dim
    return dims[0].dim_value if dims and dims[0].dim_value > 0 else None


def _inputs(graph: onnx.GraphProto) -> dict[str, Tensor]:
    given = _given(graph)
    names = {dims[0].dim_param for value in given if (dims := value.type.tensor_type.shape.dim) and dims[0].dim_param}
    alike = len({_first_length(value) for value in given}) == 1
    return {value.name: _input(value, names, alike) for value in given}


def _input(value: onnx.ValueInfoProto, rows_names: set[str], alike: bool) -> Tensor:
    """Return an input's state: rows on axis 0, and every other size its own."""
    trail = Trail(value.name)
    dims = value.type.tensor_type.shape.dim
    if not value.type.HasField("tensor_type") or not dims:
        return lost(Cause(f"input {value.name!r} has no row axis", trail))
    if _first_length(value) is not None and not alike:
        return lost(Cause(f"input {value.name!r} has another number of rows than other inputs", trail))
    if any(dim.dim_param in rows_names for dim in list(dims)[1:]):
        return lost(Cause(f"input {value.name!r} has a second axis as long as the rows", trail))
    sizes = [
        Size(dim.dim_value) if dim.dim_value > 0 else Size(1, (f"{value.name}[{axis}]",))
        for axis, dim in enumerate(dims)
    ]
    return _with_trail(rows_of(value.type.tensor_type.elem_type, tuple(sizes), 0, ONE), trail)


def _with_trail(tensor: Tensor, trail: Trail) -> Tensor:
    return Tensor(tensor.dtype, tensor.dims, tensor.axis, tensor.fold, trail=trail)
