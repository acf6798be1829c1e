"""The lowered operator against the float64 oracle, on marked models written by hand: no Keras, no converter."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support import recurrent as oracle

from bln_serve.export.custom_ops import DOMAIN, RECURRENT
from bln_serve.export.recurrent import lower
from bln_serve.runtime import OnnxSession

TIME, FEATURES, UNITS = 6, 4, 3
# float32 over six steps, and ONNX Runtime's tanh and sigmoid, which are rational functions: 3.5e-7 of max|y| measured.
RTOL = 2e-6
ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def tables(kind: str, ways: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    gates = len(oracle.GATES[kind]) * UNITS
    shapes = {"W": (ways, gates, FEATURES), "R": (ways, gates, UNITS), "B": (ways, 2 * gates)}
    return {name: generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def marked_model(
    kind: str,
    direction: str = "forward",
    *,
    values: dict[str, np.ndarray],
    states: bool = False,
    used: tuple[str, ...] = ("y", "h", "c"),
    **attributes: int,
) -> onnx.ModelProto:
    ways = len(values["W"])
    names = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    before = [f"{name}0" for name in names[1:]] if states else []
    node = helper.make_node(
        RECURRENT,
        ["x", *before, *values],
        names,
        domain=DOMAIN,
        layer="layer",
        kind=kind,
        direction=direction,
        hidden_size=UNITS,
        activations=ACTIVATIONS[kind] * ways,
        **{"linear_before_reset": 0, "reversed_output": 0, **attributes},
    )
    shapes = {"x": (TIME, FEATURES), "y": (TIME, ways * UNITS)}
    inputs, outputs = (
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", *shapes.get(name, (ways * UNITS,))])
            for name in wanted
        ]
        for wanted in (["x", *before], [name for name in names if name in used])
    )
    constants = [numpy_helper.from_array(each, name) for name, each in values.items()]
    graph = helper.make_graph([node], "marked", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def answers(model: onnx.ModelProto, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    return dict(OnnxSession(model.SerializeToString(), threads=1).run(inputs))


def expected(kind: str, direction: str, values: dict[str, np.ndarray], x: np.ndarray, **attributes: int) -> dict:
    """The oracle's answers, the ways side by side, each step at its time."""
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    found = [
        oracle.run(
            kind,
            oracle.of_onnx(kind, *(values[name][way] for name in "WRB")),
            x,
            backwards=back,
            reset_after=bool(attributes.get("linear_before_reset")),
            **{name: attributes[name][:, way * UNITS : (way + 1) * UNITS] for name in "hc" if name in attributes},
        )
        for way, back in enumerate(backwards)
    ]
    y = [answer.y[:, ::-1] if back else answer.y for answer, back in zip(found, backwards, strict=True)]
    outputs = {"y": np.concatenate(y, -1), "h": np.concatenate([each.h for each in found], -1)}
    if kind == "LSTM":
        outputs["c"] = np.concatenate([each.c for each in found], -1)
    return outputs


