"""The requests of the verification: which, with what values, and how wide, so that they show faults and not float32."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import layers
from support.laws import law
from support.models import bln, tiny, with_random_statistics

from bln_serve.errors import ParityError, UnsupportedModelError
from bln_serve.export import conversion, freezing, parity, pipeline, samples, saved_model, typical_ranges
from bln_serve.export.samples import SPREADS, Batches, Case, Spread
from bln_serve.export.saved_model import Callee
from bln_serve.runtime import OnnxSession
from bln_serve.signature import TensorSpec
from bln_serve.statistics import MiniBatchRule, mini_batch_rule
from bln_serve.verification import Tolerance

ROOT = Path(__file__).parents[2]
LIMIT = Tolerance().rtol / 4


# --- Which requests


@pytest.mark.parametrize(
    ("rule", "size", "trained", "expected"),
    [
        (None, 5, [5], [Case(1, None), Case(4, None), Case(5, None), Case(6, None), Case(15, None)]),
        (None, 1, [1], [Case(1, None), Case(2, None), Case(3, None)]),
        # Live rows: at least 2. 6 rows in fives would leave 1, so they are cut by 4.
        (MiniBatchRule(5, 2), 5, [5], [Case(2, 5), Case(4, 5), Case(5, 5), Case(6, 4, 4), Case(15, 5)]),
        (MiniBatchRule(5, 1, 5), 5, [5], [Case(1, 5), Case(4, 5), Case(5, 5), Case(6, 5), Case(15, 5)]),
        # 3 rows cannot be cut where a mini-batch has 2 rows, neither fewer nor more.
        (MiniBatchRule(2, 2, 2), 2, [2], [Case(2, 2), Case(6, 2)]),
        (MiniBatchRule(1, 1), 1, [1], [Case(1, 1), Case(2, 1), Case(3, 1)]),
        # Asked for by twos, all five slots are tried nevertheless; the other layer's 9 are more than there are slots.
        (MiniBatchRule(2, 1, 5), 2, [5, 9], [Case(1, 2), Case(2, 2), Case(3, 2), Case(6, 2), Case(5, 5, 5)]),
    ],
)
def test_cases(rule: MiniBatchRule | None, size: int, trained: list[int], expected: list[Case]) -> None:
    assert list(samples.cases(rule, size, trained)) == expected


@law
@given(
    default=st.integers(1, 9),
    fewest=st.integers(1, 2),
    slots=st.none() | st.integers(2, 9),
    trained=st.lists(st.integers(1, 12), max_size=3),
)
def test_every_case_is_a_request_that_the_rule_takes(
    default: int, fewest: int, slots: int | None, trained: list[int]
) -> None:
    rule = MiniBatchRule(default, fewest, slots)
    assume(rule.allows(default, default))
    for case in samples.cases(rule, default, trained):
        assert max(rule.cut(case.rows, case.mini_batch_rows)) == min(case.size or 0, case.rows)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(1, None), "1 row"),
        (Case(4, 5), "4 rows"),
        (Case(15, 5), "15 rows in mini-batches of 5"),
    ],
)
def test_a_case_in_words(case: Case, words: str) -> None:
    assert case.describe() == words


# --- With what values

FLOATS = TensorSpec("x", "float32", (None, 50, 4))


def drawn(spec: TensorSpec, spread: Spread = SPREADS[0]) -> np.ndarray:
    (values,) = samples.draw([spec], 100, np.random.default_rng(0), spread).values()
    assert values.dtype == spec.dtype
    assert values.shape == (100, *spec.shape[1:])
    return values


@pytest.mark.parametrize("spread", SPREADS)
def test_floats_are_normal(spread: Spread) -> None:
    values = drawn(FLOATS, spread)
    # 20,000 numbers: the mean is known to 0.7 % of the deviation, the deviation to 0.5 %.
    assert abs(values.mean() - spread.mean) <= 0.03 * spread.deviation
    assert abs(values.std() / spread.deviation - 1) <= 0.03


@pytest.mark.parametrize("spread", SPREADS)
def test_floats_with_a_typical_range_are_drawn_about_its_middle_by_quarters(spread: Spread) -> None:
    values = drawn(replace(FLOATS, typical_range=(0.0, 255.0)), spread)
    assert abs(values.mean() - (127.5 + 63.75 * spread.mean)) <= 0.03 * 63.75 * spread.deviation
    assert abs(values.std() / (63.75 * spread.deviation) - 1) <= 0.03


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TensorSpec("x", "int32", (None, 50), value_range=(-2, 3)), range(-2, 4)),
        (TensorSpec("x", "float32", (None, 50), value_range=(0, 4)), range(5)),
        (TensorSpec("x", "int64", (None, 50)), (0, 1)),
        (TensorSpec("x", "bool", (None, 50)), (False, True)),
        (TensorSpec("x", "bool", (None, 50), typical_range=(0.0, 9.0)), (False, True)),
        (TensorSpec("x", "uint8", (None, 50), typical_range=(0.0, 9.0)), range(10)),
        # What fails the model counts more than what is usual.
        (TensorSpec("x", "int32", (None, 50), value_range=(1, 2), typical_range=(0.0, 9.0)), (1, 2)),
    ],
)
def test_what_is_not_a_free_float_takes_every_value_of_its_range(spec: TensorSpec, expected: range) -> None:
    for spread in SPREADS:
        assert sorted(set(drawn(spec, spread).reshape(-1).tolist())) == list(expected)


def test_a_request_is_the_same_every_time() -> None:
    np.testing.assert_array_equal(drawn(FLOATS), drawn(FLOATS))


# --- How wide


def described(model: keras.Model) -> Callee:
    return typical_ranges.with_typical_ranges(saved_model.describe(model))


def choose(model: keras.Model, sizes: tuple[int, ...] = (2, 5)) -> Batches:
    return samples.choose(described(model), sizes, Tolerance())


def test_a_well_conditioned_model_keeps_the_three_spreads() -> None:
    found = choose(tiny("MMMM", 5, "tiny"))
    assert found.spreads == SPREADS
    assert 0 < found.sensitivity <= LIMIT


def digits(rescaled: Any) -> keras.Model:
    image = keras.Input((8, 8), name="image")
    return keras.Model(image, keras.models.load_model(ROOT / "models" / "digits_rnn.keras")(rescaled(image)))


def verified(model: keras.Model, monkeypatch: pytest.MonkeyPatch | None = None) -> parity.Parity:
    """Verify the model's ONNX form; with a patch, on the three spreads as they are."""
    if monkeypatch:
        monkeypatch.setattr(samples, "choose", lambda *arguments: Batches(SPREADS, 0.0))
    callee, frozen = described(model), freezing.freeze(model, None)
    made = conversion.convert(callee, frozen, pipeline.DEFAULT_OPSET)
    rule = mini_batch_rule(made.layers, made.layers[0].m, (made.coupling.row_coupling, ""))
    subject = parity.Subject(callee, made.layers, rule, made.coupling.row_coupling, Tolerance())
    session = OnnxSession(made.model.SerializeToString(), threads=1)
    return parity.verify(subject, [parity.Engine("ONNX", session.run, made.several_mini_batches)])


