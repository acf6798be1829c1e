"""Transposes moved behind BLN layers and before look-ups: fewer of them, and the same numbers."""

from collections.abc import Sequence

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import helper
from support import models, paper
from support.marked import OPSETS, RTOL, MarkedLayer, off_by

from bln_serve.export import conversion, decomposition, embedding, freezing, layout, saved_model
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, DOMAIN, EMBEDDING, attributes_of
from bln_serve.export.graphs import all_nodes
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import ALL_POLICIES

CODES = [policy.code for policy in ALL_POLICIES]
TO_LAST, TO_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)  # features, as Keras has them and as a convolution does
TIME_FIRST = (1, 0, 2)  # as a recurrent operator takes it; its own inverse
TABLE = np.random.default_rng(1).normal(size=(11, 4)).astype(np.float32)


def images(features: int, policy: str = "PPMM", name: str = "bln") -> MarkedLayer:
    return MarkedLayer((3, 2, features), 4, policy, name=name)


def sequences(policy: str = "PPMM") -> MarkedLayer:
    return MarkedLayer((5, 4), 4, policy)


def transpose(x: str, y: str, perm: Sequence[int]) -> onnx.NodeProto:
    return helper.make_node("Transpose", [x], [y], perm=perm)


def relu(x: str, y: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [x], [y])


