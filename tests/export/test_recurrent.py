"""Each recurrent layer is one ONNX operator, and answers as Keras does and as the equations say."""

from collections import Counter
from functools import partial

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import helper, numpy_helper
from support import recurrent as oracle
from support.recurrent import exported, with_random_weights

from bln_serve.export import recurrent, recurrent_cells, recurrent_layers
from bln_serve.export.custom_ops import RECURRENT
from bln_serve.export.marking import marked_nodes
from bln_serve.export.recurrent_cells import KINDS
from bln_serve.runtime import OnnxSession

TIME, FEATURES, UNITS = 7, 4, 5
ROWS = (1, 2, 25)
# float32 on both sides over seven steps, and ONNX Runtime's tanh and sigmoid, which are rational functions: 8e-7 of
# max|y| measured, over all cases here.
RTOL = 2e-6
LOOPS = ("Loop", "Scan", "If")

LAYERS = {
    "LSTM": ("LSTM", layers.LSTM),
    "GRU": ("GRU", layers.GRU),
    "GRU reset before": ("GRU", partial(layers.GRU, reset_after=False)),
    "SimpleRNN": ("RNN", layers.SimpleRNN),
}
every_layer = pytest.mark.parametrize(("op", "layer"), LAYERS.values(), ids=LAYERS)


def functional(call, dtype: str = "float32") -> keras.Model:
    """Return a model of the outputs that `call` makes of x, named o0, o1, ... if they are several."""
    x = keras.Input((TIME, FEATURES), name="x", dtype=dtype)
    outputs = call(x)
    if isinstance(outputs, (list, tuple)):
        outputs = {f"o{index}": output for index, output in enumerate(outputs)}
    return keras.Model(x, outputs)


def assert_close(actual, wanted) -> None:
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=RTOL * np.abs(wanted).max())


def random_inputs(callee, rows: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(rows)
    return {
        spec.name: generator.normal(0, 1, (rows, *spec.shape[1:])).astype(spec.dtype)
        for spec in callee.signature.inputs
    }


def assert_answers_as_keras(callee, lowered: onnx.ModelProto) -> None:
    onnx.checker.check_model(lowered, full_check=True)
    session = OnnxSession(lowered.SerializeToString(), threads=1)
    for rows in ROWS:
        inputs = random_inputs(callee, rows)
        actual = session.run(inputs)
        for name, wanted in callee(*inputs.values()).items():
            assert_close(actual[name], wanted.numpy())


def assert_operators(model: keras.Model, *, scale: float = 1.0, **counts: int) -> onnx.ModelProto:
    """The whole of it: as many operators as said, no loop, nothing to say, and Keras's answers."""
    callee, marked = exported(with_random_weights(model, scale=scale))
    # The converter makes an LSTM of a plain loop too, if it knows the loop's form.
    assert [node.op_type for node in marked_nodes(marked.model)] == [RECURRENT] * sum(counts.values())
    lowered = recurrent.lower(marked.model)
    found = Counter(node.op_type for node in lowered.graph.node)
    assert {op: found[op] for op in ("LSTM", "GRU", "RNN", *LOOPS) if found[op]} == counts
    assert marked.notes == ()
    assert_answers_as_keras(callee, lowered)
    return lowered


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_sequences": True},
        {"go_backwards": True},
        {"go_backwards": True, "return_sequences": True},
        {"use_bias": False},
        {"dropout": 0.3, "recurrent_dropout": 0.4},
        {"unroll": True},
    ],
    ids=str,
)
@every_layer
def test_one_layer(op: str, layer, options) -> None:
    assert_operators(functional(layer(UNITS, **options)), **{op: 1})


@pytest.mark.parametrize("return_sequences", [False, True])
@every_layer
def test_both_ways(op: str, layer, return_sequences: bool) -> None:
    def call(x):
        made = [
            layers.Bidirectional(layer(UNITS, return_sequences=return_sequences), merge_mode=merge_mode)
            for merge_mode in ("concat", "sum", "mul", "ave", None)
        ]
        return keras.tree.flatten([both(x) for both in made])

    assert_operators(functional(call), **{op: 5})


