"""The lowered graph against the float64 oracle, on marked models written by hand: no Keras, no converter."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from support.laws import law
from support.marked import RTOL, SHAPES, MarkedLayer, inputs_of, model, off_by, run

from bln_serve.errors import RunError, UnsupportedModelError
from bln_serve.export.decomposition import decompose
from bln_serve.export.standard import require_standard
from bln_serve.manifest import MINI_BATCHES
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy

CODES = [policy.code for policy in ALL_POLICIES]
COUPLED = [policy.code for policy in ALL_POLICIES if policy.live_over_rows or policy.stored_by_slot]
BY_SLOT = [policy.code for policy in ALL_POLICIES if policy.stored_by_slot]
SHARED = ["Shape", "Div", "Squeeze", "Range", "Tile", "Reshape"]  # the slots of a run's rows, once a model


def rows_to_try(policy: str, m: int) -> set[int]:
    stored_by_slot = StatisticsPolicy.from_code(policy).stored_by_slot
    return {1, m - 1, m, m if stored_by_slot and m > 1 else 3 * m} - {0}


def some_rows(rows: int, layer: MarkedLayer, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows]).normal(0.5, 1.5, (rows, *layer.shape)).astype(layer.dtype)


def op_types(lowered: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in lowered.graph.node]


@pytest.mark.parametrize("m", [1, 2, 25])
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("policy", CODES)
def test_lowered_equals_the_oracle(policy: str, rank: int, m: int) -> None:
    layer = MarkedLayer(SHAPES[rank], m, policy)
    lowered = decompose(layer.model())
    for rows in rows_to_try(policy, m):
        x = some_rows(rows, layer)
        assert off_by(run(lowered, x), layer.answer(x)) <= RTOL, rows


@pytest.mark.parametrize("m", [2, 25])
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("policy", BY_SLOT)
def test_pooled_tables_serve_any_number_of_rows(policy: str, rank: int, m: int) -> None:
    layer = MarkedLayer(SHAPES[rank], m, policy, pooled=True)
    lowered = decompose(layer.model())
    for rows in (1, m - 1, m, m + 1, 3 * m):
        x = some_rows(rows, layer)
        assert off_by(run(lowered, x), layer.answer(x)) <= RTOL, rows


@pytest.mark.parametrize("wrong", ["gamma", "beta", "batch_mean", "batch_var", "feature_mean", "feature_var"])
def test_a_table_that_is_one_percent_off_is_beyond_the_tolerance(wrong: str) -> None:
    layer = MarkedLayer((5, 4), 4, "PPPP")
    off = MarkedLayer((5, 4), 4, "PPPP", changed={wrong: layer.tables[wrong] * 1.01})
    x = some_rows(4, layer)
    assert off_by(run(decompose(off.model()), x), layer.answer(x)) > 10 * RTOL


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("policy", CODES)
def test_mini_batches_side_by_side_are_each_what_they_are_alone(policy: str, rank: int, m: int) -> None:
    layer = MarkedLayer(SHAPES[rank], m, policy)
    lowered = decompose(layer.model())
    takes_several = MINI_BATCHES in {value.name for value in lowered.graph.input}
    assert takes_several == bool(coupled_at(policy, m))
    session = OnnxSession(lowered.SerializeToString(), threads=1)
    for count, rows in itertools.product((1, 2, 3), rows_to_try(policy, m)):
        parts = [some_rows(rows, layer, seed) for seed in range(count)]
        together = session.run(inputs_of(np.concatenate(parts), count if takes_several else None))["y"]
        for part, answer in zip(parts, np.split(together, count), strict=True):
            assert off_by(answer, layer.answer(part)) <= RTOL, (count, rows)
            assert off_by(answer, session.run({"x": part})["y"]) <= RTOL, (count, rows)


@pytest.mark.parametrize("policy", BY_SLOT)
def test_pooled_tables_beside_mini_batches_side_by_side(policy: str) -> None:
    layer = MarkedLayer((3, 4, 6), 5, policy, pooled=True)
    lowered = decompose(layer.model())
    takes_several = MINI_BATCHES in {value.name for value in lowered.graph.input}
    assert takes_several == bool(StatisticsPolicy.from_code(policy).live_over_rows)
    for count, rows in itertools.product((2, 3), (2, 5, 8)):
        parts = [some_rows(rows, layer, seed) for seed in range(count)]
        together = run(lowered, np.concatenate(parts), count if takes_several else None)
        assert off_by(together, np.concatenate([layer.answer(part) for part in parts])) <= RTOL, (count, rows)


@pytest.mark.parametrize("policy", COUPLED)
def test_another_number_of_mini_batches_gives_other_answers(policy: str) -> None:
    layer = MarkedLayer((5, 4), 4, policy)
    lowered, x = decompose(layer.model()), some_rows(4, layer)
    assert off_by(run(lowered, x, 2), layer.answer(x)) > 100 * RTOL


def coupled_at(policy: str, m: int) -> bool:
    """Whether rows meet: at m = 1 the one slot serves all."""
    sources = StatisticsPolicy.from_code(policy)
    return bool(sources.live_over_rows) or bool(sources.stored_by_slot and m > 1)


@law
@given(
    policy=st.sampled_from(COUPLED),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    m=st.integers(2, 6),
    counts=st.tuples(st.integers(2, 4), st.integers(1, 6)),
)
def test_a_mini_batch_never_sees_the_others(
    policy: str, shape: tuple[int, ...], m: int, counts: tuple[int, int]
) -> None:
    layer = MarkedLayer(shape, m, policy)
    count, rows = counts[0], min(counts[1], m)
    session = OnnxSession(decompose(layer.model()).SerializeToString(), threads=1)
    x = some_rows(count * rows, layer)
    among_others = x.copy()
    among_others[: (count - 1) * rows] = 1e6
    last = slice((count - 1) * rows, None)
    answers = [session.run(inputs_of(each, count))["y"][last] for each in (x, among_others)]
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(("rows", "count"), [(3, 2), (1, 2), (2, 3), (4, 3), (4, 0), (4, -1), (4, -2)])
@pytest.mark.parametrize("policy", COUPLED)
def test_rows_that_are_no_such_number_of_mini_batches_never_get_an_answer(policy: str, rows: int, count: int) -> None:
    layer = MarkedLayer((5, 4), 4, policy)
    with pytest.raises(RunError, match=f"refused a run of {rows} rows"):
        run(decompose(layer.model()), some_rows(rows, layer), count)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("policy", BY_SLOT)
def test_more_rows_than_slots_never_get_an_answer(policy: str, count: int) -> None:
    layer = MarkedLayer((5, 4), 3, policy)
    with pytest.raises(RunError, match=f"refused a run of {4 * count} rows"):
        run(decompose(layer.model()), some_rows(4 * count, layer), count)


PERMUTED = [axes for rank in (2, 3, 4) for axes in itertools.permutations(range(rank))]


@pytest.mark.parametrize("axes", PERMUTED)
@pytest.mark.parametrize("policy", CODES)
def test_axes_in_other_places(policy: str, axes: tuple[int, ...]) -> None:
    layer = MarkedLayer(SHAPES[len(axes)], 4, policy, axes=axes)
    lowered = decompose(layer.model())
    parts = [some_rows(3, layer, seed) for seed in (1, 2)]
    expected = np.concatenate([layer.answer(part) for part in parts])
    if coupled_at(policy, 4):
        assert off_by(run(lowered, np.concatenate(parts), 2), expected) <= RTOL
    else:
        assert off_by(run(lowered, np.concatenate(parts)), expected) <= RTOL


@pytest.mark.parametrize("axes", PERMUTED)
@pytest.mark.parametrize("policy", ["PPPP", "PPPM", "PPMP", "MMPP"])
def test_pooled_tables_with_axes_in_other_places(policy: str, axes: tuple[int, ...]) -> None:
    layer = MarkedLayer(SHAPES[len(axes)], 4, policy, axes=axes, pooled=True)
    x = some_rows(7, layer)
    assert off_by(run(decompose(layer.model()), x), layer.answer(x)) <= RTOL


def folded(layer: MarkedLayer, steps: int) -> onnx.ModelProto:
    """Return a model that folds `steps` steps of each row into the layer's rows."""
    nodes = [
        helper.make_node("Constant", [], ["into"], value_ints=[-1, *layer.shape]),
        helper.make_node("Constant", [], ["back"], value_ints=[-1, steps, *layer.shape]),
        helper.make_node("Reshape", ["x", "into"], ["folded"]),
        layer.node("folded", "normalized"),
        helper.make_node("Reshape", ["normalized", "back"], ["y"]),
    ]
    return model(nodes, [layer], ("rows", steps, *layer.shape))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("policy", COUPLED)
