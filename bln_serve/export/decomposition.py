"""Lowering BLN's custom op to standard ONNX operators, as a pure function from model to model.

Precondition: each `com.bln::BatchLayerNormalization` node stands in the main graph, with x in any float dtype, its axes
as the attribute `axes` says, and its six tables as initializers. Result: none is left, and no other node is touched.

With s_b = gamma * w_b / sqrt(d) and s_f = gamma * w_f / sqrt(d), the layer is

    y = (x - bm) * s_b / sqrt(bv + epsilon)  +  (x - fm) * s_f / sqrt(fv + epsilon)  +  beta

and every factor that only holds stored values is a table, folded here in float64:

    batch branch     bm, bv stored   x * A + B                 A = s_b / sqrt(bv + epsilon), B = -bm * A   (1, ..., d)
                     bv stored       (x - mean(x)) * A
                     bv live         (x - bm or mean(x)) * (s_b / sqrt(var(x) + epsilon))
    feature branch   fm, fv stored   x * C[:rows] + D[:rows]   C = s_f / sqrt(fv + epsilon), D = -fm * C   (m, ..., d)
                     fv stored       (x - mean(x)) * C[:rows]
                     fv live         (x - fm[:rows] or mean(x)) / sqrt(var(x) + epsilon) * s_f

Both branches stored make one multiplication and one addition, x * (A + C) + (B + D + beta). A feature branch whose mean
and variance are live is ONNX's LayerNormalization with scale s_f, in one node, where features lie last; not in float64,
where its epsilon, a float32 attribute, would cost digits. Elsewhere a live variance is taken in two passes about its
own live mean: one pass would lose an input's offset to cancellation. Where the feature tables have a single row, at
m = 1 or since the slots are pooled, C and D have one too: it serves every row of x, and nothing is cut.

One run may hold K mini-batches of r rows side by side, each with its own statistics and its own slot 0. K is the
model's input `mini_batches`, int64 of shape (1,): an initializer of 1 that may be overridden, so that who does not know
of it never meets it.

    live over rows              x is seen as (K, r, ...), and its rows are the second axis
    stored by slot, no more     C and D are taken at the slots 0 ... r - 1, K times over; where all are stored, y takes
                                two look-ups, a multiplication and an addition
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, TABLES, attributes_of, is_op
from bln_serve.export.graphs import Emitter, copy_of, drop_unused, replace_nodes, tables_of, values_used
from bln_serve.export.layer_node import Layer, Table
from bln_serve.manifest import MINI_BATCHES
from bln_serve.statistics import Source


def decompose(marked: onnx.ModelProto, *, several_mini_batches: bool = True) -> onnx.ModelProto:
    """Return the model with every BLN node lowered; `marked` is not changed.

    Args:
        marked: the model.
        several_mini_batches: give the model the input `mini_batches` if a layer's rows meet.

    Raises:
        UnsupportedModelError: the model has an input of its own by that name.
    """
    model = copy_of(marked)
    graph = model.graph
    tables = tables_of(graph)
    lowered: list[onnx.NodeProto] = []
    slots = _Slots(graph.input[0].name, several_mini_batches)
    for index, node in enumerate(graph.node):
        if not is_op(node, BATCH_LAYER_NORMALIZATION):
            lowered.append(node)
            continue
        values = [numpy_helper.to_array(tables[name]) for name in node.input[1:]]
        layer = Layer(attributes_of(node), dict(zip(TABLES, values, strict=True)), several_mini_batches)
        emit = Emitter(f"{layer.name}_{index}", layer.dtype)
        _lower(emit, layer, slots, node.input[0], node.output[0])
        lowered += emit.nodes
        graph.initializer.extend(emit.initializers)
    replace_nodes(graph, [*slots.emit.nodes, *lowered])
    graph.initializer.extend(slots.emit.initializers)
    drop_unused(graph)
    if MINI_BATCHES in values_used(graph):
        _add_mini_batches(graph)
    return model


class _Slots:
    """What all layers need of a run's rows, computed once for those that make as many of their own of each.

    Args:
        rows: any input of the model; it has the run's rows.
        several: whether a run may hold several mini-batches.
    """

    def __init__(self, rows: str, several: bool) -> None:
        self.emit = Emitter("slots")
        self._rows, self._several = rows, several
        self._made: dict[tuple[str, int], str] = {}

    def of(self, layer: Layer) -> str:
        """Return the slots of a layer's rows, (rows,)."""
        return self._once(self._make, layer.rows_per_row)

    def rows_of_each(self, layer: Layer) -> str:
        """Return how many rows of a layer a mini-batch has, (1,): whole rows of the request times what each makes."""
        return self._once(self._each, layer.rows_per_row)

    def _once(self, make: Callable[[int], str], rows_per_row: int) -> str:
        key = (make.__name__, rows_per_row)
        if key not in self._made:
            self._made[key] = make(rows_per_row)
        return self._made[key]

    def _rows_of_all(self, rows_per_row: int) -> str:
        if rows_per_row == 1:
            return self.emit("Shape", self._rows, start=0, end=1)
        return self.emit("Mul", self._once(self._rows_of_all, 1), self.emit.integers(rows_per_row))

    def _each(self, rows_per_row: int) -> str:
        if rows_per_row > 1:
            return self.emit("Mul", self._once(self._each, 1), self.emit.integers(rows_per_row))
        rows = self._once(self._rows_of_all, 1)
        return self.emit("Div", rows, MINI_BATCHES) if self._several else rows

    def _make(self, rows_per_row: int) -> str:
        emit = self.emit
        each = emit("Squeeze", self._once(self._each, rows_per_row))
        slots = emit("Range", emit.integer(0), each, emit.integer(1))
        if not self._several:
            return slots
        # As many slots as rows, or none: one row and no slot would be broadcast to an answer without rows.
        return emit("Reshape", emit("Tile", slots, MINI_BATCHES), self._once(self._rows_of_all, rows_per_row))