@pytest.mark.parametrize("go_backwards", [False, True])
@every_layer
def test_states_come_out(op: str, layer, go_backwards: bool) -> None:
    returning = layer(UNITS, return_sequences=True, return_state=True, go_backwards=go_backwards)
    assert_operators(functional(returning), **{op: 1})


@every_layer
def test_states_of_both_ways_come_out(op: str, layer) -> None:
    def call(x):
        made = [layers.Bidirectional(layer(UNITS, return_state=True), merge_mode=mode) for mode in ("concat", None)]
        return [output for both in made for output in both(x)]

    assert_operators(functional(call), **{op: 2})


@every_layer
def test_states_go_from_an_encoder_into_a_decoder(op: str, layer) -> None:
    def call(x):
        _, *states = layer(UNITS, return_state=True)(x)
        return layer(UNITS, return_sequences=True)(x, initial_state=states)

    assert_operators(functional(call), **{op: 2})


@every_layer
def test_states_of_both_ways_go_from_an_encoder_into_a_decoder(op: str, layer) -> None:
    def call(x):
        _, *states = layers.Bidirectional(layer(UNITS, return_state=True))(x)
        return layers.Bidirectional(layer(UNITS))(x, initial_state=states)

    assert_operators(functional(call), **{op: 2})


def test_an_initial_state_of_zeros_or_of_another_layer() -> None:
    assert_operators(functional(lambda x: layers.GRU(4)(x, initial_state=keras.ops.zeros_like(x[:, 0]))), GRU=1)
    assert_operators(functional(lambda x: layers.GRU(4)(x, initial_state=layers.Dense(4)(x[:, 0]))), GRU=1)


def test_a_backward_layer_of_its_own() -> None:
    forward = layers.LSTM(UNITS, activation="elu", recurrent_activation="hard_sigmoid")
    backward = layers.LSTM(UNITS, activation="leaky_relu", use_bias=False, go_backwards=True)
    assert_operators(functional(layers.Bidirectional(forward, backward_layer=backward)), LSTM=1)


@pytest.mark.parametrize("merge_mode", ["concat", "mul"])
def test_what_one_operator_cannot_be_is_one_each_way(merge_mode: str) -> None:
    before = layers.GRU(UNITS, reset_after=False, return_sequences=True, return_state=True, go_backwards=True)
    after = layers.GRU(UNITS, return_sequences=True, return_state=True)
    assert_operators(functional(layers.Bidirectional(after, merge_mode, backward_layer=before)), GRU=2)
    other = layers.LSTM(UNITS, go_backwards=True)
    assert_operators(
        functional(layers.Bidirectional(layers.GRU(UNITS), merge_mode, backward_layer=other)), GRU=1, LSTM=1
    )


def test_stacked() -> None:
    def call(x):
        x = layers.LSTM(UNITS, return_sequences=True)(x)
        x = layers.GRU(UNITS, return_sequences=True, go_backwards=True)(layers.Dense(3)(x))
        return layers.LSTM(3)(layers.Bidirectional(layers.SimpleRNN(UNITS, return_sequences=True))(x))

    assert_operators(functional(call), LSTM=2, GRU=1, RNN=1)


def test_a_shared_layer_used_twice_is_two_operators_and_one_set_of_weights() -> None:
    shared = layers.LSTM(FEATURES, return_sequences=True, name="shared")
    lowered = assert_operators(functional(lambda x: shared(shared(x))), LSTM=2)
    first, second = (list(node.input[1:4]) for node in lowered.graph.node if node.op_type == "LSTM")
    assert first == second


def test_inside_nested_models_with_layers_of_the_same_name() -> None:
    def inner() -> keras.Model:
        return functional(layers.GRU(FEATURES, return_sequences=True, name="same"))

    sequential = keras.Sequential([keras.Input((TIME, FEATURES)), layers.LSTM(3, name="same")])
    assert_operators(functional(lambda x: sequential(inner()(inner()(x)))), GRU=2, LSTM=1)


@pytest.mark.parametrize(
    ("cell", "op"), [(layers.LSTMCell, "LSTM"), (layers.GRUCell, "GRU"), (layers.SimpleRNNCell, "RNN")]
)
def test_a_cell_in_the_general_layer(cell, op: str) -> None:
    assert_operators(functional(layers.RNN(cell(UNITS), return_sequences=True, go_backwards=True)), **{op: 1})


