"""TensorFlow Serving's REST protocol, with the examples of its own pages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.laws import law

from bln_serve.errors import InvalidInputError, MalformedRequestError, NonFiniteAnswerError
from bln_serve.manifest import read_manifest
from bln_serve.serving import tf_serving
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest
from bln_serve.signature import ModelSignature, TensorSpec


def message(document: Any) -> Message:
    return Message(document if isinstance(document, bytes) else orjson.dumps(document), {}, {})


def read(document: Any) -> PredictRequest:
    return tf_serving.read(message(document))


def prediction(**outputs: np.ndarray) -> Prediction:
    return Prediction(outputs, "digits", 3, "MMMM", "25x40,7")


def answer(document: Any, **outputs: np.ndarray) -> Any:
    return orjson.loads(read(document).write(prediction(**outputs)).body)


def lists(inputs: Any) -> Any:
    return {name: array.tolist() for name, array in inputs.items()} if isinstance(inputs, dict) else inputs.tolist()


SENSORS = {
    "signal": [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]],
    "sensor": [[[1, 2], [3, 4]], [[4, 5], [6, 8]]],
}
ROWS = [{"signal": signal, "sensor": sensor} for signal, sensor in zip(*SENSORS.values(), strict=True)]


@pytest.mark.parametrize(
    ("document", "inputs"),
    [
        ({"instances": [1.0, 2.0, 5.0]}, [1.0, 2.0, 5.0]),
        ({"instances": [[[1, 2]], [[3, 4]]]}, [[[1, 2]], [[3, 4]]]),
        ({"instances": ROWS}, SENSORS),
        ({"inputs": SENSORS}, SENSORS),
        ({"inputs": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]]),
        ({"signature_name": "serving_default", "instances": [[True], [False]]}, [[True], [False]]),
        ({"instances": [{"b64": [1, 2]}]}, {"b64": [[1, 2]]}),
    ],
)
def test_rows_and_columns_are_read(document: Any, inputs: Any) -> None:
    request = read(document)
    assert lists(request.inputs) == inputs
    assert request.mini_batch_rows is None


@pytest.mark.parametrize(
    ("document", "kind", "sentence"),
    [
        (b"", MalformedRequestError, "Expected a JSON object. Received: 0 bytes, and"),
        (b"{", MalformedRequestError, "Expected a JSON object"),
        (b"\xff", MalformedRequestError, "Expected a JSON object"),
        (b'{"instances": [NaN]}', MalformedRequestError, "JSON has no NaN and no Infinity"),
        (b'{"instances": [-Infinity]}', MalformedRequestError, "JSON has no NaN and no Infinity"),
        (b'{"instances": [1e999]}', MalformedRequestError, "a number that 64 bits cannot hold"),
        (b'{"instances": ' + b"[" * 100_000, MalformedRequestError, "Expected a JSON object"),
        (b'{"instances": %s1%s}' % (b"[" * 900, b"]" * 900), InvalidInputError, "more than 32 levels of lists"),
        (b'{"inputs": %s1%s}' % (b'{"a":' * 900, b"}" * 900), InvalidInputError, "Received: objects"),
        (b"[[1, 2]]", MalformedRequestError, "than inputs, instances, signature_name. Received: .a list."),
        (b"null", MalformedRequestError, "Received: null"),
        ({}, MalformedRequestError, "either 'instances' or 'inputs'. Received: neither"),
        ({"instances": [1], "inputs": [1]}, MalformedRequestError, "Received: both"),
        (
            {"instances": [1], "mini_batch_rows": 2},
            MalformedRequestError,
            "'mini_batch_rows'.. mini_batch_rows goes into the",
        ),
        ({"signature_nam": "x", "instances": [1]}, MalformedRequestError, "Received: .'signature_nam'."),
        ({"examples": [{"x": 1}]}, MalformedRequestError, "Received: .'examples'."),
        (
            {"signature_name": "serve_mini_batches", "instances": [1]},
            MalformedRequestError,
            "signature_name to be 'serving_default', or left out. Received: 'serve_mini_batches'",
        ),
        ({"signature_name": "", "instances": [1]}, MalformedRequestError, "Received: ''"),
        ({"signature_name": None, "instances": [1]}, MalformedRequestError, "Received: null"),
        (
            {"signature_name": ["serving_default"], "instances": [1]},
            MalformedRequestError,
            "Received: .'serving_default'.",
        ),
        ({"instances": []}, InvalidInputError, "at least one row. Received: an empty list"),
        ({"instances": 5}, InvalidInputError, "'instances' to be a list of rows. Received: a number"),
        ({"instances": {"x": [1]}}, InvalidInputError, "'instances' to be a list of rows. Received: an object"),
        ({"instances": [[1, 2], [3]]}, InvalidInputError, "lists of 1 and of 2 items"),
        ({"instances": [{"a": 1}, {"b": 1}]}, InvalidInputError, "'a', each once. Received: 'b' at index 1"),
        ({"instances": ["foo", "bar"]}, InvalidInputError, "rectangular array of numbers. Received: text.$"),
        ({"inputs": "foo"}, InvalidInputError, "Received: text"),
        ({"inputs": None}, InvalidInputError, "Received: null"),
        ({"inputs": {"a": [[1], [True]]}}, InvalidInputError, "'a' to be .* Received: booleans beside numbers"),
    ],
)
def test_a_wrong_body_is_refused_with_a_sentence(document: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        read(document)


@pytest.mark.parametrize(
    "document",
    [
        {"instances": [{"b64": "aW1hZ2U="}]},
        {"instances": [{"image": {"b64": "aW1hZ2U="}, "caption": "seaside"}]},
        {"instances": [[{"b64": "aW1hZ2U="}]]},
        {"inputs": {"image": [{"b64": "aW1hZ2U="}]}},
        {"inputs": {"b64": "aW1hZ2U="}},
    ],
)
def test_bytes_in_base64_are_refused_with_a_sentence(document: Any) -> None:
    with pytest.raises(InvalidInputError, match='Received: .* No model here takes bytes, such as {"b64": TEXT}.'):
        read(document)


Y, Z = np.array([[0.5, -2.0], [0.1, 1e30]], np.float32), np.array([7, 2**62])


def test_rows_are_answered_by_rows() -> None:
    document = {"instances": [1, 2]}
    assert answer(document, y=Y) == {"predictions": [[0.5, -2.0], [0.1, 1e30]]}
    assert answer(document, y=Z) == {"predictions": [7, 2**62]}
    assert answer(document, y=np.asfortranarray(Y)) == {"predictions": [[0.5, -2.0], [0.1, 1e30]]}
    assert answer(document, y=np.asfortranarray(Y), z=Z) == {
        "predictions": [{"y": [0.5, -2.0], "z": 7}, {"y": [0.1, 1e30], "z": 2**62}]
    }


def test_columns_are_answered_by_columns() -> None:
    document = {"inputs": [1, 2]}
    assert answer(document, y=Y) == {"outputs": [[0.5, -2.0], [0.1, 1e30]]}
    assert answer(document, y=np.asfortranarray(Y), z=Z) == {
        "outputs": {"y": [[0.5, -2.0], [0.1, 1e30]], "z": [7, 2**62]}
    }


@pytest.mark.parametrize("dtype", list(tf_serving._DTYPES))
@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_every_dtype_is_answered_alone_and_beside_others(dtype: str, key: str) -> None:
    values = np.array([[1, 0], [0, 1]]).astype(dtype)
    alone = answer({key: [1, 2]}, y=values)
    assert list(alone.values()) == [values.tolist()]
    (beside,) = answer({key: [1, 2]}, y=values, z=values[:, 0]).values()
    rows = [row["z"] for row in beside] if key == "instances" else beside["z"]
    assert rows == values[:, 0].tolist()


@pytest.mark.parametrize("key", ["instances", "inputs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_json_cannot_say_is_refused(key: str, value: float) -> None:
    with pytest.raises(NonFiniteAnswerError, match=r"output 'z'.* in 1 of 2 rows, at index 1"):
        answer({key: [1, 2]}, y=Y, z=np.array([0, value]))


def written(prediction: Prediction) -> Encoded:
    return read({"instances": [1]}).write(prediction)


def test_an_answer_says_in_headers_what_it_was() -> None:
    encoded = written(prediction(y=Y))
    assert encoded.media_type == "application/json"
    assert encoded.headers == {
        "bln-model": "digits",
        "bln-version": "3",
        "bln-statistics": "MMMM",
        "bln-mini-batches": "25x40,7",
    }


def test_what_our_own_json_calls_null_is_left_out() -> None:
    encoded = written(Prediction({"y": Y}, "digits", 3, None, None))
    assert encoded.headers == {"bln-model": "digits", "bln-version": "3"}


def test_all_of_a_body_is_parsed_slowly() -> None:
    assert tf_serving.slow_bytes(message(b"12345")) == 5


_NUMBERS = hnp.arrays(
    st.sampled_from([np.float64, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4),
    elements=None,
).filter(lambda array: bool(np.isfinite(array).all()))


@law
@given(_NUMBERS)
def test_any_array_survives_there_and_back_in_both_formats(array: np.ndarray) -> None:
    for key, back in (("instances", "predictions"), ("inputs", "outputs")):
        inputs = read({key: array.tolist()}).inputs
        assert isinstance(inputs, np.ndarray)
        assert inputs.dtype == array.dtype
        np.testing.assert_array_equal(inputs, array)
        np.testing.assert_array_equal(answer({key: [1]}, y=array)[back], array)


@law
@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_rows_and_columns_are_two_forms_of_the_same(rows: int, outputs: int, data: st.DataObject) -> None:
    arrays = {
        f"y{index}": data.draw(
            hnp.arrays(np.int64, st.tuples(st.just(rows), st.integers(1, 3)) | st.just((rows,))), label=f"y{index}"
        )
        for index in range(outputs)
    }
    by_columns = answer({"inputs": [1]}, **arrays)["outputs"]
    by_rows = answer({"instances": [1]}, **arrays)["predictions"]
    if outputs == 1:
        assert by_rows == by_columns
    else:
        assert by_rows == [{name: by_columns[name][row] for name in arrays} for row in range(rows)]
        again = read({"instances": by_rows}).inputs
        assert lists(again) == lists(read({"inputs": by_columns}).inputs) == lists(arrays)


SIGNATURE = ModelSignature(
    (TensorSpec("signal", "float32", (None, 5)), TensorSpec("sensor", "int32", (None, 2, 2))),
    (TensorSpec("y", "float32", (None, 2)),),
)


def survives(sent: Message) -> None:
    """Read and check a message that may be anything, and only ever be refused in the two ways."""
    try:
        SIGNATURE.validate(SIGNATURE.named(tf_serving.read(sent).inputs))
    except (MalformedRequestError, InvalidInputError) as error:
        assert "Expected" in str(error)  # noqa: PT017 - reading it is right too
        assert "Received" in str(error)  # noqa: PT017


_WHOLE = [orjson.dumps({"signature_name": "serving_default", "instances": ROWS}), orjson.dumps({"inputs": SENSORS})]
_EDIT = st.tuples(st.sampled_from(["set", "insert", "delete", "truncate"]), st.integers(0, 200), st.binary(max_size=4))


@law
@given(st.sampled_from(_WHOLE), st.lists(_EDIT, max_size=4))
def test_a_damaged_body_is_read_or_refused(whole: bytes, edits: list[tuple[str, int, bytes]]) -> None:
    body = bytearray(whole)
    for kind, at, noise in edits:
        where = at % (len(body) + 1)
        match kind:
            case "set":
                body[where : where + len(noise)] = noise
            case "insert":
                body[where:where] = noise
            case "delete":
                del body[where : where + len(noise)]
            case _:
                del body[where:]
    survives(message(bytes(body)))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["signal", "sensor", "b64"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@law
@given(
    st.dictionaries(st.sampled_from(["instances", "inputs"]), _JSON, min_size=1, max_size=2),
    st.sampled_from([{}, {"signature_name": "serving_default"}]) | st.fixed_dictionaries({"signature_name": _JSON}),
)
def test_whatever_json_says_it_is_read_or_refused(document: Any, more: Any) -> None:
    survives(message({**more, **document}))


# What the service says of its models


def test_the_status_of_versions_is_what_tensorflow_serving_says() -> None:
    assert tf_serving.model_status([(123, "AVAILABLE", ""), (124, "END", "its samples differ")]) == {
        "model_version_status": [
            {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}},
            {
                "version": "124",
                "state": "END",
                "status": {"error_code": "UNKNOWN", "error_message": "its samples differ"},
            },
        ]
    }


def test_the_metadata_of_a_model_are_what_tensorflow_serving_says(golden_artifacts: Path) -> None:
    manifest = replace(read_manifest(golden_artifacts / "digits_rnn" / "1"), signature=SIGNATURE)
    document = tf_serving.model_metadata("digits", 12, manifest)
    assert document["model_spec"] == {"name": "digits", "signature_name": "", "version": "12"}
    signatures = document["metadata"]["signature_def"]["signature_def"]
    assert list(signatures) == ["serving_default"]
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert signatures["serving_default"]["inputs"]["sensor"] == {
        "dtype": "DT_INT32",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}, {"size": "2", "name": ""}],
            "unknown_rank": False,
        },
        "name": "sensor:0",
    }
    assert signatures["serving_default"]["outputs"].keys() == {"y"}


def test_tensorflow_itself_reads_the_signature(golden_artifacts: Path) -> None:
    """Every dtype and size, through the message that TensorFlow Serving prints as JSON."""
    framework = pytest.importorskip("tensorflow", reason="the lane of the serving install has no TensorFlow")
    from google.protobuf import json_format
    from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

    specs = tuple(TensorSpec(dtype, dtype, (None, 2, 3)) for dtype in tf_serving._DTYPES)
    manifest = replace(read_manifest(golden_artifacts / "digits_rnn" / "1"), signature=ModelSignature(specs, specs))
    document = tf_serving.model_metadata("digits", 1, manifest)
    (signature,) = document["metadata"]["signature_def"]["signature_def"].values()
    parsed = json_format.ParseDict(signature, SignatureDef())
    for dtype in tf_serving._DTYPES:
        for found in (parsed.inputs[dtype], parsed.outputs[dtype]):
            assert framework.dtypes.as_dtype(found.dtype) == framework.dtypes.as_dtype(dtype)
            assert [each.size for each in found.tensor_shape.dim] == [-1, 2, 3]