def _lower(emit: Emitter, layer: Layer, slots: _Slots, x: str, y: str) -> None:
    x = emit("Cast", x, to=layer.dtype) if layer.half else x
    x = _split(emit, layer, slots, x) if layer.split else x
    total = _normalized(_Scope(emit, layer, slots, x))
    if layer.split:
        total = emit("Reshape", total, emit.integers(*layer.lengths()))
    if layer.half:
        emit("Cast", total, to=getattr(onnx.TensorProto, layer.attributes["dtype"].upper()))
    emit.nodes[-1].output[0] = y


def _split(emit: Emitter, layer: Layer, slots: _Slots, x: str) -> str:
    """See x of shape (..., r, ...) as (..., K, r / K, ...)."""
    lengths, at = layer.lengths(), layer.axes[0]
    before = [emit.integers(*lengths[:at])] if at else []
    behind = [emit.integers(*lengths[at:])]
    if layer.rows_per_row > 1:
        # A length of -1 would let a mini-batch end within what one row of the request makes.
        behind = [slots.rows_of_each(layer), *([emit.integers(*lengths[at + 1 :])] if lengths[at + 1 :] else [])]
    # Else a number of 0 would mean the length that x has there.
    return emit("Reshape", x, emit("Concat", *before, MINI_BATCHES, *behind, axis=0), allowzero=1)


@dataclass(frozen=True)
class _Scope:
    """One layer being lowered.

    Attributes:
        emit: takes its nodes and tables.
        layer: what it is.
        slots: of the run's rows.
        x: its input, split into mini-batches if it is to be.
    """

    emit: Emitter
    layer: Layer
    slots: _Slots
    x: str

    def stored(self, table: Table) -> str:
        """Store a table; of one that has an entry for each slot, take those of the rows."""
        emit, layer = self.emit, self.layer
        values = layer.arrange(table)
        name = emit.table(values)
        if table.ndim == 1 or table.shape[0] == 1:
            return name
        axis = values.ndim - layer.rank - layer.split + layer.row_axis
        if not layer.split:
            return emit("Gather", name, self.slots.of(layer), axis=axis)
        rows = emit("Shape", self.x, start=layer.row_axis, end=layer.row_axis + 1)
        return emit("Slice", name, emit.integers(0), rows, emit.integers(axis))


