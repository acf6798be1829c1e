"""Row coupling, proved on hand-written graphs: each rule that calls something safe beside its unsafe variants.

Every case is run too: what is proved must hold, and what is called a trap must be seen to couple.
"""

import numpy as np
import onnx
import pytest
from onnx import parser
from support.row_probe import contradictions, observe, observed_coupling, states

from bln_serve.export.coupling import analyse
from bln_serve.statistics import RowCoupling

ROWS = 4
HEADER = (
    '<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1, "com.bln" : 1, "local" : 1]>\n'
    "g (float[n,3,4] x, float[n,4] y, float[n] z, int64[n,3] ids) => (float a)\n"
    "<float zero = {{0}}, float one = {{1}}, int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, "
    "int64[1] im1 = {{-1}}, int64[1] imin = {{-9223372036854775807}}, int64[1] i3 = {{3}}, int64[1] i4 = {{4}}, "
    "float[2,2] pair = {{1, 2, 3, 4}}, int64[1] i12 = {{12}}, int64[1] i25 = {{25}}, "
    "int64[4] lengths = {{1, 2, 3, 2}}, "
    "int64 s0 = {{0}}, int64 s1 = {{1}}, int64 s3 = {{3}}, int64[1] end = {{9223372036854775807}}, "
    "bool yes = {{1}}, float[4] c4 = {{1, 2, 3, 4}}, float[3,4] c34 = {{1,2,3,4,5,6,7,8,9,10,11,12}}, "
    "float[4,1] slots = {{1, 2, 3, 4}}, float[1,4] row = {{1, 2, 3, 4}}, "
    "float[8,4] table = {{0,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,0,2,4,6,8,1,3,5,7,9,1,4,2}}, "
    "float[4,2] w = {{1,2,3,4,5,6,7,8}}, float[2,3,1] k = {{1,-1,2,3,1,-2}}, float[3] c3 = {{1, 2, 3}}, "
    "float[3] v3 = {{2, 1, 3}}, float[3] m3 = {{0, 1, 0}}, int64[3] to43 = {{0, 4, 3}}, "
    "int64[2] flat = {{-1, 12}}, int64[3] back = {{-1, 3, 4}}, int64[2] fold = {{-1, 4}}, "
    "int64[2] wrong = {{12, -1}}, int64[2] six = {{-1, 6}}, int64[2] eight = {{-1, 8}}, "
    "int64[2] keep = {{0, -1}}, int64[6] pad1 = {{0,0,1,0,0,1}}, int64[6] pad0 = {{1,0,0,0,0,0}}, "
    "float[2] off_on = {{0, 1}}, float[3] twice = {{1, 1, 2}}, float[3] grow = {{2, 1, 1}}, "
    "float scale = {{0.1}}, uint8 mid = {{128}}, "
    "float[1,8,4] W4 = {{1,2,-1,0,3,-2,1,1,0,2,1,-1,2,1,-3,1,1,0,2,1,-1,1,0,1,2,-1,1,0,1,1,-2,1}}, "
    "float[1,8,2] R4 = {{1,0,-1,1,0,1,1,-1,1,1,0,1,-1,0,1,1}}, float[1,4,2] h_slots = {{1,2,3,4,5,6,7,8}}>\n"
    "{{ {body} }}"
)