def graph_of(
    nodes: Sequence[onnx.NodeProto], marked: Sequence[MarkedLayer], inputs: dict[str, tuple], outputs: dict[str, tuple]
) -> onnx.ModelProto:
    """Return a model; an input of integers is called `ids`."""
    kinds = {"ids": onnx.TensorProto.INT64}
    values = [
        [helper.make_tensor_value_info(name, kinds.get(name, 1), shape) for name, shape in each.items()]
        for each in (inputs, outputs)
    ]
    tables = {item.name: item for layer in marked for item in layer.initializers()}
    graph = helper.make_graph(nodes, "marked", *values, list(tables.values()))
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def answers(marked: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Lower a marked model and run it on 4 rows, which are all slots of its layers."""
    model = decomposition.decompose(marked)
    embedding.lower(model)
    embedding.inject(model, {"words": TABLE})
    onnx.checker.check_model(model, full_check=True)
    generator, requests = np.random.default_rng(0), {}
    for value in marked.graph.input:
        shape = [4 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name == "ids":
            requests[value.name] = generator.integers(0, len(TABLE), shape)
        else:
            requests[value.name] = generator.normal(0.5, 1.5, shape).astype(np.float32)
    return OnnxSession(model.SerializeToString(), threads=1).run(requests)


def sunk(marked: onnx.ModelProto) -> onnx.ModelProto:
    """Move the Transposes, and see that every output answers as before."""
    before = marked.SerializeToString(deterministic=True)
    moved = layout.sink_transposes(marked)
    assert marked.SerializeToString(deterministic=True) == before
    assert [value.name for value in moved.graph.output] == [value.name for value in marked.graph.output]
    expected, actual = answers(marked), answers(moved)
    for name in expected:
        assert off_by(actual[name], expected[name]) <= RTOL, name
    return moved


def transposes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    nodes = [node for node in all_nodes(model.graph) if node.op_type == "Transpose"]
    return [tuple(attributes_of(node)["perm"]) for node in nodes]


def axes(model: onnx.ModelProto) -> list[tuple[int, ...] | None]:
    nodes = [node for node in model.graph.node if node.op_type == BATCH_LAYER_NORMALIZATION]
    return [tuple(found) if (found := attributes_of(node).get("axes")) else None for node in nodes]


def between_convolutions(features: int, policy: str = "PPMM") -> onnx.ModelProto:
    layer, shape = images(features, policy), ("rows", features, 3, 2)
    nodes = [transpose("x", "last", TO_LAST), layer.node("last", "b"), transpose("b", "second", TO_SECOND)]
    return graph_of([*nodes, relu("second", "y")], [layer], {"x": shape}, {"y": shape})


@pytest.mark.parametrize("policy", CODES)
def test_between_two_convolutions_no_transpose_is_left_where_features_are_few(policy: str) -> None:
    moved = sunk(between_convolutions(6, policy))
    assert (transposes(moved), axes(moved)) == ([], [TO_LAST])


@pytest.mark.parametrize(("features", "left"), [(8, []), (9, [TO_LAST, TO_SECOND]), (16, [TO_LAST, TO_SECOND])])
def test_many_features_keep_their_transposes(features: int, left: list[tuple[int, ...]]) -> None:
    assert transposes(sunk(between_convolutions(features))) == left


@pytest.mark.parametrize("policy", CODES)
def test_between_two_recurrent_operators_no_transpose_is_left(policy: str) -> None:
    layer = sequences(policy)
    nodes = [*time_first(), layer.node("rows_first", "b"), transpose("b", "second", TIME_FIRST), relu("second", "y")]
    moved = sunk(graph_of(nodes, [layer], {"x": ("rows", 5, 4)}, {"y": (5, "rows", 4)}))
    # The first one, before all of it.
    assert (transposes(moved), axes(moved)) == ([TIME_FIRST], [TIME_FIRST])


def time_first() -> list[onnx.NodeProto]:
    """Return nodes as of a recurrent operator on x."""
    return [transpose("x", "t", TIME_FIRST), relu("t", "steps"), transpose("steps", "rows_first", TIME_FIRST)]


@pytest.mark.parametrize("policy", CODES)
def test_a_transpose_sinks_also_where_nothing_undoes_it_if_features_stay_last(policy: str) -> None:
    layer, shape = sequences(policy), ("rows", 5, 4)
    moved = sunk(graph_of([*time_first(), layer.node("rows_first", "y")], [layer], {"x": shape}, {"y": shape}))
    assert axes(moved) == [TIME_FIRST]
    assert moved.graph.node[-1].op_type == "Transpose"


def test_a_transpose_with_another_user_stays_for_that_one() -> None:
    layer = images(6)
    nodes = [
        *between_convolutions(6).graph.node,
        relu("last", "more"),
    ]
    shapes = {"y": ("rows", 6, 3, 2), "more": ("rows", 3, 2, 6)}
    moved = sunk(graph_of(nodes, [layer], {"x": shapes["y"]}, shapes))
    assert (transposes(moved), axes(moved)) == ([TO_LAST], [TO_LAST])


def test_a_transpose_that_makes_an_output_stays() -> None:
    layer = images(6)
    shapes = {"y": ("rows", 6, 3, 2), "last": ("rows", 3, 2, 6)}
    moved = sunk(graph_of(between_convolutions(6).graph.node, [layer], {"x": shapes["y"]}, shapes))
    assert (transposes(moved), axes(moved)) == ([TO_LAST], [TO_LAST])


def test_a_layer_that_makes_an_output_gives_it_as_before() -> None:
    layer = images(6)
    shapes = {"y": ("rows", 6, 3, 2), "b": ("rows", 3, 2, 6)}
    moved = sunk(graph_of(between_convolutions(6).graph.node, [layer], {"x": shapes["y"]}, shapes))
    assert (transposes(moved), axes(moved)) == ([TO_LAST], [TO_LAST])


def test_the_second_transpose_of_two_may_make_an_output() -> None:
    layer, shape = images(6), ("rows", 6, 3, 2)
    nodes = [transpose("x", "last", TO_LAST), layer.node("last", "b"), transpose("b", "y", TO_SECOND)]
    assert axes(sunk(graph_of(nodes, [layer], {"x": shape}, {"y": shape}))) == [TO_LAST]


def test_a_transpose_that_is_not_the_inverse_is_none() -> None:
    layer = images(6)
    nodes = [transpose("x", "last", TO_LAST), layer.node("last", "b"), transpose("b", "t", (0, 2, 1, 3))]
    nodes.append(relu("t", "y"))
    moved = sunk(graph_of(nodes, [layer], {"x": ("rows", 6, 3, 2)}, {"y": ("rows", 2, 3, 6)}))
    assert (transposes(moved), axes(moved)) == ([TO_LAST, (0, 2, 1, 3)], [None])


@pytest.mark.parametrize("policy", ["PPPP", "MMMM", "PPMM"])
def test_a_layer_used_twice_once_moved_and_once_not(policy: str) -> None:
    layer = images(6, policy)
    again = layer.node("x2", "b2")
    again.name = "again"
    nodes = [*between_convolutions(6, policy).graph.node, again, relu("b2", "y2")]
    shapes = {"x": ("rows", 6, 3, 2), "x2": ("rows", 3, 2, 6)}
    moved = sunk(graph_of(nodes, [layer], shapes, {"y": shapes["x"], "y2": shapes["x2"]}))
    assert (transposes(moved), axes(moved)) == ([], [TO_LAST, None])


@pytest.mark.parametrize("policy", ["PPPP", "MMMM", "PPMM"])
def test_two_layers_in_a_row(policy: str) -> None:
    first, second = images(6, policy, "first"), images(6, policy, "second")
    nodes = [transpose("x", "last", TO_LAST), first.node("last", "b"), second.node("b", "c")]
    nodes += [transpose("c", "second", TO_SECOND), relu("second", "y")]
    shape = ("rows", 6, 3, 2)
    sunk(graph_of(nodes, [first, second], {"x": shape}, {"y": shape}))


def loop(nodes: Sequence[onnx.NodeProto], y: str, shape: Sequence[int | str]) -> list[onnx.NodeProto]:
    """Return nodes that run others once, inside a Loop's body, which makes y."""
    condition = [helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("go", "goes_on")]
    body = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["go"], ["goes_on"])],
        "body",
        [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), condition[0]],
        [condition[1], helper.make_tensor_value_info(y, 1, shape)],
    )
    once = helper.make_node("Constant", [], ["once"], value_int=1)
    true = helper.make_node("Equal", ["once", "once"], ["true"])
    return [once, true, helper.make_node("Loop", ["once", "true"], [f"{y}/stacked"], body=body)]