def _normalized(scope: _Scope) -> str:
    emit, layer, x = scope.emit, scope.layer, scope.x
    branches = [_branch(scope, _Branch.of(kind, layer)) for kind in ("batch", "feature")]
    terms = [term for term in branches if isinstance(term, str)]
    affine = _sum([term for term in branches if isinstance(term, _Affine)], layer.offset)
    if affine.scale is not None:
        terms.append(emit("Mul", x, scope.stored(affine.scale)))
    if np.any(affine.offset):
        terms.append(scope.stored(affine.offset))
    total = terms[0]
    for term in terms[1:]:
        total = emit("Add", total, term)
    return total


@dataclass(frozen=True)
class _Affine:
    """A branch that holds only stored values: x * scale + offset, as tables."""

    scale: Table | None
    offset: Table


@dataclass(frozen=True)
class _Branch:
    """One of the two branches: its axis in x, its scale, and its stored mean and variance where it has them."""

    axis: int
    over_rows: bool
    scale: Table
    mean: Table | None
    var: Table | None

    @classmethod
    def of(cls, kind: str, layer: Layer) -> "_Branch":
        sources = layer.policy.sources
        stored = {
            part: layer.tables[f"{kind}_{part}"] if sources[f"{kind}_{part}"] is Source.POPULATION else None
            for part in ("mean", "var")
        }
        over_rows = kind == "batch"
        return cls(layer.row_axis if over_rows else layer.feature_axis, over_rows, layer.scale(kind), **stored)


def _branch(scope: _Scope, branch: _Branch) -> "_Affine | str":
    """Return the branch as tables if it can be folded, else the name of its value."""
    emit, layer, x = scope.emit, scope.layer, scope.x
    scale = None if branch.var is None else branch.scale / np.sqrt(branch.var + layer.epsilon)
    if branch.mean is not None and scale is not None:
        return _Affine(scale, -branch.mean * scale)
    if not branch.over_rows and layer.is_layer_normalization:
        bias = [] if layer.bias is None else [emit.table(layer.bias)]
        return emit("LayerNormalization", x, emit.table(branch.scale), *bias, axis=-1, epsilon=layer.epsilon)
    axis = emit.integers(branch.axis)
    about_live = emit("Sub", x, emit("ReduceMean", x, axis, keepdims=1))
    centered = about_live if branch.mean is None else emit("Sub", x, scope.stored(branch.mean))
    if scale is not None:
        return emit("Mul", centered, scope.stored(scale))
    variance = emit("ReduceMean", emit("Mul", about_live, about_live), axis, keepdims=1)
    deviation = emit("Sqrt", emit("Add", variance, emit.table(layer.epsilon)))
    factor = emit.table(layer.arrange(branch.scale))
    if branch.over_rows:
        return emit("Mul", centered, emit("Div", factor, deviation))
    return emit("Mul", emit("Div", centered, deviation), factor)


def _sum(parts: Sequence[_Affine], beta: Table) -> _Affine:
    scales = [part.scale for part in parts if part.scale is not None]
    offset = beta
    for part in parts:
        offset = offset + part.offset
    return _Affine(sum(scales[1:], start=scales[0]) if scales else None, offset)


def _add_mini_batches(graph: onnx.GraphProto) -> None:
    if any(value.name == MINI_BATCHES for value in graph.input):
        raise UnsupportedModelError(
            f"Expected no input named {MINI_BATCHES!r}, which says how many mini-batches a run holds. Received: one. "
            "Rename the model's input."
        )
    graph.input.append(helper.make_tensor_value_info(MINI_BATCHES, onnx.TensorProto.INT64, [1]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), MINI_BATCHES))
