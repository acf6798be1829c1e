"""Lowering the custom op to standard ONNX operators, as a pure function from model to model.

Precondition: each `com.bln::BatchLayerNormalization` node stands in the main graph, with x of shape (rows, ..., d) in
any float dtype and its six tables as initializers. Result: none is left, and no other node is touched.

With s_b = gamma * w_b / sqrt(d) and s_f = gamma * w_f / sqrt(d), the layer is

    y = (x - bm) * s_b / sqrt(bv + epsilon)  +  (x - fm) * s_f / sqrt(fv + epsilon)  +  beta

and every factor that only holds stored values is a table, folded here in float64:

    batch branch     bm, bv stored   x * A + B                 A = s_b / sqrt(bv + epsilon), B = -bm * A   (1, ..., d)
                     bv stored       (x - mean(x)) * A
                     bv live         (x - bm or mean(x)) * s_b / sqrt(var(x) + epsilon)
    feature branch   fm, fv stored   x * C[:rows] + D[:rows]   C = s_f / sqrt(fv + epsilon), D = -fm * C   (m, ..., d)
                     fv stored       (x - mean(x)) * C[:rows]
                     fv live         (x - fm[:rows] or mean(x)) * s_f / sqrt(var(x) + epsilon)

Both branches stored make one multiplication and one addition, x * (A + C) + (B + D + beta). A feature branch whose mean
and variance are live is ONNX's LayerNormalization with scale s_f, in one node; not in float64, where its epsilon, a
float32 attribute, would cost digits. Elsewhere a live variance is taken in two passes about its own live mean: one pass
would lose an input's offset to cancellation. At m = 1 the single slot serves every row, and nothing is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.marking import DOMAIN, TABLES
from bln_serve.statistics import Source, StatisticsPolicy

Table = NDArray[np.float64]

# Computed in float32, as the layer does.
_HALF = ("float16", "bfloat16")


def decompose(marked: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every custom node lowered; `marked` is not changed.

    Raises:
        UnsupportedModelError: a custom node stands inside a subgraph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(marked)
    graph = model.graph
    tables = {item.name: item for item in graph.initializer}
    lowered: list[onnx.NodeProto] = []
    for index, node in enumerate(graph.node):
        if node.domain != DOMAIN:
            lowered.append(node)
            continue
        values = {name: numpy_helper.to_array(tables[key]) for name, key in zip(TABLES, node.input[1:], strict=True)}
        emitter = _Emitter.of(node, index)
        _lower(emitter, node.input[0], node.output[0], _attributes(node), values)
        lowered += emitter.nodes
        graph.initializer.extend(emitter.initializers)
    del graph.node[:]
    graph.node.extend(lowered)
    _drop_unused(model)
    _require_none_left(model)
    return model


def _lower(emit: "_Emitter", x: str, y: str, attributes: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
    policy = StatisticsPolicy.from_code(attributes["policy"])
    half = attributes["dtype"] in _HALF
    layer = _Layer(
        emit("Cast", x, to=emit.dtype) if half else x,
        m=attributes["m"],
        epsilon=float(attributes["epsilon"]),
        batch_scale=tables["gamma"] * float(attributes["w_b"]) / np.sqrt(tables["gamma"].size),
        feature_scale=tables["gamma"] * float(attributes["w_f"]) / np.sqrt(tables["gamma"].size),
    )
    batch = _branch(emit, layer, _Branch.of("batch", policy, tables, layer.batch_scale))
    feature = _branch(emit, layer, _Branch.of("feature", policy, tables, layer.feature_scale))
    terms = [term for term in (batch, feature) if isinstance(term, str)]
    affine = _sum([term for term in (batch, feature) if isinstance(term, _Affine)], tables["beta"])
    if affine.scale is not None:
        terms.append(emit("Mul", layer.x, _cut(emit, layer, affine.scale)))
    terms.append(_cut(emit, layer, affine.offset))
    total = terms[0]
    for term in terms[1:]:
        total = emit("Add", total, term)
    if half:
        emit("Cast", total, to=getattr(onnx.TensorProto, attributes["dtype"].upper()))
    emit.nodes[-1].output[0] = y


@dataclass(frozen=True)
class _Layer:
    """What both branches of one layer share."""

    x: str
    m: int
    epsilon: float
    batch_scale: Table
    feature_scale: Table


@dataclass(frozen=True)
class _Affine:
    """A branch that holds only stored values: x * scale + offset, as tables."""

    scale: Table | None
    offset: Table


@dataclass(frozen=True)
class _Branch:
    """One of the two branches: its axis, its scale, and its stored mean and variance where it has them."""

    axis: int
    scale: Table
    mean: Table | None
    var: Table | None

    @classmethod
    def of(cls, kind: str, policy: StatisticsPolicy, tables: Mapping[str, Table], scale: Table) -> "_Branch":
        stored = {
            part: tables[f"{kind}_{part}"] if policy.sources[f"{kind}_{part}"] is Source.POPULATION else None
            for part in ("mean", "var")
        }
        return cls(0 if kind == "batch" else -1, scale, **stored)


def _branch(emit: "_Emitter", layer: _Layer, branch: _Branch) -> "_Affine | str":
    """Return the branch as tables if it can be folded, else the name of its value."""
    scale = None if branch.var is None else branch.scale / np.sqrt(branch.var + layer.epsilon)
    if branch.mean is not None and scale is not None:
        return _Affine(scale, -branch.mean * scale)
    if branch.axis == -1 and branch.mean is None and scale is None and emit.dtype == onnx.TensorProto.FLOAT:
        return emit("LayerNormalization", layer.x, emit.table(branch.scale), axis=-1, epsilon=layer.epsilon)
    axes = emit.axes(branch.axis)
    about_live = emit("Sub", layer.x, emit("ReduceMean", layer.x, axes, keepdims=1))
    centered = about_live if branch.mean is None else emit("Sub", layer.x, _cut(emit, layer, branch.mean))
    if scale is not None:
        return emit("Mul", centered, _cut(emit, layer, scale))
    variance = emit("ReduceMean", emit("Mul", about_live, about_live), axes, keepdims=1)
    deviation = emit("Sqrt", emit("Add", variance, emit.table(np.asarray(layer.epsilon))))
    if branch.axis == 0:
        return emit("Mul", centered, emit("Div", emit.table(branch.scale), deviation))
    return emit("Mul", emit("Div", centered, deviation), emit.table(branch.scale))


def _sum(parts: list[_Affine], beta: Table) -> _Affine:
    scales = [part.scale for part in parts if part.scale is not None]
    offset = beta
    for part in parts:
        offset = offset + part.offset
    return _Affine(sum(scales[1:], start=scales[0]) if scales else None, offset)


def _cut(emit: "_Emitter", layer: _Layer, table: Table) -> str:
    """Store a table, and cut one that has a row for each slot to the rows of the mini-batch."""
    name = emit.table(table)
    by_slot = table.ndim > 1 and table.shape[0] == layer.m and layer.m > 1
    if not by_slot:
        return name
    zero = emit.axes(0)
    return emit("Slice", name, zero, emit("Shape", layer.x, start=0, end=1), zero)


@dataclass
class _Emitter:
    """Collects the nodes and tables of one lowered layer."""

    prefix: str
    dtype: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    @classmethod
    def of(cls, node: onnx.NodeProto, index: int) -> "_Emitter":
        """Start on a custom node, in the dtype its statistics have."""
        attributes = _attributes(node)
        double = attributes["dtype"] == "float64"
        return cls(f"{attributes['layer']}_{index}", onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT)

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def table(self, values: Table) -> str:
        """Store values in the layer's dtype."""
        return self._store(np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(self.dtype)))

    def axes(self, axis: int) -> str:
        """Store an axis, or an index."""
        return self._store(np.array([axis], np.int64))

    def _store(self, values: NDArray[Any]) -> str:
        name = f"{self.prefix}/table_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
        return name


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _drop_unused(model: onnx.ModelProto) -> None:
    graph = model.graph
    used = {name for node in _all_nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    standard = [item for item in model.opset_import if item.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(standard)


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                nodes += _all_nodes(attribute.g)
    return nodes


def _require_none_left(model: onnx.ModelProto) -> None:
    nodes = [node for node in _all_nodes(model.graph) if node.domain not in ("", "ai.onnx")]
    if nodes:
        received = ", ".join(sorted({f"{node.domain}::{node.op_type}" for node in nodes}))
        raise UnsupportedModelError(f"Expected standard ONNX operators only. Received: {received}.")