def graph(body: str, opset: int = 18) -> onnx.ModelProto:
    """Return a graph over x (n, 3, 4), y (n, 4), z (n) and ids (n, 3), with output a."""
    model = parser.parse_model(HEADER.format(body=body, opset=opset))
    used = {name for node in every_node(model.graph) for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def every_node(of: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(of.node)
    for node in of.node:
        for attribute in node.attribute:
            nodes += every_node(attribute.g) if attribute.type == onnx.AttributeProto.GRAPH else []
    return nodes


def draw(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": (random.integers(-8, 9, (ROWS, 3, 4)) / 4).astype(np.float32),
        "y": (random.integers(-8, 9, (ROWS, 4)) / 4).astype(np.float32),
        "z": (random.integers(-8, 9, ROWS) / 4).astype(np.float32),
        "ids": random.integers(0, 3, (ROWS, 3)),
    }


SHAPED = "n = Shape<start = 0, end = 1>(x) "
INDEPENDENT = {
    # entry by entry
    "unary": "a = Tanh(x)",
    "two of the rows": "b = Relu(x) a = Add(x, b)",
    "a constant beside": "a = Mul(x, c4)",
    "a constant of the same rank": "a = Mul(y, row)",
    "where": "b = Greater(x, zero) a = Where(b, x, zero)",
    "clip": "a = Clip(x, zero, one)",
    "broadcast of a row's scalar": "b = Unsqueeze(z, i1) a = Mul(y, b)",
    "broadcast from a lower rank, aligned": "b = Unsqueeze(y, i1) a = Add(x, b)",
    "cast": "b = Cast<to = 6>(x) a = Cast<to = 1>(b)",
    "cast like": "b = Floor(x) a = CastLike(ids, b)",
    "dropout at inference": "a = Dropout(x)",
    "prelu": "a = PRelu(x, c4)",
    "max of three": "a = Max(x, c4, zero)",
    # along an axis
    "mean of features": "a = ReduceMean<keepdims = 0>(x, i2)",
    "sum of no axes": "a = ReduceSum<noop_with_empty_axes = 1>(x)",
    "max over both": "b = Flatten(x) a = ReduceMax(b, i1)",
    "argmax": "a = ArgMax<axis = 2>(x)",
    "softmax": "a = Softmax(x)",
    "log softmax over time": "a = LogSoftmax<axis = 1>(x)",
    "hardmax": "a = Hardmax(x)",
    "cumulative sum of time": "a = CumSum(x, s1)",
    "top k": "a, b = TopK<axis = 2>(x, i2)",
    "layer normalization": "a = LayerNormalization(x, c4)",
    "layer normalization of all": "a = LayerNormalization<axis = 1>(x, c34)",
    "lp normalization": "a = LpNormalization<axis = 2>(x)",
    "mean and variance of features": "a = MeanVarianceNormalization<axes = [1, 2]>(x)",
    # laid out anew
    "transpose": "a = Transpose<perm = [0, 2, 1]>(x)",
    "transpose there and back": "b = Transpose<perm = [1, 0, 2]>(x) c = Tanh(b) a = Transpose<perm = [1, 0, 2]>(c)",
    "flatten": "a = Flatten(x)",
    "reshape to -1": "a = Reshape(x, flat)",
    "reshape with 0": "a = Reshape(x, to43)",
    "reshape by 0 and -1": "a = Reshape(x, keep)",
    "reshape by its own shape": "s = Shape(x) b = Tanh(x) a = Reshape(b, s)",
    "reshape by a computed target": SHAPED + "t = Concat<axis = 0>(n, i4, i3) a = Reshape(x, t)",
    "reshape by a product": "s = Shape(x) p = Slice(s, i1, i3) q = ReduceProd(p) "
    + SHAPED
    + "t = Concat<axis = 0>(n, q) a = Reshape(x, t)",
    "reshape by gathered entries": (
        "s = Shape(x) p = Gather(s, s0) q = Unsqueeze(p, i0) t = Concat<axis = 0>(q, im1) a = Reshape(x, t)"
    ),
    "reshape by a rounded quotient": SHAPED + "q = Div(i25, i2) t = Concat<axis = 0>(n, q) a = Reshape(x, t)",
    "time folded and unfolded": (
        "b = Reshape(x, fold) c = MatMul(b, w) t = Shape(x) u = Slice(t, i0, i2) v = Concat<axis = 0>(u, i2) a "
        "= Reshape(c, v)"
    ),
    "one mini-batch, and back": (
        "t = Concat<axis = 0>(i1, im1, i4) b = Reshape(y, t) c = Tanh(b) a = Reshape(c, fold)"
    ),
    "squeeze and unsqueeze": "b = Unsqueeze(y, i1) a = Squeeze(b, i1)",
    "expand by a constant": "b = Unsqueeze(y, i1) t = Concat<axis = 0>(i1, i3, i1) a = Expand(b, t)",
    "expand to the row count": SHAPED + "t = Concat<axis = 0>(n, i4) b = Expand(row, t) a = Add(b, y)",
    "zeros for each row": SHAPED + "t = Concat<axis = 0>(n, i4) b = ConstantOfShape(t) a = Add(b, y)",
    "tile of features": "t = Concat<axis = 0>(i1, i3) a = Tile(y, t)",
    "tile of a constant to the row count": SHAPED + "t = Concat<axis = 0>(n, i1) b = Tile(row, t) a = Add(b, y)",
    "shape by numbers of its own": "s = Shape(x) p = Gather(s, s1) q = Cast<to = 1>(p) a = Mul(x, q)",
    # picked, cut and joined
    "gather of features": "a = Gather<axis = 1>(x, i2)",
    "look-up": "a = Gather(table, ids)",
    "look-up from behind": "b = Gather<axis = 1>(table, ids) a = Transpose<perm = [1, 0, 2]>(b)",
    "gather elements": "b = Unsqueeze(ids, i2) a = GatherElements<axis = 2>(x, b)",
    "gather with a batch axis": "b = Unsqueeze(ids, i2) a = GatherND<batch_dims = 1>(y, b)",
    "slice of time": "a = Slice(x, i0, i2, i1)",
    "slice of all rows": "a = Slice(x, i0, end, i0)",
    "slice to the row count": SHAPED + "a = Slice(x, i0, n, i0)",
    "split": "a, b = Split<axis = 2, num_outputs = 2>(x)",
    "concat of features": "b = Unsqueeze(y, i1) a = Concat<axis = 1>(x, b)",
    "pad of features": "a = Pad(x, pad1)",
    "one hot": "a = OneHot(ids, i4, off_on)",
    "triangle of features": "a = Trilu(x)",
    "scatter of features": "b = Unsqueeze(ids, i2) u = Slice(x, i0, i1, i2) a = ScatterElements<axis = 2>(x, b, u)",
    "reversed time by a row's length": (
        "l = Slice(ids, i0, i1, i1) m = Squeeze(l, i1) o = Add(m, s1) a = ReverseSequence<batch_axis = 0, "
        "time_axis = 1>(x, o)"
    ),
    # products
    "matmul with weights": "a = MatMul(x, w)",
    "attention": "b = Transpose<perm = [0, 2, 1]>(x) c = MatMul(x, b) d = Softmax(c) a = MatMul(d, x)",
    "einsum attention": 'b = Einsum<equation = "bij,bkj->bik">(x, x) a = Einsum<equation = "bik,bkj->bij">(b, x)',
    "einsum with an ellipsis": 'a = Einsum<equation = "...ij,jk->...ik">(x, w)',
    "gemm": "a = Gemm(y, w)",
    "gemm with a bias": "a = Gemm<transB = 1>(y, c34, c3)",
    "gemm of transposed rows": "b = Transpose<perm = [1, 0]>(y) a = Gemm<transA = 1>(b, w)",
    "weights on the left": (
        "b = Transpose<perm = [0, 2, 1]>(x) c = Unsqueeze(c4, i0) d = MatMul(c, b) a = Squeeze(d, i1)"
    ),
    # networks
    "convolution": "a = Conv(x, k)",
    "pooling": "a = MaxPool<kernel_shape = [2]>(x)",
    "global pooling": "a = GlobalAveragePool(x)",
    "batch normalization": "a = BatchNormalization(x, c3, c3, m3, v3)",
    "instance normalization": "a = InstanceNormalization(x, c3, c3)",
    "lrn": "b = Unsqueeze(x, i3) c = LRN<size = 3>(b) a = Squeeze(c, i3)",
    "resize of features": 'a = Resize<mode = "nearest">(x, , twice)',
    "recurrence": "b = Transpose<perm = [1, 0, 2]>(x) c, d = LSTM<hidden_size = 2>(b, W4, R4) a = Squeeze(d, i0)",
    "recurrence from zeros": SHAPED
    + "b = Transpose<perm = [1, 0, 2]>(x) t = Concat<axis = 0>(i1, n, i2) h = ConstantOfShape(t) "
    "c, d = LSTM<hidden_size = 2>(b, W4, R4, , , h, h) a = Squeeze(d, i0)",
    # quantisation
    "static quantisation": "b = QuantizeLinear(x, scale, mid) a = DequantizeLinear(b, scale, mid)",
    # bodies
    "loop that carries rows": (
        "a = Loop(s3, , x) <body = l (int64 i, bool g, float[n,3,4] h) => (bool go, float[n,3,4] o) { go = "
        "Identity(g) o = Tanh(h) }>"
    ),
    "loop that captures rows and collects": (
        "b, c = Loop(s3, , y) <body = l (int64 i, bool g, float[n,4] h) => (bool go, float[n,4] o, float[n,4] "
        "s) "
        "{ go = Identity(g) t = Gather<axis = 1>(x, i) o = Add(h, t) s = Tanh(o) }> a = Transpose<perm = [1, 0, 2]>(c)"
    ),
    "scan along time": (
        "a = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], body = l (float[n,4] s) "
        "=> (float[n,4] o) { o = Tanh(s) }>(x)"
    ),
    "scan that carries rows": "b, a = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], "
    "body = l (float[n,4] h, float[n,4] s) => (float[n,4] o, float[n,4] p) { o = Add(h, s) p = Identity(o) "
    "}>(y, x)",
    "if that nothing of the rows decides": (
        "a = If(yes) <then_branch = t () => (float[n,4] u) { u = Tanh(y) }, else_branch = e () => (float[n,4] "
        "v) { v = Neg(y) }>"
    ),
    "sequence": "s = SequenceConstruct(y, y) a = SequenceAt(s, s1)",
    "sequence joined": "b = Tanh(y) s = SequenceConstruct(y, b) a = ConcatFromSequence<axis = 1>(s)",
    # other domains
    "gelu of another domain": "a = com.microsoft.Gelu(x)",
    "fused product": "a = com.microsoft.FusedMatMul<alpha = 2.0>(x, w)",
    "a constant": "a = Tanh(table)",
}
POSITIONAL = {
    "a constant as long as the rows": "a = Add(y, slots)",
    "a table cut to the row count": SHAPED + "b = Slice(table, i0, n, i0) a = Add(y, b)",
    "a counter": SHAPED
    + "m = Squeeze(n, i0) r = Range(s0, m, s1) f = Cast<to = 1>(r) b = Unsqueeze(f, i1) a = Add(y, b)",
    "a look-up by a counter": SHAPED + "m = Squeeze(n, i0) r = Range(s0, m, s1) b = Gather(table, r) a = Add(y, b)",
    "a weight for each slot": "b = Unsqueeze(slots, i1) a = Mul(x, b)",
    "a gemm bias for each slot": "a = Gemm(y, w, slots)",
    "constants beside the rows": "a = Concat<axis = 1>(y, slots)",
    "initial states for each slot": (
        "b = Transpose<perm = [1, 0, 2]>(x) c, d = LSTM<hidden_size = 2>(b, W4, R4, , , h_slots) a = Squeeze(d, i0)"
    ),
    "lengths for each slot": "a = ReverseSequence<batch_axis = 0, time_axis = 1>(x, lengths)",
    "places of a pool": "b, a = MaxPool<kernel_shape = [2]>(x)",
    "an einsum with a constant by slot": 'a = Einsum<equation = "bi,bj->bij">(y, slots)',
    "a constant by slot behind a transpose": (
        "b = Transpose<perm = [1, 0]>(y) c = Add(b, c4) a = Transpose<perm = [1, 0]>(c)"
    ),
}
MINI_BATCH = {
    "mean of the rows": "b = ReduceMean(x, i0) a = Sub(x, b)",
    "mean of everything": "b = ReduceMean(x) a = Sub(x, b)",
    "mean of the rows behind a transpose": (
        "b = Transpose<perm = [1, 0, 2]>(x) c = ReduceMean(b, i1) d = Sub(b, c) a = Transpose<perm = [1, 0, 2]>(d)"
    ),
    "mean of the folded rows": "b = Reshape(x, fold) c = ReduceMean(b, i0) a = Sub(x, c)",
    "mean in one mini-batch": (
        "t = Concat<axis = 0>(i1, im1, i4) b = Reshape(y, t) c = ReduceMean(b, i1) d = Sub(b, c) a = Reshape(d, fold)"
    ),
    "argmax of the rows": "b = ArgMax<axis = 0, keepdims = 0>(y) c = Cast<to = 1>(b) a = Add(y, c)",
    "softmax over the rows": "a = Softmax<axis = 0>(x)",
    "cumulative sum of the rows": "a = CumSum(x, s0)",
    "top k of the rows": "b, c = TopK<axis = 0>(y, i2) d = Slice(b, i0, i1) a = Add(y, d)",
    "layer normalization over the rows": (
        "b = Transpose<perm = [2, 1, 0]>(x) c = LayerNormalization(b, one) a = Transpose<perm = [2, 1, 0]>(c)"
    ),
    "lp normalization over the rows": "a = LpNormalization<axis = 0>(x)",
    "mean and variance with the rows": "b = Unsqueeze(x, i3) a = MeanVarianceNormalization(b)",
    "batch normalization in training": "a, b, c = BatchNormalization<training_mode = 1>(x, c3, c3, m3, v3)",
    "dynamic quantisation": "b, c, d = DynamicQuantizeLinear(z) a = DequantizeLinear(b, c, d)",
    "a reshape by the shape of a table that ends": (
        SHAPED + "b = Slice(pair, i0, n, i0) s = Shape<start = 0, end = 1>(b) t = Concat<axis = 0>(s, im1) "
        "a = Reshape(x, t)"
    ),
    "features cut to the row count": SHAPED + "b = Slice(y, i0, n, i1) c = ReduceSum(b, i1) a = Add(y, c)",
    "loop that goes on until the rows say otherwise": (
        "a = Loop(s3, yes, z) <body = l (int64 i, bool g, float[n] h) => (bool go, float[n] o) "
        "{ o = Sub(h, one) m = ReduceMax<keepdims = 0>(o) go = Greater(m, zero) }>"
    ),
    "the row count as a value": SHAPED + "m = Cast<to = 1>(n) a = Mul(y, m)",
    "the size as a value": "n = Size(x) m = Cast<to = 1>(n) a = Mul(y, m)",
    "the row count picks": SHAPED + "m = Sub(n, i1) b = Gather(table, m) a = Add(y, b)",
    "the row count as the output": SHAPED + "a = Cast<to = 1>(n)",
    "a table cut from its end": SHAPED + "m = Neg(n) b = Slice(table, m, end, i0) a = Add(y, b)",
    "a reshape over the rows": (
        "b = Reshape(x, wrong) c = Tanh(b) d = ReduceSum(c, i1) e = Unsqueeze(z, i1) f = Squeeze(d) g = "
        "ReduceMean(f) a = Add(e, g)"
    ),
    "a reshape that tears rows": "b = Reshape(x, eight) c = ReduceMean(b, i1) d = Sub(b, c) a = Reshape(d, back)",
    "a reshape across a transpose": (
        "b = Transpose<perm = [1, 0, 2]>(x) c = Reshape(b, flat) d = ReduceMean(c, i1) a = Add(y, d)"
    ),
    "rows rolled": "b = Slice(y, im1, end, i0) c = Slice(y, i0, im1, i0) a = Concat<axis = 0>(b, c)",
    "rows reversed": "a = Slice(y, im1, imin, i0, im1)",
    "the first row for all": "b = Gather(y, i0) a = Add(y, b)",
    "the first row, cut": "b = Slice(y, i0, i1, i0) a = Add(y, b)",
    "rows split and joined the other way": "b, c = Split<axis = 0, num_outputs = 2>(y) a = Concat<axis = 0>(c, b)",
    "rows padded": "b = Pad(x, pad0) c = Slice(b, i0, im1, i0) a = Add(x, c)",
    "rows repeated": "t = Concat<axis = 0>(i2, i1) b = Tile(y, t) c = Reshape(b, eight) a = Add(c, c)",
    "rows multiplied with rows": "b = Transpose<perm = [1, 0]>(y) c = MatMul(y, b) d = Softmax(c) a = MatMul(d, y)",
    "rows summed by a product": "b = Transpose<perm = [1, 0]>(y) c = MatMul(b, y) a = MatMul(y, c)",
    "rows summed by a gemm": "b = Gemm<transA = 1>(y, y) a = MatMul(y, b)",
    "rows summed by an einsum": 'b = Einsum<equation = "bi,bj->ij">(y, y) a = MatMul(y, b)',
    "rows against rows in an einsum": 'b = Einsum<equation = "bi,ci->bc">(y, y) a = ReduceSum(b, i1)',
    "an implicit einsum sums the rows": 'b = Einsum<equation = "bi,bj">(y, y) a = MatMul(y, b)',
    "rows as channels": (
        "b = Transpose<perm = [1, 0, 2]>(x) c = Unsqueeze(b, i3) d = LRN<size = 3, alpha = 9.0>(c) e = "
        "Squeeze(d, i3) a = Transpose<perm = [1, 0, 2]>(e)"
    ),
    "rows along the convolution": (
        "b = Transpose<perm = [2, 1, 0]>(x) c = MaxPool<kernel_shape = [2], pads = [0, 1]>(b) a = "
        "Transpose<perm = [2, 1, 0]>(c)"
    ),
    "recurrence along the rows": "b, c = LSTM<hidden_size = 2>(x, W4, R4) a = Squeeze(b, i1)",
    "resize of the rows": 'b = Resize<mode = "nearest">(x, , grow) c = ReduceMean(b, i0) a = Add(x, c)',
    "loop until all rows are done": "b = ReduceMax<keepdims = 0>(z) c = Greater(b, zero) a = Loop(s3, c, z) "
    "<body = l (int64 i, bool g, float[n] h) => (bool go, float[n] o) { o = Sub(h, one) m = "
    "ReduceMax<keepdims = 0>(o) go = Greater(m, zero) }>",
    "loop as often as there are rows": SHAPED + "m = Squeeze(n, i0) a = Loop(m, , y) "
    "<body = l (int64 i, bool g, float[n,4] h) => (bool go, float[n,4] o) { go = Identity(g) o = Add(h, one) }>",
    "loop whose body captures a mean": "m = ReduceMean(y, i0) a = Loop(s3, , y) "
    "<body = l (int64 i, bool g, float[n,4] h) => (bool go, float[n,4] o) { go = Identity(g) o = Sub(h, m) }>",
    "loop whose body takes the mean": "a = Loop(s3, , y) "
    "<body = l (int64 i, bool g, float[n,4] h) => (bool go, float[n,4] o) { go = Identity(g) m = "
    "ReduceMean(h, i0) o = Sub(h, m) }>",
    "loop that couples in its second round": "b, a = Loop(s3, , row, y) "
    "<body = l (int64 i, bool g, float[1,4] h, float[n,4] r) => (bool go, float[1,4] p, float[n,4] o) "
    "{ go = Identity(g) o = Add(r, h) p = ReduceMean(r, i0) }>",
    "loop over the rows": (
        "b, c = Loop(s3, , row) <body = l (int64 i, bool g, float[1,4] h) => (bool go, float[1,4] o, float[4] "
        "s) "
        "{ go = Identity(g) r = Gather(y, i) o = Add(h, r) s = Identity(r) }> a = Add(y, b)"
    ),
    "scan along the rows": (
        "b, a = Scan<num_scan_inputs = 1, body = l (float[4] h, float[4] s) => (float[4] o, float[4] p) { o = "
        "Add(h, s) p = Identity(o) }>(c4, y)"
    ),
    "if that the rows decide": "m = ReduceMax<keepdims = 0>(z) d = Greater(m, one) "
    "a = If(d) <then_branch = t () => (float[n,4] u) { u = Tanh(y) }, else_branch = e () => (float[n,4] v) "
    "{ v = Neg(y) }>",
    "if that the row count decides": SHAPED + "m = Squeeze(n, i0) d = Greater(m, s3) "
    "a = If(d) <then_branch = t () => (float[n,4] u) { u = Tanh(y) }, else_branch = e () => (float[n,4] v) "
    "{ v = Neg(y) }>",
    "if with a branch that couples": (
        "d = Not(yes) a = If(d) <then_branch = t () => (float[n,4] u) { u = Tanh(y) }, "
        "else_branch = e () => (float[n,4] v) { m = ReduceMean(y, i0) v = Sub(y, m) }>"
    ),
    "a sequence of the rows": "s = SplitToSequence<axis = 0>(y) b = SequenceAt(s, s0) a = Add(y, b)",
    "rows behind rows": (
        "b = Tanh(y) s = SequenceConstruct(y, b) c = ConcatFromSequence<axis = 0>(s) d = ReduceMax(c, i0) a = Add(y, d)"
    ),
    "rows on axis 1 of the output": "a = Transpose<perm = [1, 0]>(y)",
    "several entries a row in the output": "a = Reshape(x, fold)",
    "places that are not zero": (
        "b = NonZero(y) c = Cast<to = 1>(b) d = ReduceSum(c, i1) e = ReduceSum<keepdims = 0>(d) a = Add(y, e)"
    ),
    "scatter into the first row": (
        "b = Unsqueeze(c4, i0) c = Unsqueeze(i0, i0) d = ScatterND(y, c, b) e = Slice(y, i0, i1, i0) f = Sub(d, "
        "e) a = Add(f, y)"
    ),
    "rows broadcast against rows": "b = Unsqueeze(z, i0) c = Add(y, b) a = Identity(c)",
    "random": "b = RandomUniformLike(y) a = Add(y, b)",
}
UNPROVED = {
    "the row axis squeezed away": "b = Squeeze(x, i0) a = Tanh(b)",
    "rows expanded to a fixed number": "t = Concat<axis = 0>(i4, i4) a = Expand(y, t)",
    "features cut as far as the rows say": (
        "m = ReduceMax<keepdims = 0>(ids) p = Unsqueeze(m, i0) b = Slice(x, i0, p, i1) a = ReduceSum(b, i1)"
    ),
    "a squeeze without axes": "b = Unsqueeze(y, i1) a = Squeeze(b)",
    "a scatter by place": "b = Unsqueeze(c4, i0) c = Unsqueeze(i0, i0) a = ScatterND(y, c, b)",
    "rows in order, picked": SHAPED + "m = Squeeze(n, i0) r = Range(s0, m, s1) a = Gather(y, r)",
    "rows split and joined again": "b, c = Split<axis = 0, num_outputs = 2>(y) a = Concat<axis = 0>(b, c)",
    "an unknown operator": "a = com.microsoft.BiasSplitGelu(x, c4)",
}


def case_of(bodies: dict[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("body", bodies.values(), ids=bodies)


def runs(model: onnx.ModelProto) -> tuple[int, list]:
    return observe(model, draw(1), draw(2))


def require_true(model: onnx.ModelProto) -> None:
    rows, found = runs(model)
    made = {name for node in model.graph.node for name in node.output}
    claims = {name: claim for name, claim in states(model).items() if name in made}
    assert not list(contradictions(claims, rows, found))


@case_of(INDEPENDENT)
def test_independent_is_proved_and_true(body: str) -> None:
    model = graph(body)
    assert analyse(model).row_coupling is RowCoupling.INDEPENDENT, analyse(model)
    assert observed_coupling("a", *runs(model)) is RowCoupling.INDEPENDENT
    require_true(model)


@case_of(POSITIONAL)
def test_positional_is_proved_and_true(body: str) -> None:
    model = graph(body)
    assert analyse(model).row_coupling is RowCoupling.POSITIONAL, analyse(model)
    rows, found = runs(model)
    assert observed_coupling("a", rows, [each for each in found if each.rows == rows]) is RowCoupling.POSITIONAL
    require_true(model)


@case_of(MINI_BATCH)
def test_a_trap_is_seen_for_what_it_is(body: str) -> None:
    model = graph(body)
    assert analyse(model).row_coupling is RowCoupling.MINI_BATCH
    if "RandomUniformLike" not in body:
        assert observed_coupling("a", *runs(model)) is RowCoupling.MINI_BATCH
        require_true(model)


@case_of(UNPROVED)
def test_what_is_not_proved_counts_as_coupled(body: str) -> None:
    assert analyse(graph(body)).row_coupling is RowCoupling.MINI_BATCH