def test_time_folded_into_the_rows(policy: str, count: int) -> None:
    layer = MarkedLayer((5, 4), 7, policy, rows_per_row=3)
    parts = [some_rows(2 * 3, layer, seed).reshape(2, 3, 5, 4) for seed in range(count)]
    expected = [layer.answer(part.reshape(6, 5, 4)).reshape(part.shape) for part in parts]
    actual = run(decompose(folded(layer, 3)), np.concatenate(parts), count)
    assert off_by(actual, np.concatenate(expected)) <= RTOL


@pytest.mark.parametrize(("rows", "count"), [(4, 3), (4, 6), (2, 6), (1, 3)])
@pytest.mark.parametrize("policy", COUPLED)
def test_a_mini_batch_never_ends_within_what_one_row_makes(policy: str, rows: int, count: int) -> None:
    layer = MarkedLayer((5, 4), 12, policy, rows_per_row=3)
    x = np.random.default_rng(0).normal(size=(rows, 3, 5, 4)).astype(np.float32)
    with pytest.raises(RunError, match=f"refused a run of {rows} rows"):
        run(decompose(folded(layer, 3)), x, count)


@pytest.mark.parametrize("policy", BY_SLOT)
def test_time_folded_into_more_rows_than_slots_never_gets_an_answer(policy: str) -> None:
    layer = MarkedLayer((5, 4), 7, policy, rows_per_row=3)
    with pytest.raises(RunError, match="refused a run of 3 rows"):
        run(decompose(folded(layer, 3)), np.ones((3, 3, 5, 4), np.float32))


