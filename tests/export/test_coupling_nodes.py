"""Row coupling of what hand-written bodies cannot say: other opsets and domains, functions, hostile graphs."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser
from support.coupling_nodes import INDEPENDENT, MINI_BATCH, TURNED, coupling_of, f32, int64, model_of, node

from bln_serve.export.coupling import GraphCoupling, analyse
from bln_serve.statistics import RowCoupling


def test_what_nothing_makes_is_never_independent() -> None:
    assert coupling_of(node("Add", "x nowhere")) is MINI_BATCH


def test_an_initializer_that_may_be_overridden_is_taken_at_its_default() -> None:
    """One mini-batch by default; the mean over axis 1 is one over all rows then."""
    nodes = [
        node("Concat", "mini_batches rest", "t", axis=0),
        node("Reshape", "x t", "b"),
        node("ReduceMean", "b i1", "m", keepdims=1),
        node("Sub", "b m", "c"),
        node("Reshape", "c fold"),
    ]
    tables = {"mini_batches": int64(1), "rest": int64(-1, 4), "i1": int64(1), "fold": int64(-1, 4)}
    model = model_of(nodes, shape=("n", 4), tables=tables)
    model.graph.input.append(helper.make_tensor_value_info("mini_batches", TensorProto.INT64, [1]))
    found = analyse(model)
    assert (found.row_coupling, found.outputs_without_rows) == (MINI_BATCH, ())
    assert found.reason == "ReduceMean 'reducemean_m' reduces the row axis"
    del model.graph.node[2:4]
    model.graph.node[2].input[0] = "b"
    assert analyse(model).row_coupling is INDEPENDENT


@pytest.mark.parametrize(
    ("nodes", "opset", "coupling"),
    [
        ([node("Softmax", "x", axis=2)], 11, INDEPENDENT),
        ([node("Softmax", "x", axis=0)], 11, MINI_BATCH),
        ([TURNED, node("Softmax", "t", "s"), node("Transpose", "s", perm=[1, 0, 2])],
         13, INDEPENDENT),
        ([TURNED, node("Softmax", "t", "s"), node("Transpose", "s", perm=[1, 0, 2])],
         11, MINI_BATCH),
        ([node("ReduceSum", "x", axes=[1])], 11, INDEPENDENT),
        ([node("ReduceSum", "x", axes=[0])], 11, MINI_BATCH),
        ([node("Slice", "x", starts=[0], ends=[2], axes=[1])], 9, INDEPENDENT),
        ([node("Slice", "x", starts=[0], ends=[2], axes=[0])], 9, MINI_BATCH),
        ([node("Pad", "x", pads=[0, 1, 0, 0, 0, 0])], 10, INDEPENDENT),
        ([node("Pad", "x", pads=[1, 0, 0, 0, 0, 0])], 10, MINI_BATCH),
        ([node("Unsqueeze", "x", axes=[1])], 11, INDEPENDENT),
        ([node("Unsqueeze", "x", axes=[0])], 11, MINI_BATCH),
        ([node("Add", "x x")], 6, MINI_BATCH),
        ([node("Relu", "x")], 999, MINI_BATCH),
        ([node("RMSNormalization", "x c4", axis=-1)], 23, INDEPENDENT),
        ([node("RMSNormalization", "x c4", axis=0)], 23, MINI_BATCH),
        ([node("GroupNormalization", "x c3 c3", num_groups=3)], 21, INDEPENDENT),
        ([node("Transpose", "x", "t", perm=[1, 0, 2]), node("InstanceNormalization", "t c3 c3", "i"),
          node("Transpose", "i", perm=[1, 0, 2])], 18, MINI_BATCH),
        ([node("Attention", "x x x", q_num_heads=2, kv_num_heads=2)], 23, INDEPENDENT),
        ([node("Attention", "x x c134", q_num_heads=2, kv_num_heads=2)], 23, MINI_BATCH),
        ([node("Attention", "x x x c33", q_num_heads=2, kv_num_heads=2)], 23, INDEPENDENT),
        ([node("Attention", "x x x c4133", q_num_heads=2, kv_num_heads=2)], 23, MINI_BATCH),
        ([node("Dropout", "x _ yes")], 18, MINI_BATCH),
        ([node("Dropout", "x _ no")], 18, INDEPENDENT),
        ([node("Trilu", "x")], 18, INDEPENDENT),
        ([node("Transpose", "x", "t", perm=[1, 0, 2]), node("Trilu", "t", "u"), node("Transpose", "u", perm=[1, 0, 2])],
         18, MINI_BATCH),
        ([node("Cast", "x", "i", to=TensorProto.INT64), node("GatherElements", "c34 i", axis=0)], 18, INDEPENDENT),
        ([node("Cast", "x", "i", to=TensorProto.INT64), node("GatherElements", "x i", axis=0)], 18, MINI_BATCH),
        ([node("Cast", "x", "i", to=TensorProto.INT64), node("ScatterElements", "x i x", axis=1)], 18, INDEPENDENT),
        ([node("Cast", "x", "i", to=TensorProto.INT64), node("ScatterElements", "x i x", axis=0)], 18, MINI_BATCH),
        ([node("Transpose", "x", "t", perm=[1, 2, 0]), node("Conv", "c234 t")], 18, MINI_BATCH),
        ([TURNED, node("GRU", "t W3 R3", "h", hidden_size=2), node("Squeeze", "h i1", "q"),
          node("Transpose", "q", perm=[1, 0, 2])], 18, INDEPENDENT),
        ([node("GRU", "x W3 R3", "a _ ", hidden_size=2, layout=1)], 18, INDEPENDENT),
        ([node("RNN", "x W1 R1", hidden_size=2)], 18, MINI_BATCH),
        ([node("Resize", "x _ _ same", mode="nearest")], 18, MINI_BATCH),
        ([node("Upsample", "x grow")], 9, INDEPENDENT),
        ([node("QuantizeLinear", "x scale3", axis=1)], 18, INDEPENDENT),
        ([node("QuantizeLinear", "x scale3", axis=0)], 18, MINI_BATCH),
        ([node("QuantizeLinear", "x one", "q"), node("MatMulInteger", "q q8")], 18, INDEPENDENT),
        ([node("QuantizeLinear", "x one", "q"), node("Transpose", "q", "t"), node("MatMulInteger", "q8t t")],
         18, MINI_BATCH),
        ([node("QuantizeLinear", "x one", "q"), node("ConvInteger", "q k8")], 18, INDEPENDENT),
        ([node("QuantizeLinear", "x one", "q"), node("QLinearMatMul", "q one z8 q8 one z8 one z8")], 18, INDEPENDENT),
        ([node("QuantizeLinear", "x one", "q"), node("QLinearMatMul", "q scale3 z3 q8 one z8 one z8")], 18, MINI_BATCH),
        ([node("QuantizeLinear", "x one", "q"), node("QLinearConv", "q one z8 k8 one z8 one z8")], 18, INDEPENDENT),
    ],
)  # fmt: skip
def test_operators_of_other_versions(nodes: Any, opset: int, coupling: RowCoupling) -> None:
    tables = {
        "c4": f32(4), "c3": f32(3), "c34": f32(3, 4), "c33": f32(3, 3), "c134": f32(1, 3, 4), "c4133": f32(4, 1, 3, 3),
        "c234": f32(2, 3, 4), "W3": f32(1, 6, 4), "R3": f32(1, 6, 2), "W1": f32(1, 2, 4), "R1": f32(1, 2, 2),
        "i1": int64(1), "same": int64(4, 3, 8), "grow": np.array([1, 1, 2], np.float32), "scale3": f32(3),
        "one": np.float32(1), "q8": np.ones((4, 2), np.uint8), "q8t": np.ones((2, 4), np.uint8),
        "k8": np.ones((2, 3, 1), np.uint8), "z8": np.uint8(1), "z3": np.ones(3, np.uint8),
        "yes": np.array(True), "no": np.array(False),
    }  # fmt: skip
    used = {name for each in nodes for name in each.input}
    held = {name: np.asarray(values) for name, values in tables.items() if name in used}
    assert coupling_of(*nodes, opset=opset, tables=held) is coupling


@pytest.mark.parametrize(
    ("op_type", "inputs", "coupling", "attributes"),
    [
        ("SkipLayerNormalization", "x x c4 c4", INDEPENDENT, {}),
        ("BiasGelu", "x c4", INDEPENDENT, {}),
        ("FusedGemm", "x2 w", INDEPENDENT, {}),
        ("DynamicQuantizeMatMul", "x q8 one", MINI_BATCH, {}),
        ("MultiHeadAttention", "x x x", INDEPENDENT, {"num_heads": 2}),
        ("MultiHeadAttention", "x c134 x", MINI_BATCH, {"num_heads": 2}),
        ("Attention", "x w12 b12", INDEPENDENT, {"num_heads": 2}),
        ("Attention", "x w12 b12 mask", MINI_BATCH, {"num_heads": 2}),
        ("FusedMatMul", "x x", MINI_BATCH, {"transB": 0, "transBatchA": 1}),
        ("FusedMatMul", "x x", INDEPENDENT, {"transB": 1}),
        ("MatMulNBits", "x b4 s4", INDEPENDENT, {"K": 4, "N": 2, "bits": 4, "block_size": 16}),
        ("Nobody", "x", MINI_BATCH, {}),
    ],
)
def test_operators_of_another_domain(op_type: str, inputs: str, coupling: RowCoupling, attributes: Any) -> None:
    tables = {"c4": f32(4), "w": f32(12, 2), "q8": np.ones((4, 2), np.uint8), "one": np.asarray(np.float32(1)),
              "c134": f32(1, 3, 4), "w12": f32(4, 12), "b12": f32(12), "mask": np.ones((4, 3), np.int32),
              "b4": np.ones((2, 1, 8), np.uint8), "s4": f32(2)}  # fmt: skip
    nodes = [node("Flatten", "x", "x2"), node(op_type, inputs, domain="com.microsoft", **attributes)]
    assert coupling_of(*nodes, tables=tables) is coupling


def test_a_domain_that_is_not_known_is_never_independent() -> None:
    found = analyse(model_of([node("Relu", "x", domain="ai.example")]))
    assert found.row_coupling is MINI_BATCH
    assert found.reason == "Relu 'relu_a' is of an operator that is not known here (ai.example::Relu)"


FUNCTIONS = """
<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
g (float[n,4] x) => (float[n,4] a) {{ a = local.outer(x) }}
<domain: "local", opset_import: ["" : 18, "local" : 1]> outer (x) => (y) {{ b = local.inner(x) y = Tanh(b) }}
<domain: "local", opset_import: ["" : 18, "local" : 1]> inner (x) => (y) {{ {body} }}
"""


@pytest.mark.parametrize(
    ("body", "coupling"),
    [
        ("y = Relu(x)", INDEPENDENT),
        ("i = Constant<value_ints = [0]>() m = ReduceMean(x, i) y = Sub(x, m)", MINI_BATCH),
        ("y = local.outer(x)", MINI_BATCH),
    ],
    ids=["alone", "couples", "calls itself"],
)
def test_functions_are_followed(body: str, coupling: RowCoupling) -> None:
    assert analyse(parser.parse_model(FUNCTIONS.format(body=body))).row_coupling is coupling


def test_functions_that_would_never_come_to_an_end_are_left_alone() -> None:
    """Thirty functions, each calling the next twice, are a thousand million nodes."""
    model = parser.parse_model(FUNCTIONS.format(body="y = Relu(x)"))
    del model.functions[:]
    for number in range(30):
        body = [
            node(f"f{number + 1}" if number < 29 else "Relu", source, made) for source, made in (("x", "b"), ("b", "y"))
        ]
        for each in body:
            each.domain = "local" if number < 29 else ""
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", f"f{number}", ["x"], ["y"], body, imports))
    model.graph.node[0].op_type = "f0"
    assert analyse(model).row_coupling is MINI_BATCH


def nested_loops(depth: int) -> onnx.NodeProto:
    inner = [node("Tanh", "h0", "o0")]
    for level in range(depth):
        g, h, o = f"g{level}", f"h{level}", f"o{level}"
        values = [helper.make_tensor_value_info(*each) for each in ((f"i{level}", 7, []), (g, 9, []), (h, 1, None))]
        outputs = [helper.make_tensor_value_info(*each) for each in ((f"{g}o", 9, []), (o, 1, None))]
        body = helper.make_graph([node("Identity", g, f"{g}o"), *inner], f"l{level}", values, outputs)
        last = level == depth - 1
        inner = [node("Loop", f"n _ {'x' if last else f'h{level + 1}'}", "a" if last else f"o{level + 1}", body=body)]
    return inner[0]


@pytest.mark.parametrize(("depth", "coupling"), [(3, INDEPENDENT), (30, MINI_BATCH)])
def test_bodies_inside_bodies_come_to_an_end(depth: int, coupling: RowCoupling) -> None:
    assert coupling_of(nested_loops(depth), tables={"n": np.array(3)}) is coupling


@pytest.mark.parametrize(
    "broken",
    [
        node("Concat", "x x"),
        node("Transpose", "x", perm=[0, 0, 1]),
        node("Conv", "x"),
        node("Softmax", "x", axis=9),
        node("Reshape", "x"),
        node("Loop", "x"),
        node("If", "x"),
        node("Einsum", "x x", equation="ij"),
        node("Einsum", "x", equation="bii->bi"),
        node("Split", "x", "a b", axis=7),
        node("BatchNormalization", "", "a"),
        node("Identity", "", "a"),
    ],
    ids=lambda each: each.op_type,
)
def test_a_malformed_node_is_never_independent(broken: onnx.NodeProto) -> None:
    assert coupling_of(broken) is MINI_BATCH


@pytest.mark.parametrize(
    ("shape", "more", "coupling"),
    [
        ((4, 3, 4), {}, INDEPENDENT),
        ((), {}, MINI_BATCH),
        (("n", "n", 4), {}, MINI_BATCH),
        (("n", "t", 4), {"y": ("k", 1, 4)}, INDEPENDENT),
        ((4, 3, 4), {"y": (4, 3, 4)}, INDEPENDENT),
        ((4, 3, 4), {"y": (1, 3, 4)}, MINI_BATCH),
        (("n", 3, 4), {"y": (1, 3, 4)}, MINI_BATCH),
    ],
)
def test_all_inputs_have_their_rows_on_axis_0(shape: Any, more: Any, coupling: RowCoupling) -> None:
    nodes = [node("Add", f"x {'y' if more else 'x'}")]
    assert coupling_of(*nodes, shape=shape, more_inputs=more) is coupling


@pytest.mark.parametrize(
    ("target", "coupling"),
    [
        ((4, 12), INDEPENDENT),
        ((4, -1), INDEPENDENT),
        ((-1, 12), INDEPENDENT),
        ((12, 4), MINI_BATCH),
        ((2, 24), MINI_BATCH),
    ],
)
def test_a_model_for_one_number_of_rows_may_write_it_out(target: Any, coupling: RowCoupling) -> None:
    found = analyse(model_of([node("Reshape", "x t")], shape=(4, 3, 4), tables={"t": int64(*target)}))
    assert found.row_coupling is coupling
    assert analyse(model_of([node("Reshape", "x t")], tables={"t": int64(4, 12)})).row_coupling is MINI_BATCH


def test_a_length_that_comes_with_the_request_is_followed() -> None:
    """Attention over any number of steps, split into heads by a target that is read off the input."""
    model = parser.parse_model("""
    <ir_version: 9, opset_import: ["" : 18]> g (float[n,t,8] x) => (float[n,t,8] a)
    <int64[2] heads = {2, 4}, int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] all = {8}> {
        s = Shape(x) p = Slice(s, i0, i2) q = Concat<axis = 0>(p, heads) b = Reshape(x, q)
        c = Transpose<perm = [0, 2, 1, 3]>(b) d = Transpose<perm = [0, 2, 3, 1]>(b)
        e = MatMul(c, d) f = Softmax(e) h = MatMul(f, c) k = Transpose<perm = [0, 2, 1, 3]>(h)
        r = Concat<axis = 0>(p, all) a = Reshape(k, r) }""")
    assert analyse(model).row_coupling is INDEPENDENT


def test_outputs_without_rows_are_named() -> None:
    model = model_of([node("Relu", "x", "a"), node("Tanh", "table", "constant"), node("Transpose", "x", "turned")],
                     tables={"table": f32(8, 4)})  # fmt: skip
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("constant", "turned"))
    found = analyse(model)
    assert found.outputs_without_rows == ("constant", "turned")
    assert found.reason == "output 'turned' has its rows on axis 2"
    del model.graph.output[2:]
    assert analyse(model).row_coupling is INDEPENDENT


def test_a_graph_without_outputs_is_never_independent() -> None:
    model = model_of([node("Relu", "x")])
    del model.graph.output[:]
    assert analyse(model) == GraphCoupling(MINI_BATCH, "the graph has no outputs", (), {}, ())