@pytest.fixture(scope="module")
def behind_a_division() -> keras.Model:
    """The shipped model on numbers 255 times as small, and nothing that says so."""
    return digits(lambda image: image / 255.0)


def test_rows_that_hardly_differ_are_drawn_wider_and_then_verified(behind_a_division: keras.Model) -> None:
    found = verified(behind_a_division)
    assert found.report.passed, found.report.table()
    assert found.sensitivity <= LIMIT
    widest = max(np.abs(sample.inputs["image"]).max() for sample in found.samples)
    assert widest > 10 * max(spread.mean + 4 * spread.deviation for spread in SPREADS)


def test_with_the_three_spreads_alone_its_float32_error_is_taken_for_a_fault(
    behind_a_division: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verified(behind_a_division, monkeypatch).report
    assert not report.passed
    assert report.largest_difference < 1e-3  # nothing is wrong but the last digits


def test_behind_a_rescaling_the_three_spreads_are_wide_enough() -> None:
    found = choose(digits(layers.Rescaling(1 / 255)), (2, 25))
    assert found.spreads == SPREADS
    assert found.sensitivity <= LIMIT


def hopeless(x: keras.KerasTensor) -> keras.Model:
    """Return a model whose rows differ in the last digits of 1, whatever its inputs."""
    y = layers.Dense(5, activation="tanh")(keras.ops.tanh(x) * 1e-6 + 1)
    y = bln(5, "MMMM", "b2")(bln(5, "MMMM", "b1")(y))
    return with_random_statistics(keras.Model(x, layers.Dense(2)(layers.Flatten()(y)), name="hopeless"))


def test_a_hopeless_model_ends_and_its_sensitivity_is_recorded() -> None:
    found = choose(hopeless(keras.Input((6, 4), name="x")))
    assert len(found.spreads) == len(SPREADS)
    assert found.sensitivity > LIMIT


def test_whatever_the_sensitivity_there_is_a_widest_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """About the same mean: numbers far from zero that hardly differ are no surer for being four times as large."""
    monkeypatch.setattr(samples, "_sensitivities", lambda callee, spreads, sizes: [1.0] * len(spreads))
    found = choose(tiny("MMMM", 5, "tiny"))
    assert found == Batches(tuple(Spread(each.mean, each.deviation * 4**4) for each in SPREADS), 1.0)


def test_where_wider_is_worse_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        samples, "_sensitivities", lambda callee, spreads, sizes: [1e-5 * spread.deviation for spread in spreads]
    )
    assert choose(tiny("MMMM", 5, "tiny")) == Batches(SPREADS, 4e-5)


