import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.laws import law

from bln_serve.errors import (
    InvalidInputError,
    MalformedRequestError,
    MiniBatchError,
    NonFiniteAnswerError,
)
from bln_serve.serving import json_arrays, predict_json
from bln_serve.serving.prediction import Prediction


def test_rows_without_a_name() -> None:
    for key in ("instances", "inputs"):
        request = predict_json.read(orjson.dumps({key: [[1, 2], [3, 4.5]], "mini_batch_rows": 2}))
        np.testing.assert_array_equal(request.inputs, [[1, 2], [3, 4.5]])
        assert request.mini_batch_rows == 2


def test_rows_by_name_are_the_same_by_instance_and_by_input() -> None:
    by_instance = predict_json.read(b'{"instances": [{"a": [1, 2], "b": 3}, {"b": 6, "a": [4, 5]}]}').inputs
    by_input = predict_json.read(b'{"inputs": {"a": [[1, 2], [4, 5]], "b": [3, 6]}}').inputs
    assert isinstance(by_instance, dict)
    assert isinstance(by_input, dict)
    assert by_instance.keys() == by_input.keys()
    for name, array in by_input.items():
        np.testing.assert_array_equal(by_instance[name], array)


@pytest.mark.parametrize(
    ("body", "kind", "sentence"),
    [
        (b"", MalformedRequestError, "Expected a JSON object. Received: 0 bytes"),
        (b"{", MalformedRequestError, "Expected a JSON object"),
        (b"\xff\xfe", MalformedRequestError, "Expected a JSON object"),
        (b'{"instances": [[NaN]]}', MalformedRequestError, "Expected a JSON object"),
        (b'{"instances": [[Infinity]]}', MalformedRequestError, "Expected a JSON object"),
        (b'{"instances": [[1e400]]}', MalformedRequestError, "a number that 64 bits cannot hold"),
        (b'{"instances": [[%s]]}' % (b"9" * 400), MalformedRequestError, "a number that 64 bits cannot hold"),
        (b'{"instances": %s1%s}' % (b"[" * 5000, b"]" * 5000), MalformedRequestError, "depth"),
        (b'{"instances": %s1%s}' % (b"[" * 900, b"]" * 900), InvalidInputError, "more than 32 levels of lists"),
        (b"[[1, 2]]", MalformedRequestError, "Received: a list"),
        (b"null", MalformedRequestError, "Received: null"),
        (b"3", MalformedRequestError, "Received: a number"),
        (b"{}", MalformedRequestError, "either 'instances' or 'inputs'. Received: neither"),
        (b'{"instances": [1], "inputs": [1]}', MalformedRequestError, "Received: both"),
        (b'{"instances": [1], "mini_batch_row": 2}', MalformedRequestError, "Received: .'mini_batch_row'."),
        (b'{"instances": 5}', InvalidInputError, "'instances' to be a list of rows. Received: a number"),
        (b'{"instances": "abc"}', InvalidInputError, "'instances' to be a list of rows. Received: text"),
        (b'{"instances": []}', InvalidInputError, "at least one row. Received: an empty list"),
        (b'{"instances": [[1, 2], [3]]}', InvalidInputError, "lists of 1 and of 2 items at depth 2"),
        (b'{"instances": [[1, 2], 3]}', InvalidInputError, "Received: lists beside numbers"),
        (b'{"instances": [3, [1, 2]]}', InvalidInputError, "Received: lists beside numbers"),
        (b'{"instances": [["1"]]}', InvalidInputError, "'instances' to be a rectangular array .* Received: text"),
        (b'{"instances": [[null]]}', InvalidInputError, "Received: null"),
        (b'{"instances": [[true, 0.5]]}', InvalidInputError, "Received: booleans beside numbers"),
        (b'{"instances": [[1, true]]}', InvalidInputError, "Received: booleans beside numbers"),
        (
            b'{"inputs": {"a": {"b": 1}}}',
            InvalidInputError,
            "'a' to be a rectangular array of numbers. Received: objects",
        ),
        (b'{"inputs": null}', InvalidInputError, "'inputs' to be a rectangular array of numbers. Received: null"),
        (b'{"instances": [{"a": 1}, {"b": 1}]}', InvalidInputError, "'a', each once. Received: 'b' at index 1"),
        (b'{"instances": [{"a": 1}, 2]}', InvalidInputError, "Received: a number at index 1"),
        (b'{"instances": [1], "mini_batch_rows": -1}', MiniBatchError, "Received: -1"),
        (b'{"instances": [1], "mini_batch_rows": 2.0}', MiniBatchError, "a whole number.* Received: 2.0"),
        (b'{"instances": [1], "mini_batch_rows": true}', MiniBatchError, "Received: True"),
        (b'{"instances": [1], "mini_batch_rows": "2"}', MiniBatchError, "Received: text"),
        (b'{"instances": [1], "mini_batch_rows": null}', MiniBatchError, "Received: null"),
    ],
)
def test_a_wrong_body_is_refused_with_a_sentence(body: bytes, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        predict_json.read(body)


def test_one_long_text_among_many_short_ones_costs_no_memory() -> None:
    """As one NumPy array these would take 100,000 x 100,000 x 4 bytes."""
    values = ["x" * 100_000, *["y"] * 100_000]
    with pytest.raises(InvalidInputError, match="Received: text"):
        predict_json.read(orjson.dumps({"instances": values}))


@law
@given(
    hnp.arrays(
        st.sampled_from([np.float64, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4),
        elements=None,
    ).filter(lambda array: bool(np.isfinite(array).all()))
)
def test_any_array_survives_the_way_there(array: np.ndarray) -> None:
    read = json_arrays.array("x", array.tolist())
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "instances"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@law
@given(st.dictionaries(st.sampled_from(["instances", "inputs", "mini_batch_rows", "other"]), _JSON, max_size=3) | _JSON)
def test_whatever_json_says_it_is_read_or_refused(document: object) -> None:
    try:
        request = predict_json.read(orjson.dumps(document))
    except (InvalidInputError, MalformedRequestError, MiniBatchError):
        return
    arrays = request.inputs.values() if isinstance(request.inputs, dict) else [request.inputs]
    assert all(array.dtype.kind in "biufO" for array in arrays)


def _prediction(**outputs: np.ndarray) -> Prediction:
    return Prediction(outputs, "digits", 3, "PPMM", "25x40,7")


def test_an_answer_with_one_output() -> None:
    encoded = predict_json.write(_prediction(y=np.array([[0.1, -2.0]], np.float32).repeat(2, 0)))
    assert orjson.loads(encoded.body) == {
        "predictions": [[0.1, -2.0], [0.1, -2.0]],
        "model": "digits",
        "version": 3,
        "statistics": "PPMM",
        "mini_batches": "25x40,7",
    }


def test_an_answer_with_several_outputs_names_them() -> None:
    fortran = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    encoded = predict_json.write(_prediction(a=fortran, b=np.array([1, 2])))
    assert orjson.loads(encoded.body)["predictions"] == {"a": [[0, 1, 2], [3, 4, 5]], "b": [1, 2]}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_json_cannot_say_is_refused_with_its_rows(value: float) -> None:
    output = np.zeros((4, 2, 2), np.float32)
    output[[1, 3], 0, 1] = value
    with pytest.raises(NonFiniteAnswerError, match=r"output 'y'.* in 2 of 4 rows, at index 1, 3. .*application/x-npy"):
        predict_json.write(_prediction(y=output))


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity"])
def test_pythons_own_words_for_what_json_has_none_are_explained(word: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="Expected a JSON object.*JSON has no NaN and no Infinity"):
        predict_json.read(b'{"instances": [[' + word + b"]]}")
