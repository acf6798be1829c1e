"""The floor of a graph on this machine: what its arithmetic and its bytes cost if nothing else did.

    floor = max(flops / the machine's flops a second, bytes / the machine's bytes a second)

flops: of Conv, MatMul, Gemm, LSTM, GRU and RNN, a multiplication and an addition each, and one for each element that
any other operator makes. bytes: inputs, outputs and weights, each once (of a look-up the rows taken), as if everything
between stayed in the cache. The machine's figures are ONNX Runtime's own on one thread, so that the floor is one that
this runtime could reach: a MatMul of 1024 x 1024 matrices, an Add over 64 MB.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
from onnx import helper

from bln_serve.runtime import OnnxSession

_MAKES_NOTHING = ("Reshape", "Shape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Concat", "Slice", "Constant")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Machine:
    """What one thread can do, measured: floating point operations and bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What a graph has to do: floating point operations, and bytes in and out of the memory."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Return the floor."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@cache
def machine() -> Machine:
    """Measure this machine."""
    size, length = 1024, 8 * 2**20
    square = np.ones((size, size), np.float32)
    line = np.ones(length, np.float32)
    product = _seconds(_binary("MatMul", square.shape), square)
    addition = _seconds(_binary("Add", line.shape), line)
    return Machine(2 * size**3 / product, 3 * line.nbytes / addition)


def _binary(op_type: str, shape: tuple[int, ...]) -> OnnxSession:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "aby"]
    graph = helper.make_graph([helper.make_node(op_type, ["a", "b"], ["y"])], op_type, values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return OnnxSession(model.SerializeToString(), threads=1)


def _seconds(session: OnnxSession, array: np.ndarray) -> float:
    def once() -> float:
        began = time.perf_counter()
        session.run({"a": array, "b": array})
        return time.perf_counter() - began

    return min(once() for _ in range(20))


def work(model: onnx.ModelProto, rows: int) -> Work:
    """Count what one run of a model without control flow has to do."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    for value in (*bound.graph.input, *bound.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = rows
    graph = onnx.shape_inference.infer_shapes(bound, data_prop=True).graph
    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {item.name: tuple(item.dims) for item in graph.initializer}
    shapes |= weights
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    looked_up = sum(math.prod(shapes[node.output[0]]) for node in graph.node if node.input and node.input[0] in tables)
    outside = [shapes[value.name] for value in (*graph.input, *graph.output)]
    stored = [shape for name, shape in weights.items() if name not in tables]
    elements = looked_up + sum(math.prod(shape) for shape in (*outside, *stored))
    return Work(sum(_flops(node, shapes) for node in graph.node), 4 * elements)


def _flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    made = math.prod(shapes[next(name for name in node.output if name)])
    first = shapes[node.input[0]] if node.input else ()
    heavy: dict[str, Callable[[], float]] = {
        "MatMul": lambda: 2 * made * first[-1],
        "Gemm": lambda: 2 * made * first[-1],
        "Conv": lambda: 2 * made * math.prod(shapes[node.input[1]][1:]),
    }
    if node.op_type in heavy:
        return heavy[node.op_type]()
    if node.op_type in _GATES:
        directions, hidden = shapes[node.input[2]][0], shapes[node.input[2]][-1]
        return 2 * directions * first[0] * first[1] * _GATES[node.op_type] * hidden * (first[2] + hidden)
    return 0 if node.op_type in _MAKES_NOTHING else made


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