def test_its_refusal_says_that_it_is_the_models_own_error(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="The model's own float32 error is of this size: .* rescale what goes into"):
        pipeline.export_onnx(hopeless(keras.Input((6, 4), name="x")), tmp_path / "hopeless.onnx")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_cannot_be_drawn_wider_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    y = layers.Embedding(2, 4)(tokens) * 1e-6 + 1
    y = bln(5, "MMMM", "b2")(bln(5, "MMMM", "b1")(layers.Dense(5, activation="tanh")(y)))
    measure, measured = samples._sensitivities, []
    monkeypatch.setattr(samples, "_sensitivities", lambda *each: measured.append(each) or measure(*each))
    found = choose(with_random_statistics(keras.Model(tokens, y)))
    assert (found.spreads, len(measured)) == (SPREADS, 1)
    assert found.sensitivity > LIMIT


def test_a_wider_tolerance_asks_for_less() -> None:
    model = described(hopeless(keras.Input((6, 4), name="x")))
    assert samples.choose(model, (2, 5), Tolerance(rtol=1.0)).spreads == SPREADS


# --- The weights, moved and moved back


def holding(values: np.ndarray) -> Any:
    return SimpleNamespace(weights=[keras.Variable(values)])


def bits(model: Any) -> list[bytes]:
    return [np.asarray(weight.numpy()).tobytes() for weight in model.weights]


EDGES = np.array([0.0, -0.0, 1e-45, -1e-45, 1.0, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38], np.float32)


def test_every_finite_weight_moves_by_one_unit_in_its_last_place_and_comes_back_to_the_bit() -> None:
    model = holding(EDGES)
    before = bits(model)
    with samples._weights_moved(model):
        moved = model.weights[0].numpy()
        finite = np.isfinite(EDGES)
        steps = moved.view(np.int32)[finite].astype(np.int64) - EDGES.view(np.int32)[finite]
        assert set(np.abs(steps)) == {1}
        np.testing.assert_array_equal(moved[~finite], EDGES[~finite])
    assert bits(model) == before