def test_layers_that_make_different_numbers_of_rows_have_each_its_own_slots() -> None:
    wide = MarkedLayer((4,), 6, "PPPP", rows_per_row=3, name="wide")
    narrow = MarkedLayer((3, 4), 2, "PPPP", name="narrow")
    steps = folded(wide, 3)
    steps.graph.node[-1].output[0] = "unfolded"
    both = model([*steps.graph.node, narrow.node("unfolded")], [wide, narrow], ("rows", 3, 4))
    parts = [some_rows(2, narrow, seed) for seed in (1, 2)]
    expected = [narrow.answer(wide.answer(part.reshape(6, 4)).reshape(2, 3, 4)) for part in parts]
    assert off_by(run(decompose(both), np.concatenate(parts), 2), np.concatenate(expected)) <= RTOL


@pytest.mark.parametrize("policy", COUPLED)
def test_without_several_mini_batches_there_is_no_such_input(policy: str) -> None:
    layer = MarkedLayer((5, 4), 4, policy)
    lowered = decompose(layer.model(), several_mini_batches=False)
    assert [value.name for value in lowered.graph.input] == ["x"]
    x = some_rows(4, layer)
    assert off_by(run(lowered, x), layer.answer(x)) <= RTOL
    if policy in BY_SLOT:
        with pytest.raises(RunError, match="refused a run of 5 rows"):
            run(lowered, some_rows(5, layer))


