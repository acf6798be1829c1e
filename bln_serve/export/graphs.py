"""What the passes over an ONNX graph share: who makes a value, who takes it, and putting nodes in another's place."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class Emitter:
    """Collects the nodes and tables that take the place of one node.

    Args:
        prefix: of the names, which must be the node's own.
        dtype: of the float tables, as ONNX counts element types.
    """

    def __init__(self, prefix: str, dtype: int = onnx.TensorProto.FLOAT) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._stored: dict[tuple[Any, ...], str] = {}

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = f"{self._prefix}/{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def table(self, values: Any) -> str:
        """Store floats in the node's dtype."""
        return self._store(np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(self.dtype)))

    def integers(self, *values: int) -> str:
        """Store axes, indices or a shape: one dimension."""
        return self._store(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Store an integer without a dimension."""
        return self._store(np.array(value, np.int64))

    def _store(self, values: NDArray[Any]) -> str:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._stored:
            name = f"{self._prefix}/table_{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
            self._stored[key] = name
        return self._stored[key]


def subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    """Yield the graphs that a node holds, as Loop and If do."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and of all graphs inside it."""
    return [each for node in graph.node for each in (node, *(n for sub in subgraphs(node) for n in all_nodes(sub)))]


def values_used(graph: onnx.GraphProto) -> set[str]:
    """Return the name of every value that a node or an output takes, also inside subgraphs."""
    nodes = all_nodes(graph)
    outputs = [value.name for node in nodes for sub in subgraphs(node) for value in sub.output]
    return {name for node in nodes for name in node.input} | {value.name for value in graph.output} | set(outputs)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the initializers that nothing takes."""
    used = values_used(graph)
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def tables_of(graph: onnx.GraphProto) -> Mapping[str, onnx.TensorProto]:
    """Return the initializers by name."""
    return {item.name: item for item in graph.initializer}


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy, so that a pass leaves what it was given as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
