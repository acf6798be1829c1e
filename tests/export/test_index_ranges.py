"""Valid indices, read off the graph: every form that a look-up's indices take on their way from an input."""

import numpy as np
import onnx
import pytest
from onnx import parser

from bln_serve.export.custom_ops import DOMAIN, EMBEDDING
from bln_serve.export.index_ranges import index_ranges

HEADER = (
    '<ir_version: 9, opset_import: ["" : {opset}, "com.bln" : 1]>\n'
    "g ({dtype}[n,3] x, int64[n] y, float[n,3] f) => (float a)\n"
    "<float[10,2] t10 = {{0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9}}, float[5,2] t5 = {{0,1,2,3,4,5,6,7,8,9}},\n"
    "int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] i3 = {{3}}, int64[1] end = "
    "{{9223372036854775807}},\n"
    "int64 one = {{1}}, int64 two = {{2}}, int64 four = {{4}}, int64 nine = {{9}}, int64 ten = {{10}}, "
    "int64 zero = {{0}},\n"
    "int64 fifty = {{50}}, float fzero = {{0}}, int64[3] offsets = {{0, 2, 5}}, int64[2] flat = {{-1, 1}}, "
    "int64[1] pick = {{0}}>\n"
    "{{ {body} }}"
)


def ranges(body: str, dtype: str = "int64", opset: int = 18) -> dict[str, tuple[int, int]]:
    model = parser.parse_model(HEADER.format(body=body, dtype=dtype, opset=opset))
    return index_ranges(model)


NEGATIVE = "l = Less(c, fzero) "
FOUND = {
    "direct": ("a = Gather(t10, x)", (0, 9)),
    "from behind the table": ("a = Gather<axis = 1>(t10, x)", (0, 1)),
    "cast": ("b = Cast<to = 6>(x) a = Gather(t10, b)", (0, 9)),
    "reshaped": ("b = Reshape(x, flat) a = Gather(t10, b)", (0, 9)),
    "transposed, unsqueezed, squeezed": (
        "b = Transpose(x) c = Unsqueeze(b, i0) d = Squeeze(c, i0) e = Identity(d) a = Gather(t10, e)",
        (0, 9),
    ),
    "flattened and tiled": (
        "b = Flatten(x) t = Concat<axis = 0>(i1, i2) c = Tile(b, t) a = Gather(t10, c)", (0, 9)),
    "joined": ("b = Add(x, one) c = Concat<axis = 1>(x, b) a = Gather(t10, c)", (0, 8)),
    "moved up": ("b = Add(x, two) a = Gather(t10, b)", (-2, 7)),
    "moved up from the left": ("b = Add(two, x) a = Gather(t10, b)", (-2, 7)),
    "moved down": ("b = Sub(x, one) a = Gather(t10, b)", (1, 10)),
    "mirrored": ("b = Sub(nine, x) a = Gather(t5, b)", (5, 9)),
    "negated and moved": ("b = Neg(x) c = Add(b, four) a = Gather(t5, c)", (0, 4)),
    "moved by an offset for each column": ("b = Add(x, offsets) a = Gather(t10, b)", (-5, 9)),
    "two tables": ("b = Gather(t10, x) c = Gather(t5, x) a = Add(b, c)", (0, 4)),
    "two tables, one moved": ("m = Add(x, one) b = Gather(t10, x) c = Gather(t5, m) a = Add(b, c)", (0, 3)),
    "wrapped by a where": (
        "c = Cast<to = 1>(x) " + NEGATIVE + "m = Add(x, ten) b = Where(l, m, x) a = Gather(t10, b)",
        (0, 9),
    ),
    "wrapped by products": (
        "c = Cast<to = 1>(x) " + NEGATIVE + "m = Add(x, ten) k = Not(l) p = Cast<to = 7>(k) q = Cast<to = 7>(l) "
        "u = Mul(x, p) v = Mul(q, m) b = Add(v, u) a = Gather(t10, b)",
        (0, 9),
    ),
    "held from above only": ("b = Min(x, nine) a = Gather(t10, b)", (0, 2**63 - 1)),
    "held from below only": ("b = Max(x, zero) a = Gather(t10, b)", (-(2**63), 9)),
    "held from above, too high": ("b = Min(x, fifty) a = Gather(t10, b)", (0, 9)),
    "relu": ("b = Relu(x) a = Gather(t10, b)", (-(2**63), 9)),
    "clipped too wide": ("b = Clip(x, zero, fifty) a = Gather(t10, b)", (-(2**63), 9)),
    "every column its own table, the widest": (
        "p = Slice(x, i0, i1, i1) q = Slice(x, i1, end, i1) b = Gather(t10, p) c = Gather(t5, q) a = "
        "Concat<axis = 1>(b, c)",
        (0, 9),
    ),
    "split": (
        "p, q, r = Split<axis = 1, num_outputs = 3>(x) b = Gather(t5, p) c = Gather(t5, q) d = Gather(t5, r) a "
        "= Sum(b, c, d)", (0, 4)),
    "a part and the whole": (
        "p = Slice(x, i0, i1, i1) b = Gather(t5, p) c = Gather(t10, x) a = Concat<axis = 1>(b, c)", (0, 9)),
    "all rows and all columns, sliced": (
        "b = Slice(x, i0, end, i0) c = Slice(b, i0, i3, i1) a = Gather(t10, c)", (0, 9)),
    "moved, and then cut": (
        "m = Sub(x, one) p = Slice(m, i0, i1, i1) q = Slice(m, i1, end, i1) b = Gather(t5, p) c = "
        "Gather(t5, q) a = Concat<axis = 1>(b, c)",
        (1, 5),
    ),
    "picked columns of another tensor": ("a = Gather<axis = 1>(f, x)", (0, 2)),
}  # fmt: skip
NOT_FOUND = {
    "no look-up": "a = Cast<to = 1>(x)",
    "clipped": "b = Clip(x, zero, nine) a = Gather(t10, b)",
    "held from both ends": "b = Min(x, nine) c = Max(b, zero) a = Gather(t10, c)",
    "multiplied": "b = Mul(x, two) a = Gather(t10, b)",
    "modulo": "b = Mod(x, ten) a = Gather(t10, b)",
    "searched": "b = ArgMax<axis = 1>(f) a = Gather(t10, b)",
    "a flag": "b = Cast<to = 9>(x) c = Cast<to = 7>(b) a = Gather(t10, c)",
    "negative ones replaced": "c = Cast<to = 1>(x) l = Less(c, fzero) b = Where(l, zero, x) a = Gather(t10, b)",
    "one column only": "b = Slice(x, i0, i1, i1) a = Gather(t10, b)",
    "picked entries": "b = Gather<axis = 1>(x, pick) a = Gather(t10, b)",
    "an index of rows": "b = Slice(y, i0, i1) a = Gather(f, b)",
    "a shape's entry": "s = Shape(x) b = Gather(s, i0) a = Cast<to = 1>(b)",
}


