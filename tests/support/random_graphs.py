"""Random ONNX graphs: each node is tried on real rows first, so that a graph is valid and as odd as chance makes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from support.row_probe import Runner

OPSET = 18
ROWS = 4
# Lengths that meet the number of rows by chance, on purpose.
_LENGTHS = (1, 2, 3, 4, 5, 8)
_UNARY = ("Relu", "Tanh", "Neg", "Abs", "Sigmoid", "Floor", "Identity", "Not", "Softplus", "Round")
_BINARY = ("Add", "Mul", "Sub", "Max", "Min", "Less", "Equal", "Greater", "Mean", "Sum", "Div", "Mod", "And")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceProd", "ReduceL2")


@dataclass
class Builder:
    """A graph that grows.

    Attributes:
        random: chooses everything.
        nodes: so far.
        constants: so far.
        values: what each tensor holds for the rows that were drawn.
    """

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, *kinds: str, rank: int | None = None) -> str:
        """Return the name of a tensor of a kind of dtype; later ones are likelier."""
        names = [
            name
            for name, value in self.values.items()
            if value.dtype.kind in (kinds or ("f",)) and value.size and (rank is None or value.ndim == rank)
        ]
        if not names:
            raise LookupError
        weights = np.arange(1, len(names) + 1) ** 1.5
        return str(self.random.choice(names, p=weights / weights.sum()))

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Store a constant."""
        name = f"c{len(self.constants)}"
        value = np.asarray(array, dtype)
        self.constants.append(numpy_helper.from_array(value, name))
        self.values[name] = value
        return name

    def table(self, *shape: int) -> str:
        """Store a constant of random floats."""
        return self.constant(self.random.integers(-4, 5, shape) / 2, np.float32)

    def axis(self, name: str) -> int:
        """Return some axis of a tensor."""
        rank = self.values[name].ndim
        return int(self.random.integers(-rank, rank)) if rank else 0

    def length(self) -> int:
        """Return some length."""
        return int(self.random.choice(_LENGTHS))

    def model(self, nodes: Sequence[onnx.NodeProto] | None = None) -> onnx.ModelProto:
        """Return the graph, with what the last node makes as its output."""
        nodes = self.nodes if nodes is None else nodes
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), ["n", *value.shape[1:]])
            for name, value in self.inputs.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in nodes[-1].output[:1]]
        graph = helper.make_graph(list(nodes), "random", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> bool:
        """Add a node if it runs; say whether it does."""
        names = [f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes)
        before, self.nodes = self.nodes, [*self.nodes, node]
        try:
            found = Runner(self.model())(self.inputs)
        except Exception:
            found = None
        if found is None or any(found[name].size > 4000 for name in names if isinstance(found[name], np.ndarray)):
            self.nodes = before
            return False
        self.values.update({name: found[name] for name in names if isinstance(found[name], np.ndarray)})
        return True


Step = Callable[[Builder], bool]


def _unary(b: Builder) -> bool:
    return b.add(str(b.random.choice(_UNARY)), b.take("f", "b"))


def _binary(b: Builder) -> bool:
    return b.add(str(b.random.choice(_BINARY)), b.take("f", "i"), b.take("f", "i"))


def _with_constant(b: Builder) -> bool:
    x = b.take("f")
    shape = [size if b.random.random() < 0.6 else 1 for size in b.values[x].shape]
    shape = shape[int(b.random.integers(0, len(shape) + 1)) :]
    return b.add(str(b.random.choice(["Add", "Mul", "Max"])), x, b.table(*shape))


def _reduce(b: Builder) -> bool:
    x = b.take("f", "i")
    axes = [b.constant([b.axis(x)], np.int64)] if b.random.random() < 0.9 else []
    return b.add(str(b.random.choice(_REDUCTIONS)), x, *axes, keepdims=int(b.random.integers(2)))


def _along(b: Builder) -> bool:
    x = b.take("f")
    op_type = str(b.random.choice(["Softmax", "LogSoftmax", "ArgMax", "Hardmax", "LpNormalization"]))
    return b.add(op_type, x, axis=b.axis(x))


def _cumulative(b: Builder) -> bool:
    x = b.take("f")
    return b.add("CumSum", x, b.constant(b.axis(x), np.int64))


def _top_k(b: Builder) -> bool:
    x = b.take("f")
    return b.add("TopK", x, b.constant([1 + b.random.integers(2)], np.int64), outputs=2, axis=b.axis(x))


def _transpose(b: Builder) -> bool:
    x = b.take("f", "i")
    return b.add("Transpose", x, perm=[int(axis) for axis in b.random.permutation(b.values[x].ndim)])


def _reshape(b: Builder) -> bool:
    x = b.take("f", "i")
    shape = list(b.values[x].shape)
    for _ in range(int(b.random.integers(1, 3))):
        at = int(b.random.integers(len(shape))) if shape else 0
        if len(shape) > 1 and at + 1 < len(shape) and b.random.random() < 0.6:
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        else:
            divisor = int(b.random.choice([1, 2, 3]))
            if shape and shape[at] % divisor == 0:
                order = [shape[at] // divisor, divisor]
                shape[at : at + 1] = order if b.random.random() < 0.5 else order[::-1]
    if shape and b.random.random() < 0.8:
        place = int(b.random.integers(len(shape))) if b.random.random() < 0.4 else shape.index(max(shape))
        shape[place] = -1
    return b.add("Reshape", x, b.constant(shape, np.int64))


def _reshape_by_shape(b: Builder) -> bool:
    x, like = b.take("f", "i"), b.take("f", "i")
    if not b.add("Shape", like):
        return False
    return b.add("Reshape", x, b.nodes[-1].output[0])


def _target(b: Builder) -> str:
    """Put a target together from a shape's entry and constants."""
    like = b.take("f", "i")
    start = int(b.random.integers(0, max(b.values[like].ndim, 1)))
    b.add("Shape", like, start=start, end=start + 1)
    entry = b.nodes[-1].output[0]
    parts = [b.constant([b.length()], np.int64) for _ in range(int(b.random.integers(0, 3)))]
    if b.random.random() < 0.3:
        parts.append(b.constant([-1], np.int64))
    parts.insert(int(b.random.integers(len(parts) + 1)), entry)
    b.add("Concat", *parts, axis=0)
    return b.nodes[-1].output[0]


def _reshape_to_target(b: Builder) -> bool:
    return b.add("Reshape", b.take("f", "i"), _target(b))


def _expand(b: Builder) -> bool:
    x = b.take("f") if b.random.random() < 0.5 else b.table(*[1] * int(b.random.integers(0, 3)))
    return b.add("Expand", x, _target(b))


def _fill(b: Builder) -> bool:
    value = numpy_helper.from_array(np.array([2], np.float32))
    return b.add("ConstantOfShape", _target(b), value=value)


def _tile(b: Builder) -> bool:
    x = b.take("f") if b.random.random() < 0.5 else b.table(b.length(), b.length())
    repeats = [int(count) for count in b.random.choice([1, 1, 1, 2], b.values[x].ndim)]
    if b.random.random() < 0.4:
        return b.add("Tile", x, _target(b))
    return b.add("Tile", x, b.constant(repeats, np.int64))


def _slice(b: Builder) -> bool:
    x = b.take("f", "i")
    axis = b.axis(x)
    end = b.random.choice([1, 2, 3, -1, 2**31 - 1])
    start = b.random.choice([0, 0, 1, -1])
    names = [b.constant([value], np.int64) for value in (start, end, axis)]
    return b.add("Slice", x, *names, b.constant([b.random.choice([1, 1, 2])], np.int64))


def _cut_table(b: Builder) -> bool:
    like = b.take("f")
    b.add("Shape", like, start=0, end=1)
    zero = b.constant([0], np.int64)
    table = b.table(int(b.random.choice([1, 4, 5, 8])), b.length())
    return b.add("Slice", table, zero, b.nodes[-1].output[0], zero)


def _concat(b: Builder) -> bool:
    x, y = b.take("f"), b.take("f")
    return b.add("Concat", x, y, axis=b.axis(x))


def _concat_self(b: Builder) -> bool:
    x = b.take("f")
    if not b.add("Tanh", x):
        return False
    return b.add("Concat", x, b.nodes[-1].output[0], axis=b.axis(x))


def _split(b: Builder) -> bool:
    x = b.take("f")
    return b.add("Split", x, outputs=2, axis=b.axis(x), num_outputs=2)


def _gather(b: Builder) -> bool:
    x = b.take("f")
    indices = b.constant(b.random.integers(0, 2, [2] * int(b.random.integers(0, 3))), np.int64)
    return b.add("Gather", x, indices, axis=b.axis(x))


def _look_up(b: Builder) -> bool:
    return b.add("Gather", b.table(16, b.length()), b.take("i"), axis=int(b.random.integers(-1, 1)))


def _gather_of_rows(b: Builder) -> bool:
    x = b.take("f")
    return b.add("Gather", x, b.take("i"), axis=b.axis(x))


def _gather_elements(b: Builder) -> bool:
    x = b.take("f")
    return b.add("GatherElements", x, b.take("i"), axis=b.axis(x))


def _gather_nd(b: Builder) -> bool:
    return b.add("GatherND", b.take("f"), b.take("i"), batch_dims=int(b.random.integers(0, 2)))


def _scatter(b: Builder) -> bool:
    x = b.take("f")
    op_type = str(b.random.choice(["ScatterND", "ScatterElements"]))
    attributes = {"axis": b.axis(x)} if op_type == "ScatterElements" else {}
    return b.add(op_type, x, b.take("i"), b.take("f"), **attributes)


def _scatter_constant(b: Builder) -> bool:
    x = b.take("f")
    shape = b.values[x].shape
    indices = b.constant([[int(b.random.integers(0, 2))]], np.int64)
    return b.add("ScatterND", x, indices, b.table(1, *shape[1:]))


def _pad(b: Builder) -> bool:
    x = b.take("f")
    pads = b.random.choice([0, 0, 1], 2 * b.values[x].ndim)
    return b.add("Pad", x, b.constant(pads, np.int64), mode=str(b.random.choice(["constant", "edge"])))


def _squeeze(b: Builder) -> bool:
    x = b.take("f")
    axes = [b.constant([b.axis(x)], np.int64)] if b.random.random() < 0.7 else []
    return b.add("Squeeze", x, *axes)


def _unsqueeze(b: Builder) -> bool:
    x = b.take("f", "i")
    return b.add("Unsqueeze", x, b.constant([b.axis(x)], np.int64))


def _flatten(b: Builder) -> bool:
    x = b.take("f")
    return b.add("Flatten", x, axis=b.axis(x))


def _product(b: Builder) -> bool:
    return b.add("MatMul", b.take("f"), b.take("f"))


def _product_with_own_transpose(b: Builder) -> bool:
    x = b.take("f")
    order = list(range(b.values[x].ndim))
    if len(order) < 2:
        return False
    order[-2:] = order[:-3:-1]
    return b.add("Transpose", x, perm=order) and b.add("MatMul", x, b.nodes[-1].output[0])


def _product_with_weights(b: Builder) -> bool:
    x = b.take("f")
    size = b.values[x].shape[-1] if b.values[x].ndim else 1
    if b.random.random() < 0.7:
        return b.add("MatMul", x, b.table(size, b.length()))
    return b.add("MatMul", b.table(b.length(), b.values[x].shape[-2] if b.values[x].ndim > 1 else size), x)


def _gemm(b: Builder) -> bool:
    x = b.take("f", rank=2)
    transposed = int(b.random.random() < 0.3)
    inner = b.values[x].shape[0 if transposed else 1]
    columns = b.length()
    bias = b.table(*([columns] if b.random.random() < 0.6 else [int(b.random.choice([1, ROWS])), columns]))
    return b.add("Gemm", x, b.table(inner, columns), bias, transA=transposed)


def _einsum(b: Builder) -> bool:
    if any(node.op_type == "Squeeze" and len(node.input) == 1 for node in b.nodes):
        return False  # with one row the rank drops, and ONNX Runtime then aborts the process instead of refusing
    two, three = ("ij,jk->ik", "ij,ij->ij", "ij,ij->i", "ij,ik->jk"), ("bij,bjk->bik", "bij,bik->bjk", "bij,bik->ijk")
    if b.random.random() < 0.5:
        return b.add("Einsum", b.take("f", rank=2), b.take("f", rank=2), equation=str(b.random.choice(two)))
    return b.add("Einsum", b.take("f", rank=3), b.take("f", rank=3), equation=str(b.random.choice(three)))


def _layer_normalization(b: Builder) -> bool:
    x = b.take("f")
    axis = b.axis(x)
    return b.add("LayerNormalization", x, b.table(*b.values[x].shape[axis:]), axis=axis)


def _convolution(b: Builder) -> bool:
    x = b.take("f", rank=3)
    weights = b.table(2, b.values[x].shape[1], int(b.random.integers(1, 3)))
    return b.add("Conv", x, weights)


def _pool(b: Builder) -> bool:
    x = b.take("f", rank=3)
    if b.random.random() < 0.5:
        return b.add("MaxPool", x, outputs=2, kernel_shape=[2])
    return b.add(str(b.random.choice(["GlobalAveragePool", "GlobalMaxPool"])), x)


def _instance(b: Builder) -> bool:
    x = b.take("f", rank=3)
    channels = b.values[x].shape[1]
    return b.add("InstanceNormalization", x, b.table(channels), b.table(channels))


def _batch_normalization(b: Builder) -> bool:
    x = b.take("f", rank=3)
    channels = b.values[x].shape[1]
    tables = [b.constant(np.full(channels, value), np.float32) for value in (1.5, 0.5, 0.25, 2.0)]
    if b.random.random() < 0.3:
        return b.add("BatchNormalization", x, *tables, outputs=3, training_mode=1)
    return b.add("BatchNormalization", x, *tables)


def _mean_variance(b: Builder) -> bool:
    x = b.take("f")
    return b.add("MeanVarianceNormalization", x, axes=[b.axis(x)])


def _recurrent(b: Builder) -> bool:
    if any(node.op_type == "Slice" for node in b.nodes):
        return False  # with one row nothing may be left, and ONNX Runtime then aborts the process instead of refusing
    x = b.take("f", rank=3)
    size = b.values[x].shape[-1]
    state = b.table(1, b.values[x].shape[1], 2) if b.random.random() < 0.5 else ""
    return b.add("GRU", x, b.table(1, 6, size), b.table(1, 6, 2), "", "", state, outputs=2, hidden_size=2)


def _one_hot(b: Builder) -> bool:
    values = b.constant([0, 1], np.float32)
    return b.add("OneHot", b.take("i"), b.constant([3], np.int64), values, axis=int(b.random.integers(-1, 2)))


def _cast(b: Builder) -> bool:
    to = b.random.choice([onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL])
    return b.add("Cast", b.take("f", "i", "b"), to=int(to))


def _shape(b: Builder) -> bool:
    return b.add(str(b.random.choice(["Shape", "Size"])), b.take("f", "i"))


def _count(b: Builder) -> bool:
    like = b.take("f")
    b.add("Shape", like, start=0, end=1)
    b.add("Squeeze", b.nodes[-1].output[0])
    return b.add("Range", b.constant(0, np.int64), b.nodes[-1].output[0], b.constant(1, np.int64))


def _quantize(b: Builder) -> bool:
    x = b.take("f")
    if b.random.random() < 0.5:
        return b.add("DynamicQuantizeLinear", x, outputs=3) and b.add("DequantizeLinear", *b.nodes[-1].output)
    return b.add("QuantizeLinear", x, b.constant(0.1, np.float32), b.constant(100, np.uint8))


def _resize(b: Builder) -> bool:
    x = b.take("f", rank=3)
    scales = b.constant(b.random.choice([1.0, 1.0, 2.0], 3), np.float32)
    return b.add("Resize", x, "", scales, mode="nearest")


def _where(b: Builder) -> bool:
    x = b.take("f")
    if not b.add("Greater", x, b.constant(0, np.float32)):
        return False
    return b.add("Where", b.nodes[-1].output[0], x, b.take("f"))


def _reverse(b: Builder) -> bool:
    x = b.take("f", rank=3)
    batch, time = (0, 1) if b.random.random() < 0.5 else (1, 0)
    lengths = b.constant([1 + place % 2 for place in range(b.values[x].shape[batch])], np.int64)
    return b.add("ReverseSequence", x, lengths, batch_axis=batch, time_axis=time)


def _trilu(b: Builder) -> bool:
    return b.add("Trilu", b.take("f"), upper=int(b.random.integers(2)))


def _depth(b: Builder) -> bool:
    return b.add("DepthToSpace", b.take("f", rank=4), blocksize=2)


def _sequence(b: Builder) -> bool:
    x, y = b.take("f"), b.take("f")
    if not b.add("SequenceConstruct", x, y):
        return False
    sequence = b.nodes[-1].output[0]
    if b.random.random() < 0.5:
        return b.add("SequenceAt", sequence, b.constant(1, np.int64))
    return b.add("ConcatFromSequence", sequence, axis=b.axis(x), new_axis=int(b.random.integers(2)))


def _body(op_type: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Sequence[onnx.NodeProto]) -> Any:
    values = [[onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, outputs)]
    for value, dtype in zip(values[0], (onnx.TensorProto.INT64, onnx.TensorProto.BOOL), strict=False):
        value.type.tensor_type.elem_type = dtype
        if op_type == "Loop":
            value.type.tensor_type.shape.SetInParent()
    return helper.make_graph(list(nodes), op_type, *values)


def _loop(b: Builder) -> bool:
    """Carry a tensor through some rounds, in which a captured one joins in, and collect it."""
    x, other = b.take("f"), b.take("f")
    inner = str(b.random.choice(["Add", "Mul", "Max", "MatMul"]))
    number = len(b.nodes)
    i, go, h, g, s = (f"{name}{number}" for name in ("i", "go", "h", "g", "s"))
    body = _body(
        "Loop",
        [i, go, h],
        [f"{go}_out", g, s],
        [
            helper.make_node("Identity", [go], [f"{go}_out"]),
            helper.make_node(inner, [h, other], [g]),
            helper.make_node("Tanh", [g], [s]),
        ],
    )
    if b.random.random() < 0.3:
        b.add("Greater", x, b.constant(0, np.float32))
        b.add("ReduceMax", b.nodes[-1].output[0], keepdims=0)
    return b.add("Loop", b.constant(3, np.int64), "", x, outputs=2, body=body)


def _scan(b: Builder) -> bool:
    x = b.take("f")
    number = len(b.nodes)
    step, out = f"step{number}", f"scanned{number}"
    op_type = str(b.random.choice(["Tanh", "Neg"]))
    body = helper.make_graph(
        [helper.make_node(op_type, [step], [out])],
        "scan",
        [helper.make_tensor_value_info(step, onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None)],
    )
    axis = b.axis(x)
    return b.add("Scan", x, body=body, num_scan_inputs=1, scan_input_axes=[axis])


def _if(b: Builder) -> bool:
    x, y = b.take("f"), b.take("f")
    number = len(b.nodes)
    branches = {
        name: helper.make_graph(
            [helper.make_node("Neg", [source], [f"{name}{number}"])],
            name,
            [],
            [onnx.ValueInfoProto(name=f"{name}{number}")],
        )
        for name, source in (("then_branch", x), ("else_branch", y))
    }
    if b.random.random() < 0.5:
        b.add("ReduceMax", x, keepdims=0)
        b.add("Greater", b.nodes[-1].output[0], b.constant(0.5, np.float32))
        return b.add("If", b.nodes[-1].output[0], **branches)
    b.add("Shape", x)
    b.add("ReduceMax", b.nodes[-1].output[0], keepdims=0)
    b.add("Equal", b.nodes[-1].output[0], b.constant(b.length(), np.int64))
    return b.add("If", b.nodes[-1].output[0], **branches)


STEPS: tuple[Step, ...] = (
    *(_along, _batch_normalization, _binary, _cast, _concat, _concat_self, _convolution, _count, _cumulative),
    *(_cut_table, _depth, _einsum, _expand, _fill, _flatten, _gather, _gather_elements, _gather_nd, _gather_of_rows),
    *(_gemm, _if, _instance, _layer_normalization, _look_up, _loop, _mean_variance, _one_hot, _pad, _pool, _product),
    *(_product_with_own_transpose, _product_with_weights, _quantize, _recurrent, _reduce, _reshape, _reshape_by_shape),
    *(_reshape_to_target, _resize, _reverse, _scan, _scatter, _scatter_constant, _sequence, _shape, _slice, _split),
    *(_squeeze, _tile, _top_k, _transpose, _trilu, _unary, _unsqueeze, _where, _with_constant),
)


def build(seed: int, length: int = 6) -> Builder:
    """Return a random graph of some nodes over two float inputs and one of indices."""
    random = np.random.default_rng(seed)
    b = Builder(random)
    b.inputs = draw(random)
    b.values = dict(b.inputs)
    tries = 0
    while len(b.nodes) < length and tries < 10 * length:
        tries += 1
        step = STEPS[int(random.integers(len(STEPS)))]
        try:
            step(b)
        except (LookupError, ValueError, ZeroDivisionError):
            continue
    return b


def draw(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw rows."""
    return {
        "x": (random.integers(-8, 9, (ROWS, 3, 4)) / 4).astype(np.float32),
        "y": (random.integers(-8, 9, (ROWS, 4)) / 4).astype(np.float32),
        "ids": random.integers(0, 2, (ROWS, 3)),
    }