@pytest.mark.parametrize("captured", ["last", "b", "second", "x"])
def test_values_that_a_loop_captures_are_as_before(captured: str) -> None:
    layer, shape = images(6), ("rows", 6, 3, 2)
    # What it captures, transposed inside the body by the inverse of both, in turn.
    for perm in (TO_SECOND, TO_LAST):
        inside = loop([transpose(captured, "inside", perm)], "inside", (None,) * 4)
        nodes = [*between_convolutions(6).graph.node, *inside]
        outputs = {"y": shape, "inside/stacked": (1, *[None] * 4)}
        moved = sunk(graph_of(nodes, [layer], {"x": shape}, outputs))
        assert axes(moved) == [TO_LAST]


def test_transposes_inside_a_loop_are_let_alone() -> None:
    layer, shape = images(6), ("rows", 6, 3, 2)
    inside = [transpose("x", "t", TO_LAST), relu("t", "r"), transpose("r", "s", TO_SECOND)]
    nodes = [*between_convolutions(6).graph.node, *loop(inside, "s", (None,) * 4)]
    moved = sunk(graph_of(nodes, [layer], {"x": shape}, {"y": shape, "s/stacked": (1, *[None] * 4)}))
    assert transposes(moved) == [TO_LAST, TO_SECOND]


def look_up(ids: str = "ids", y: str = "looked") -> onnx.NodeProto:
    facts = {"layer": "words", "table": "words", "input_dim": len(TABLE), "output_dim": TABLE.shape[1]}
    return helper.make_node(EMBEDDING, [ids], [y], domain=DOMAIN, **facts)


BOTH = {"y": (5, "rows", 4), "z": (5, "rows", 4)}
SWAP = transpose("looked", "t", TIME_FIRST)