@pytest.mark.parametrize("policy", ["PPPP", "MMMM"])
def test_an_input_of_the_models_own_by_that_name_is_refused(policy: str) -> None:
    marked = MarkedLayer((6,), 4, policy).model()
    marked.graph.input.append(helper.make_tensor_value_info(MINI_BATCHES, onnx.TensorProto.FLOAT, ["rows", 1]))
    with pytest.raises(UnsupportedModelError, match="no input named 'mini_batches'.* Rename the model's input"):
        decompose(marked)


def test_an_input_by_that_name_is_the_models_own_where_rows_are_independent() -> None:
    marked = MarkedLayer((6,), 4, "PPMM").model()
    marked.graph.input.append(helper.make_tensor_value_info(MINI_BATCHES, onnx.TensorProto.FLOAT, ["rows", 1]))
    assert decompose(marked).graph.input == marked.graph.input


def test_an_offset_of_1000_costs_no_more_than_its_own_rounding() -> None:
    layer = MarkedLayer((5, 4), 25, "MMMM")
    x = (np.random.default_rng(2).normal(0, 1, (25, 5, 4)) + 1000).astype(np.float32)
    # A float32 at 1000 is 3e-5 wide; the one-pass variance would be off by more than 0.1 here.
    assert off_by(run(decompose(layer.model()), x), layer.answer(x)) <= 1e-4


# float64: the rounding of its own 2e-16 where rows differ by 1. float16: the answer's own rounding, 5e-4 of its size.
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float16", 2e-3)])
@pytest.mark.parametrize("policy", ["PMPM", "MMMM", "PPPP", "PPMM"])
def test_other_dtypes_are_computed_as_the_layer_computes_them(policy: str, dtype: str, limit: float) -> None:
    layer = MarkedLayer((5, 4), 4, policy, dtype)
    x = some_rows(4, layer)
    actual = run(decompose(layer.model()), x)
    assert actual.dtype == dtype
    assert off_by(actual, layer.answer(x)) <= limit