@pytest.mark.parametrize(("body", "expected"), FOUND.values(), ids=FOUND)
def test_a_range_is_found(body: str, expected: tuple[int, int]) -> None:
    assert ranges(body) == {"x": expected}


@pytest.mark.parametrize("body", NOT_FOUND.values(), ids=NOT_FOUND)
def test_nothing_is_claimed_of_what_needs_no_limit_or_is_not_followed(body: str) -> None:
    assert ranges(body) == {}


@pytest.mark.parametrize(
    ("dtype", "body", "expected"),
    [
        ("int32", "a = Gather(t10, x)", (0, 9)),
        ("float", "b = Cast<to = 7>(x) a = Gather(t10, b)", (0, 9)),
        ("float", "b = Cast<to = 7>(x) c = Min(b, nine) a = Gather(t10, c)", (0, 2**24)),
        ("uint8", "b = Cast<to = 7>(x) c = Min(b, nine) a = Gather(t10, c)", (0, 255)),
        ("int32", "b = Cast<to = 7>(x) c = Max(b, zero) a = Gather(t10, c)", (-(2**31), 9)),
    ],
)
def test_a_side_without_a_limit_has_that_of_the_dtype(dtype: str, body: str, expected: tuple[int, int]) -> None:
    assert ranges(body, dtype) == {"x": expected}


def test_our_own_look_up_is_one() -> None:
    assert ranges(f"a = {DOMAIN}.{EMBEDDING}(x, t10)") == {"x": (0, 9)}


def test_several_inputs_have_their_own() -> None:
    assert ranges("b = Gather(t10, x) c = Gather(t5, y) d = Unsqueeze(c, i1) a = Add(b, d)") == {
        "x": (0, 9),
        "y": (0, 4),
    }


def test_a_table_that_a_caller_may_override_has_its_default_size() -> None:
    model = parser.parse_model(HEADER.format(body="a = Gather(t10, x)", dtype="int64", opset=18))
    model.graph.input.append(onnx.helper.make_tensor_value_info("t10", onnx.TensorProto.FLOAT, [10, 2]))
    assert index_ranges(model) == {"x": (0, 9)}


def test_a_table_inside_a_function_is_found() -> None:
    model = parser.parse_model("""
    <ir_version: 9, opset_import: ["" : 18, "local" : 1]>
    g (int64[n,3] x) => (float[n,3,2] a) <float[4,2] t = {1,2,3,4,5,6,7,8}> { a = local.look(t, x) }
    <domain: "local", opset_import: ["" : 18]> look (t, x) => (y) { y = Gather(t, x) }""")
    assert index_ranges(model) == {"x": (0, 3)}


@pytest.mark.parametrize("value", [0, 9])
def test_every_value_of_a_range_runs_and_the_next_does_not(value: int) -> None:
    """The range is the one of the runtime, but for the negative indices that it takes."""
    import onnxruntime

    model = parser.parse_model(HEADER.format(body="a = Gather(t10, x)", dtype="int64", opset=18))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = {"x": np.full((1, 3), value), "y": np.zeros(1, np.int64), "f": np.zeros((1, 3), np.float32)}
    given = {each.name: inputs[each.name] for each in session.get_inputs()}
    assert session.run(None, given)[0].shape == (1, 3, 2)
    if value == 9:
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(None, given | {"x": np.full((1, 3), 10)})


def test_a_long_chain_of_doublings_takes_no_time() -> None:
    """Each Concat reads its tensor twice: 2 ** 200 ways lead back to the input."""
    nodes = " ".join(f"b{i + 1} = Max(b{i}, b{i})" for i in range(200))
    joined = " ".join(f"c{i + 1} = Concat<axis = 0>(c{i}, c{i}) d{i} = Identity(c{i + 1})" for i in range(200))
    assert ranges(f"b0 = Identity(x) {nodes} c0 = Identity(x) {joined} a = Gather(t10, c200)") == {"x": (0, 9)}