@settings(law, max_examples=50)
@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_whatever_a_weight_holds_comes_back_to_the_bit(patterns: list[int]) -> None:
    model = holding(np.array(patterns, np.uint32).view(np.float32))
    before = bits(model)
    with samples._weights_moved(model):
        pass
    assert bits(model) == before


def test_a_weight_without_a_dimension() -> None:
    model = holding(np.float32(1.5))
    before = bits(model)
    with samples._weights_moved(model):
        assert bits(model) != before
    assert bits(model) == before


def test_weights_of_other_dtypes_stay() -> None:
    values = [np.float64([1.5]), np.int32([3]), np.float16([2.5])]
    model = SimpleNamespace(weights=[keras.Variable(value, dtype=str(value.dtype)) for value in values])
    before = bits(model)
    with samples._weights_moved(model):
        assert bits(model) == before


def test_the_model_is_as_it_was_after_choosing() -> None:
    model = tiny("MMMM", 5, "tiny")
    model.weights[0].assign(np.resize(EDGES[:5], model.weights[0].shape))
    before = bits(model)
    choose(model)
    assert bits(model) == before


def test_the_model_is_as_it_was_also_if_it_fails_while_its_weights_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("MMMM", 5, "tiny")
    before, answers, seen = bits(model), samples.keras_answers, []

    def fail(*arguments: Any) -> Any:
        seen.append(bits(model))
        if seen[-1] != before:
            raise RuntimeError("no memory")
        return answers(*arguments)

    monkeypatch.setattr(samples, "keras_answers", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        choose(model)
    assert len(set(map(tuple, seen))) == 2
    assert bits(model) == before


# --- Keras's answers


@pytest.mark.parametrize("rows", [5, 7, 10])
def test_answers_to_several_requests_are_those_to_each_alone(rows: int) -> None:
    callee = described(tiny("MMMM", 5, "tiny"))
    requests = [samples.draw(callee.signature.inputs, rows, np.random.default_rng(seed)) for seed in range(3)]
    for request, answer in zip(requests, samples.keras_answers(callee, requests, 5), strict=True):
        expected = callee.model.predict(request["x"], batch_size=5, verbose=0)
        np.testing.assert_array_equal(answer["score"], expected)


def with_inputs(kind: str) -> keras.Model:
    dtype = "float64" if kind == "float64" else "float32"
    wide, tokens = keras.Input((6, 4), dtype=dtype, name="wide"), keras.Input((6,), dtype="int32", name="tokens")
    if kind == "sequential":
        return keras.Sequential([keras.Input((6, 4), name="wide"), bln(5, "MMMM"), layers.Dense(2, name="score")])
    y = layers.Concatenate(dtype=dtype)([wide, layers.Embedding(2, 3)(tokens)])
    y = layers.Dense(2, dtype=dtype, name="score")(y if kind == "float64" else bln(5, "MMMM")(y))
    return keras.Model({"wide": wide, "tokens": tokens} if kind == "dict" else [wide, tokens], y)


@pytest.mark.parametrize("kind", ["list", "dict", "sequential", "float64"])
def test_answers_are_those_that_predict_gives_to_arrays(kind: str) -> None:
    """Whatever the inputs stand in; and predict takes floats for float32 whatever they are."""
    callee = described(with_inputs(kind))
    request = samples.draw(callee.signature.inputs, 7, np.random.default_rng(0))
    arrays = callee.pack([request[spec.name] for spec in callee.signature.inputs])
    (answer,) = samples.keras_answers(callee, [request], 5)
    np.testing.assert_array_equal(answer["score"], callee.model.predict(arrays, batch_size=5, verbose=0))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_are_refused(broken: float) -> None:
    samples.require_finite([{"y": np.ones(3)}])
    with pytest.raises(UnsupportedModelError, match="Received: NaN or infinity in output 'y'"):
        samples.require_finite([{"y": np.ones(3)}, {"y": np.array([1.0, broken])}])