@pytest.mark.parametrize("policy", ["PMPM", "MMMM", "PPPP", "PPMM"])
def test_bfloat16_between_casts(policy: str) -> None:
    layer = MarkedLayer((5, 4), 4, policy, "bfloat16")
    nodes = [
        helper.make_node("Cast", ["x"], ["short"], to=onnx.TensorProto.BFLOAT16),
        layer.node("short", "normalized"),
        helper.make_node("Cast", ["normalized"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    x = np.random.default_rng(0).integers(-8, 8, (4, 5, 4)).astype(np.float32)  # whole numbers lose nothing on the way
    actual = run(decompose(model(nodes, [layer], ("rows", 5, 4))), x)
    assert off_by(actual, layer.answer(x)) <= 4e-3  # the answer's own rounding: bfloat16 has 8 bits


@pytest.mark.parametrize("policy", CODES)
def test_a_beta_of_zeros_and_a_mean_of_zeros(policy: str) -> None:
    zeros = {"beta": np.zeros(4), "batch_mean": np.zeros((1, 5, 4)), "feature_mean": np.zeros((4, 5, 1))}
    layer = MarkedLayer((5, 4), 4, policy, changed=zeros)
    x = some_rows(4, layer)
    assert off_by(run(decompose(layer.model()), x), layer.answer(x)) <= RTOL


@pytest.mark.parametrize("policy", CODES)
def test_beta_is_added_once_and_by_layer_normalization_where_nothing_else_is_to_be_added(policy: str) -> None:
    layer = MarkedLayer((6,), 4, policy)
    lowered = decompose(layer.model())
    sources = StatisticsPolicy.from_code(policy)
    biases = [len(node.input) == 3 for node in lowered.graph.node if node.op_type == "LayerNormalization"]
    assert biases == ([bool(sources.live_over_rows)] if not sources.stored_by_slot else [])
    x, moved = some_rows(4, layer), MarkedLayer((6,), 4, policy, changed={"beta": layer.tables["beta"] + 10})
    # Once and not twice: every answer moves by 10, to float32's rounding there.
    difference = run(decompose(moved.model()), x) - run(lowered, x)
    assert np.abs(difference - 10).max() <= 1e-5


@pytest.mark.parametrize(
    "layer", [MarkedLayer((6,), 1, "PPPP"), MarkedLayer((6,), 25, "PPPP", pooled=True)], ids=["m1", "pooled"]
)
def test_all_stored_with_one_slot_is_one_multiplication_and_one_addition(layer: MarkedLayer) -> None:
    assert op_types(decompose(layer.model())) == ["Mul", "Add"]


def chain(policy: str, axes: tuple[int, ...] | None = None) -> onnx.ModelProto:
    """Return two layers one after the other."""
    first, second = (MarkedLayer((5, 4), 4, policy, axes=axes, name=name) for name in ("first", "second"))
    shape = ("rows", 5, 4) if axes is None else ("rows", 4, 5)
    return model([first.node("x", "between"), second.node("between", "y")], [first, second], shape)


@pytest.mark.parametrize(
    ("policy", "shared", "each"),
    [
        ("PPPP", SHARED, ["Gather", "Mul", "Gather", "Add"]),
        ("PPMM", [], ["LayerNormalization", "Mul", "Add", "Add"]),
    ],
)
def test_how_many_operators_a_layer_costs(policy: str, shared: list[str], each: list[str]) -> None:
    assert op_types(decompose(chain(policy))) == shared + each * 2


def test_how_many_operators_a_layer_costs_with_features_before_positions() -> None:
    moved = (0, 2, 1)  # as a convolution's (rows, channels, positions)
    assert op_types(decompose(chain("PPPP", moved))) == SHARED + ["Gather", "Mul", "Gather", "Add"] * 2
    live = ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    assert op_types(decompose(chain("PPMM", moved))) == [*live, "Mul", "Add", "Add"] * 2


def test_no_custom_op_table_or_opset_is_left_and_the_marked_model_is_not_changed() -> None:
    marked = MarkedLayer((6,), 4, "PPMM").model()
    before = marked.SerializeToString(deterministic=True)
    lowered = decompose(marked)
    require_standard(lowered)
    assert {node.domain for node in lowered.graph.node} == {""}
    assert [item.domain for item in lowered.opset_import] == [""]
    used = {name for node in lowered.graph.node for name in node.input}
    assert {item.name for item in lowered.graph.initializer} <= used
    assert marked.SerializeToString(deterministic=True) == before


def test_other_nodes_are_not_touched_and_a_foreign_operator_is_refused_by_name_at_the_end() -> None:
    marked = MarkedLayer((6,), 4, "PPMM").model()
    mystery = helper.make_node("Mystery", ["y"], ["z"], domain="com.example")
    marked.graph.node.append(mystery)
    lowered = decompose(marked)
    assert lowered.graph.node[-1] == mystery
    with pytest.raises(UnsupportedModelError, match="standard ONNX operators only. Received: com.example::Mystery"):
        require_standard(lowered)


def test_a_foreign_operator_inside_a_loop_is_refused_too() -> None:
    body = onnx.parser.parse_graph("""
        body (int64 i, bool c, float a) => (bool d, float b) { d = Identity(c)  b = com.example.Mystery(a) }""")
    marked = MarkedLayer((6,), 4, "PPMM").model()
    marked.graph.node.append(helper.make_node("Loop", ["n", "c", "a"], ["b"], body=body))
    with pytest.raises(UnsupportedModelError, match="Received: com.example::Mystery"):
        require_standard(decompose(marked))