@pytest.mark.parametrize(
    ("nodes", "outputs", "left"),
    [
        ([SWAP, relu("t", "y")], {"y": (5, "rows", 4)}, [(1, 0)]),
        ([SWAP, relu("t", "y"), transpose("looked", "u", TIME_FIRST), relu("u", "z")], BOTH, [(1, 0)]),
        ([SWAP, relu("t", "y"), relu("looked", "z")], {**BOTH, "z": ("rows", 5, 4)}, [TIME_FIRST]),
        (
            [SWAP, relu("t", "y"), transpose("looked", "u", (0, 2, 1)), relu("u", "z")],
            {**BOTH, "z": ("rows", 4, 5)},
            [TIME_FIRST, (0, 2, 1)],
        ),
        ([SWAP, relu("t", "y")], {"y": (5, "rows", 4), "looked": ("rows", 5, 4)}, [TIME_FIRST]),
        ([transpose("looked", "t", (0, 2, 1)), relu("t", "y")], {"y": ("rows", 4, 5)}, [(0, 2, 1)]),
        ([relu("looked", "y")], {"y": ("rows", 5, 4)}, []),
    ],
    ids=["one user", "two agree", "one is none", "two differ", "an output", "features move", "no transpose"],
)
def test_a_transpose_behind_a_look_up_is_lifted_if_all_that_take_it_agree(
    nodes: list[onnx.NodeProto], outputs: dict[str, tuple], left: list[tuple[int, ...]]
) -> None:
    marked = graph_of([look_up(), *nodes], [], {"ids": ("rows", 5)}, outputs)
    assert transposes(sunk(marked)) == left


def test_a_transpose_behind_a_look_up_may_make_an_output() -> None:
    nodes = [look_up(), transpose("looked", "y", TIME_FIRST)]
    sunk(graph_of(nodes, [], {"ids": ("rows", 5)}, {"y": (5, "rows", 4)}))


def test_a_look_up_that_a_loop_captures() -> None:
    for nodes in ([transpose("looked", "s", TIME_FIRST)], [transpose("looked", "u", TIME_FIRST), relu("u", "s")]):
        outputs = {"y": (5, "rows", 4), "s/stacked": (1, None, None, None)}
        every = [look_up(), SWAP, relu("t", "y"), *loop(nodes, "s", (None,) * 3)]
        sunk(graph_of(every, [], {"ids": ("rows", 5)}, outputs))


def test_other_numbers_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_undoes", lambda node, perm: node.op_type == "Transpose")
    layer = MarkedLayer((4, 4, 4), 4, "PPMM")
    nodes = [transpose("x", "last", TO_LAST), layer.node("last", "b"), transpose("b", "t", (0, 3, 2, 1))]
    shape = ("rows", 4, 4, 4)
    with pytest.raises(AssertionError, match="y"):
        sunk(graph_of([*nodes, relu("t", "y")], [layer], {"x": shape}, {"y": shape}))


def converted(model: keras.Model) -> onnx.ModelProto:
    callee, frozen = saved_model.describe(model), freezing.freeze(model, None)
    return conversion.convert(callee, frozen, 18).model


@pytest.fixture(scope="module")
def cnn() -> onnx.ModelProto:
    return converted(paper.under(paper.cnn, "PPMM"))


def test_the_papers_cnn_keeps_two_transposes(cnn: onnx.ModelProto) -> None:
    # One at its input, and one where 16 features are too many.
    assert len(transposes(cnn)) == 2


def test_the_papers_cnn_answers_as_keras_does(cnn: onnx.ModelProto) -> None:
    model = paper.under(paper.cnn, "PPMM")
    x = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    (answer,) = OnnxSession(cnn.SerializeToString(), threads=1).run({"image": x}).values()
    assert off_by(answer, model(x).numpy()) <= 1e-5


@pytest.mark.parametrize("policy", ["PPPP", "MMMM", "PPMM"])
def test_a_layer_between_two_lstms_has_no_transpose_beside_it(policy: str) -> None:
    x = keras.Input((5, 3), name="x")
    y = layers.LSTM(4, return_sequences=True)(x)
    y = layers.LSTM(4)(models.bln(4, policy)(y))
    model = models.with_random_statistics(keras.Model(x, y))
    lowered = converted(model)
    # The one that takes the input's time first.
    assert transposes(lowered) == [TIME_FIRST]
    rows = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    (answer,) = OnnxSession(lowered.SerializeToString(), threads=1).run({"x": rows}).values()
    assert off_by(answer, model(rows).numpy()) <= 1e-5