def assert_close(actual: dict, wanted: dict) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].shape == value.shape
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=RTOL * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("rows", [1, 2, 25])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("kind", "after"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
def test_lowered_equals_the_oracle(kind: str, after: int, direction: str, states: bool, rows: int) -> None:
    ways = 2 if direction == "bidirectional" else 1
    values = tables(kind, ways)
    model = lower(marked_model(kind, direction, values=values, states=states, linear_before_reset=after))
    generator = np.random.default_rng(rows)
    x = generator.normal(0, 1.5, (rows, TIME, FEATURES)).astype(np.float32)
    names = ("hc" if kind == "LSTM" else "h") if states else ""
    given = {name: generator.normal(size=(rows, ways * UNITS)).astype(np.float32) for name in names}
    actual = answers(model, x=x, **{f"{name}0": value for name, value in given.items()})
    assert_close(actual, expected(kind, direction, values, x, linear_before_reset=after, **given))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_reversed_output_is_turned_around_and_the_states_are_not(direction: str) -> None:
    values = tables("LSTM", 1)
    x = np.random.default_rng(1).normal(size=(2, TIME, FEATURES)).astype(np.float32)
    plain = expected("LSTM", direction, values, x)
    actual = answers(lower(marked_model("LSTM", direction, values=values, reversed_output=1)), x=x)
    assert_close(actual, {**plain, "y": plain["y"][:, ::-1]})


@pytest.mark.parametrize("used", [("y",), ("h",), ("c",), ("y", "c")])
def test_only_what_is_used_is_brought_into_layout(used: tuple[str, ...]) -> None:
    values = tables("LSTM", 1)
    model = lower(marked_model("LSTM", values=values, used=used))
    x = np.random.default_rng(1).normal(size=(2, TIME, FEATURES)).astype(np.float32)
    wanted = expected("LSTM", "forward", values, x)
    assert_close(answers(model, x=x), {name: wanted[name] for name in used})
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops == Counter(LSTM=1, Transpose=2 if "y" in used else 1, Squeeze=len(used))


def test_time_stays_first_until_the_last_transpose() -> None:
    for direction, ways in (("forward", 1), ("bidirectional", 2)):
        model = lower(marked_model("GRU", direction, values=tables("GRU", ways), used=("y",)))
        last = model.graph.node[-1]
        assert (last.op_type, list(helper.get_node_attr_value(last, "perm"))) == ("Transpose", [1, 0, 2])


def test_other_nodes_and_the_marked_model_stay_as_they_are() -> None:
    marked = marked_model("GRU", values=tables("GRU", 1))
    marked.graph.node.append(helper.make_node("Identity", ["y"], ["again"], name="behind"))
    before = marked.SerializeToString(deterministic=True)
    lowered = lower(marked)
    assert marked.SerializeToString(deterministic=True) == before
    assert lowered.graph.node[-1] == marked.graph.node[-1]
    assert not any(node.domain == DOMAIN for node in lowered.graph.node)


def test_two_nodes_of_one_layer_have_names_of_their_own() -> None:
    values = tables("RNN", 1)
    values["W"], values["R"] = values["W"][:, :, :UNITS], values["R"]
    marked = marked_model("RNN", values=values, used=("y",))
    first = marked.graph.node[0]
    second = onnx.NodeProto()
    second.CopyFrom(first)
    first.output[0], second.input[0] = "between", "between"
    first.output[1] = "unused"
    marked.graph.node.append(second)
    marked.graph.input[0].type.tensor_type.shape.dim[2].dim_value = UNITS
    x = np.random.default_rng(1).normal(size=(2, TIME, UNITS)).astype(np.float32)
    between = expected("RNN", "forward", values, x)["y"]
    assert_close(answers(lower(marked), x=x), {"y": expected("RNN", "forward", values, between)["y"]})


def swap_gates(values):
    return {**values, "W": np.roll(values["W"], UNITS, axis=1)}


def swap_bias_halves(values):
    return {**values, "B": np.roll(values["B"], values["B"].shape[1] // 2, axis=1)}


@pytest.mark.parametrize(
    ("change", "attributes"),
    [
        pytest.param(swap_gates, {}, id="gate order"),
        pytest.param(swap_bias_halves, {}, id="bias halves"),
        pytest.param(dict, {"direction": "reverse"}, id="direction"),
        pytest.param(dict, {"linear_before_reset": 0}, id="linear_before_reset"),
        pytest.param(dict, {"reversed_output": 1}, id="reversed output"),
    ],
)
def test_a_planted_fault_is_seen(change, attributes) -> None:
    values = tables("GRU", 1)
    x = np.random.default_rng(1).normal(size=(2, TIME, FEATURES)).astype(np.float32)
    wanted = expected("GRU", "forward", values, x, linear_before_reset=1)
    actual = answers(lower(marked_model("GRU", values=change(values), **{"linear_before_reset": 1, **attributes})), x=x)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(actual, wanted)
    assert np.abs(actual["y"] - wanted["y"]).max() > 1e-2