@pytest.mark.parametrize("dtype", ["int32", "float16", "float64"])
def test_the_input_is_cast_as_keras_casts_it(dtype: str) -> None:
    assert_operators(functional(layers.LSTM(UNITS), dtype), LSTM=1)


@every_layer
def test_activations_against_the_equations(op: str, layer) -> None:
    made = [
        layer(UNITS, activation=name, return_sequences=True, **({} if op == "RNN" else {"recurrent_activation": name}))
        for name in oracle.FUNCTIONS
    ]
    model = functional(lambda x: [each(x) for each in made])
    # Small: a linear or rectified recurrence multiplies what rounding left at every step.
    lowered = assert_operators(model, scale=0.25, **{op: len(made)})
    x = np.random.default_rng(1).normal(0, 1, (25, TIME, FEATURES)).astype(np.float32)
    answers = OnnxSession(lowered.SerializeToString(), threads=1).run({"x": x})
    for index, (each, function) in enumerate(zip(made, oracle.FUNCTIONS.values(), strict=True)):
        after = getattr(each.cell, "reset_after", True)
        gates = oracle.of_cell(op, each.cell)
        assert_close(answers[f"o{index}"], oracle.run(op, gates, x, reset_after=after, f=function, g=function).y)


@pytest.mark.parametrize("scale", [1, 10])
@every_layer
def test_default_activations_against_the_equations(op: str, layer, scale: int) -> None:
    made = layer(UNITS, return_sequences=True)
    lowered = assert_operators(functional(made), **{op: 1})
    x = np.random.default_rng(1).normal(0, scale, (25, TIME, FEATURES)).astype(np.float32)
    (actual,) = OnnxSession(lowered.SerializeToString(), threads=1).run({"x": x}).values()
    wanted = oracle.run(op, oracle.of_cell(op, made.cell), x, reset_after=getattr(made.cell, "reset_after", True))
    assert_close(actual, wanted.y)


def gru_both_ways():
    return functional(layers.Bidirectional(layers.GRU(UNITS, return_sequences=True)))


def gru_backwards():
    return functional(layers.GRU(UNITS, return_sequences=True, go_backwards=True))


def with_attribute(model: onnx.ModelProto, name: str, value) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Recurrent")
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def with_table(model: onnx.ModelProto, name: str, change) -> None:
    table = next(item for item in model.graph.initializer if item.name.endswith(f"/{name}"))
    table.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(table)), table.name))


@pytest.mark.parametrize(
    ("build", "fault"),
    [
        pytest.param(gru_both_ways, lambda m: with_table(m, "W", lambda w: w[::-1]), id="ways swapped"),
        pytest.param(gru_both_ways, lambda m: with_table(m, "R", lambda r: np.roll(r, UNITS, 1)), id="gate order"),
        pytest.param(gru_both_ways, lambda m: with_table(m, "B", lambda b: np.roll(b, 3 * UNITS, 1)), id="bias halves"),
        pytest.param(gru_backwards, lambda m: with_attribute(m, "direction", "forward"), id="direction"),
        pytest.param(gru_backwards, lambda m: with_attribute(m, "reversed_output", 0), id="reversed output"),
        pytest.param(gru_backwards, lambda m: with_attribute(m, "linear_before_reset", 0), id="linear_before_reset"),
    ],
)
def test_a_planted_fault_is_seen(build, fault) -> None:
    callee, marked = exported(with_random_weights(build()))
    fault(marked.model)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_answers_as_keras(callee, recurrent.lower(marked.model))


@every_layer
def test_a_silent_fallback_is_seen(op: str, layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_layers, "call", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_operators(functional(layer(UNITS)), **{op: 1})


def test_weights_in_kerass_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[layers.LSTMCell]
    in_kerass_order = recurrent_cells.Kind(kind.op_type, (0, 1, 2, 3), kind.states, kind.activations)
    monkeypatch.setitem(KINDS, layers.LSTMCell, in_kerass_order)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_operators(functional(layers.LSTM(UNITS)), LSTM=1)
