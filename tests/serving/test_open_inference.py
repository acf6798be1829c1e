"""The Open Inference Protocol as its text has it, and as tritonclient, a client that others wrote, speaks it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from bln_serve.serving import open_inference, open_inference_metadata
from bln_serve.serving.binary_tensors import DATATYPES, datatype_of
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest
from bln_serve.signature import ModelSignature, TensorSpec

ONE = ModelSignature((TensorSpec("x", "float32", (None, 2)),), (TensorSpec("y", "float32", (None, 2)),))
TWO = ModelSignature(
    (TensorSpec("a", "float32", (None, 2)), TensorSpec("b", "int64", (None,))),
    (TensorSpec("y", "float32", (None, 2)), TensorSpec("z", "int64", (None,))),
)
X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}
BINARY_X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
X_BYTES = np.array([1, 2.5], "<f4").tobytes()


def message(document: Any, tail: bytes = b"", length: str | None = None) -> Message:
    """Write a message, with the header where bytes follow the JSON."""
    header = document if isinstance(document, bytes) else orjson.dumps(document)
    headers = {"content-type": "application/octet-stream"}
    if tail or length is not None:
        headers["inference-header-content-length"] = str(len(header)) if length is None else length
    return Message(header + tail, headers, {})


def read(document: Any, tail: bytes = b"", signature: ModelSignature = ONE) -> PredictRequest:
    return open_inference.read(message(document, tail), signature)


def prediction(**outputs: np.ndarray) -> Prediction:
    return Prediction(outputs, "digits", 3, "MMMM", "25x40,7")


Y, Z = np.array([[0.5, -2.0], [0.1, 1e30]], np.float32), np.array([7, 2**62])
ANSWER = prediction(y=Y, z=Z)


def arrays_of(request: PredictRequest) -> Mapping[str, np.ndarray]:
    assert isinstance(request.inputs, dict)
    return request.inputs


# Requests


@pytest.mark.parametrize(
    ("document", "tail"),
    [
        ({"inputs": [X]}, b""),
        ({"inputs": [{**X, "data": [[1, 2.5]]}]}, b""),
        ({"inputs": [BINARY_X]}, X_BYTES),
    ],
)
def test_an_input_is_the_same_flat_nested_and_binary(document: Any, tail: bytes) -> None:
    request = read(document, tail)
    assert request.mini_batch_rows is None
    (array,) = arrays_of(request).values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1, 2.5]])


def test_inputs_in_binary_follow_one_another_between_those_in_json() -> None:
    inputs = [
        {"name": "a", "shape": [3], "datatype": "BOOL", "parameters": {"binary_data_size": 3}},
        {"name": "b", "shape": [2], "datatype": "INT8", "data": [5, -6]},
        {"name": "c", "shape": [0, 2], "datatype": "FP64", "parameters": {"binary_data_size": 0}},
        {"name": "d", "shape": [2], "datatype": "UINT16", "parameters": {"binary_data_size": 4}},
    ]
    found = arrays_of(read({"inputs": inputs}, b"\x01\x00\x01\x05\x00\x06\x00"))
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [True, False, True],
        "b": [5, -6],
        "c": [],
        "d": [5, 6],
    }


def test_bytes_are_not_copied() -> None:
    sent = message({"inputs": [BINARY_X]}, X_BYTES)
    (array,) = arrays_of(open_inference.read(sent, ONE)).values()
    assert np.shares_memory(array, np.frombuffer(sent.body, np.uint8))


def test_a_body_without_json_is_the_only_input_and_is_answered_in_binary() -> None:
    request = open_inference.read(message(b"", X_BYTES * 3, length="0"), ONE)
    np.testing.assert_array_equal(arrays_of(request)["x"], [[1, 2.5]] * 3)
    document, tail = parts(request.write(ANSWER))
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert tail == Y.tobytes()


@pytest.mark.parametrize("rows", [0, 1, 25])
def test_the_rows_of_a_mini_batch_are_a_parameter_of_ours(rows: int) -> None:
    assert read({"inputs": [X], "parameters": {"bln_mini_batch_rows": rows}}).mini_batch_rows == rows


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"content_type": "np", "headers": {"a": "b"}, "my_own": 42, "triton_x": True}},
        {"parameters": {"sequence_id": 0, "sequence_start": False, "priority": 0, "timeout": 0}},
        {"parameters": {"sequence_id": "", "binary_data_output": None, "bln_mini_batch_rows": None}},
        {"id": None, "parameters": None, "outputs": None},
        {"outputs": []},
        {"model_name": "digits", "model_version": "1"},
        {"outputs": [{"name": "y", "parameters": {"classification": 0, "my_own": 1}}]},
        {"inputs": [{**X, "parameters": {"content_type": "np"}}]},
        {"inputs": [{**X, "parameters": None}]},
    ],
)
def test_what_others_say_beside_is_taken(more: Any) -> None:
    request = read({"inputs": [X], **more})
    np.testing.assert_array_equal(arrays_of(request)["x"], [[1, 2.5]])
    assert request.mini_batch_rows is None
    assert orjson.loads(request.write(ANSWER).body) == orjson.loads(read({"inputs": [X]}).write(ANSWER).body)


OBJECT = "to be a JSON object with no other keys than"


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (b"", "Expected JSON in the first 0 of 0 bytes"),
        (b"{", "Expected JSON in the first 1 of 1 bytes"),
        (b"\xff\xfe{}", "Expected JSON"),
        (b'{"inputs": [NaN]}', "Expected JSON .* JSON has no NaN and no Infinity"),
        (b'{"inputs": [1e999]}', "a number that 64 bits cannot hold"),
        (b'{"inputs": [' + orjson.dumps(X) + b"]} trailing", "unexpected content.*Inference-Header-Content-Length"),
        (b"[" * 100_000, "Expected JSON"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "depth limit"),
        (b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}", f"each of inputs {OBJECT} .* Received: .a list."),
        (b'{"id": ' + b"[" * 1000 + b"]" * 1000 + b"}", "Expected id to be text. Received: .a list."),
        (b"[]", f"the request {OBJECT} id, inputs, model_name, .* Received: ...$"),
        (b"null", "Received: null"),
        (b"3", "Received: 3"),
        ({}, "Expected inputs to be a list. Received: null"),
        ({"inputs": {"x": [1]}}, "Expected inputs to be a list. Received: an object"),
        ({"instances": [[1, 2]]}, "Received: .'instances'."),
        ({"inputs": [X], "output": [], "parameter": {}}, "Received: .'output', 'parameter'."),
        ({"inputs": [X], "id": 5}, "Expected id to be text. Received: 5"),
        ({"inputs": [3]}, f"each of inputs {OBJECT} data, datatype, name, parameters, shape. Received: 3"),
        ({"inputs": [{**X, "dtype": "FP32"}]}, "Received: .'dtype'."),
        ({"inputs": [{}]}, "each of inputs to have a name of its own. Received: null"),
        ({"inputs": [{**X, "name": 3}]}, "Received: 3"),
        ({"inputs": [X, X]}, "each of inputs to have a name of its own. Received: 'x' twice"),
        ({"inputs": [{**X, "datatype": "BYTES"}]}, "Received: 'BYTES'. No model here takes text or bytes"),
        ({"inputs": [{**X, "shape": [2, 2]}]}, "one list of 4, .* Received: shape .2."),
        ({"inputs": [{**X, "parameters": [1]}]}, "parameters to be a JSON object. Received: .1."),
        ({"inputs": [{**X, "data": None}]}, "data or parameters.binary_data_size of input 'x'. Received: neither"),
        ({"inputs": [{**X, **BINARY_X}]}, "data or parameters.binary_data_size of input 'x'. Received: both"),
        ({"inputs": [BINARY_X]}, "8 bytes of input 'x' .* Inference-Header-Content-Length must name"),
        ({"inputs": [X], "parameters": 3}, "parameters to be a JSON object. Received: 3"),
        ({"inputs": [X], "parameters": {"bln_mini_batch_row": 2}}, "but bln_mini_batch_rows, .* 'bln_mini_batch_row'"),
        ({"inputs": [X], "parameters": {"bln_": 2}}, "Received: 'bln_' of the request"),
        ({"inputs": [{**X, "parameters": {"bln_mini_batch_rows": 2}}]}, "'bln_mini_batch_rows' of an input or output"),
        ({"inputs": [X], "parameters": {"bln_mini_batch_rows": -1}}, "a whole number from 0 .* Received: -1"),
        ({"inputs": [X], "parameters": {"bln_mini_batch_rows": 2.0}}, "Received: 2.0"),
        ({"inputs": [X], "parameters": {"bln_mini_batch_rows": True}}, "Received: a boolean"),
        ({"inputs": [X], "parameters": {"bln_mini_batch_rows": "2"}}, "Received: '2'"),
        ({"inputs": [X], "parameters": {"binary_data_output": 1}}, "binary_data_output to be true or false. .* 1"),
        ({"inputs": [X], "parameters": {"sequence_id": 5}}, "no parameter sequence_id. Received: 5. No model here rem"),
        ({"inputs": [X], "parameters": {"sequence_id": "a"}}, "no parameter sequence_id. Received: 'a'"),
        ({"inputs": [X], "parameters": {"sequence_start": True}}, "no parameter sequence_start"),
        ({"inputs": [X], "parameters": {"sequence_end": True}}, "no parameter sequence_end"),
        ({"inputs": [X], "parameters": {"priority": 1}}, "no parameter priority. .* answered in their order"),
        ({"inputs": [X], "parameters": {"timeout": 5000}}, "no parameter timeout. .* header bln-timeout-ms"),
        (
            {"inputs": [{**X, "parameters": {"shared_memory_region": "r"}}]},
            "shared_memory_region. .* No memory is shared",
        ),
        ({"inputs": [{**X, "parameters": {"shared_memory_byte_size": 8}}]}, "no parameter shared_memory_byte_size"),
        ({"inputs": [X], "outputs": "y"}, "Expected outputs to be a list. Received: 'y'"),
        ({"inputs": [X], "outputs": ["y"]}, f"each of outputs {OBJECT} name, parameters. Received: 'y'"),
        ({"inputs": [X], "outputs": [{"name": "y", "shape": [1]}]}, "Received: .'shape'."),
        ({"inputs": [X], "outputs": [{"name": "q"}]}, "to name outputs of the model: y. Received: 'q'"),
        ({"inputs": [X], "outputs": [{"name": "y"}] * 2}, "each of outputs to have a name of its own. .* 'y' twice"),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
            "binary_data to be true or",
        ),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"classification": 2}}]},
            "classification. .* largest",
        ),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "No memory is shared",
        ),
        ({"inputs": [X], "outputs": [{"name": "y", "parameters": {"bln_x": 1}}]}, "'bln_x' of an input or output"),
    ],
)
def test_a_message_that_is_wrong_is_refused_with_a_sentence(document: Any, sentence: str) -> None:
    with pytest.raises(MalformedRequestError, match=sentence):
        read(document)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (message({"inputs": [BINARY_X]}, X_BYTES + b"\0"), "Expected a body of .* bytes, .* behind it. Received: "),
        (message({"inputs": [X]}, b"\0"), "Expected a body of "),
        (message({"inputs": [BINARY_X]}, X_BYTES[:-1]), "8 bytes of input 'x' .* Received: 7"),
        (message({"inputs": [BINARY_X] * 2}, X_BYTES), "'x' twice"),
        (message({"inputs": [{**BINARY_X, "datatype": "FP64"}]}, X_BYTES), "to be 16, FP64 .* Received: 8"),
        (message({"inputs": [BINARY_X]}, X_BYTES, length="5"), "Expected JSON in the first 5 of "),
        (message({"inputs": [BINARY_X]}, X_BYTES, length="9999"), "Inference-Header-Content-Length to be .* '9999'"),
        (message({"inputs": [BINARY_X]}, X_BYTES, length="-3"), "Received: '-3'"),
        (message(b"", X_BYTES[:-1], length="0"), "nothing but rows of input 'x', .* Received: 7 bytes"),
    ],
)
def test_bytes_that_do_not_add_up_are_refused(sent: Message, sentence: str) -> None:
    with pytest.raises(MalformedRequestError, match=sentence):
        open_inference.read(sent, ONE)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([[1, 2], [3]], "lists of 1 and of 2 items"),
        ([1, "2"], "to be FP32. Received: '2' at index 1"),
        ([1, True], "to be FP32. Received: a boolean at index 1"),
        ([1, 1e300], "to be FP32. Received: 1e.300 at index 1"),
    ],
)
def test_data_that_are_no_numbers_of_their_datatype_are_refused(data: Any, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        read({"inputs": [{**X, "data": data}]})


def test_how_much_is_parsed_slowly_is_the_json() -> None:
    assert open_inference.slow_bytes(message(b"{}", X_BYTES)) == 2
    assert open_inference.slow_bytes(message(b"{} ")) == 3
    assert open_inference.slow_bytes(message(b"{}", X_BYTES, length="-1")) == 0


# Answers


def parts(encoded: Encoded) -> tuple[dict[str, Any], bytes]:
    length = int(encoded.headers.get("inference-header-content-length", len(encoded.body)))
    return orjson.loads(encoded.body[:length]), encoded.body[length:]


def test_an_answer_in_json() -> None:
    encoded = read({"inputs": [X], "id": "a \u00fc"}, signature=TWO).write(ANSWER)
    assert (encoded.media_type, encoded.headers) == ("application/json", {})
    assert orjson.loads(encoded.body) == {
        "model_name": "digits",
        "model_version": "3",
        "id": "a \u00fc",
        "parameters": {"bln_statistics": "MMMM", "bln_mini_batches": "25x40,7"},
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [0.5, -2.0, 0.1, 1e30]},
            {"name": "z", "datatype": "INT64", "shape": [2], "data": [7, 2**62]},
        ],
    }


def test_what_is_null_is_left_out() -> None:
    document, _ = parts(read({"inputs": [X]}).write(Prediction({"y": Y}, "digits", 3, None, None)))
    assert document.keys() == {"model_name", "model_version", "outputs"}


@pytest.mark.parametrize(
    ("more", "binary"),
    [
        ({}, {"y": False, "z": False}),
        ({"parameters": {"binary_data_output": True}}, {"y": True, "z": True}),
        ({"outputs": [{"name": "z"}]}, {"z": False}),
        ({"outputs": [{"name": "z"}, {"name": "y", "parameters": {"binary_data": True}}]}, {"z": False, "y": True}),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}],
            },
            {"z": True, "y": False},
        ),
    ],
)
def test_a_request_chooses_the_outputs_their_order_and_their_form(more: Any, binary: dict[str, bool]) -> None:
    encoded = read({"inputs": [X], **more}, signature=TWO).write(ANSWER)
    document, tail = parts(encoded)
    assert [output["name"] for output in document["outputs"]] == list(binary)
    assert encoded.media_type == ("application/octet-stream" if any(binary.values()) else "application/json")
    for output in document["outputs"]:
        array = ANSWER.outputs[output["name"]]
        if binary[output["name"]]:
            size = output["parameters"]["binary_data_size"]
            assert "data" not in output
            assert tail[:size] == array.tobytes()
            tail = tail[size:]
        else:
            assert output["data"] == pytest.approx(array.ravel().tolist())
    assert tail == b""


def test_an_answer_that_json_cannot_say_is_sent_in_binary_alone() -> None:
    wrong = prediction(y=np.array([[np.nan, np.inf]], np.float32))
    with pytest.raises(NonFiniteAnswerError, match="output 'y'"):
        read({"inputs": [X]}).write(wrong)
    _, tail = parts(read({"inputs": [X], "parameters": {"binary_data_output": True}}).write(wrong))
    np.testing.assert_array_equal(np.frombuffer(tail, "<f4"), [np.nan, np.inf])


def test_columns_first_in_memory_is_rows_first_in_an_answer() -> None:
    fortran = prediction(y=np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))
    document, _ = parts(read({"inputs": [X]}).write(fortran))
    assert document["outputs"][0]["data"] == [0, 1, 2, 3, 4, 5]
    _, tail = parts(read({"inputs": [X], "parameters": {"binary_data_output": True}}).write(fortran))
    assert np.frombuffer(tail, "<f4").tolist() == [0, 1, 2, 3, 4, 5]


# Laws


def arrays(*, finite: bool) -> st.SearchStrategy[np.ndarray]:
    def of(dtype: np.dtype[Any]) -> st.SearchStrategy[np.ndarray]:
        elements = {"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else None
        return hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4), elements=elements)

    return st.sampled_from(list(DATATYPES.values())).flatmap(of)


@law
@given(st.dictionaries(st.text(min_size=1, max_size=3), arrays(finite=True), min_size=1, max_size=3), st.data())
def test_what_is_answered_can_be_asked_again(outputs: dict[str, np.ndarray], data: st.DataObject) -> None:
    """Arrays -> answer -> request -> the same arrays: both forms, mixed, in any order."""
    specs = tuple(TensorSpec(name, array.dtype.name, (None, *array.shape[1:])) for name, array in outputs.items())
    binary = {name: data.draw(st.booleans()) for name in data.draw(st.permutations(list(outputs)))}
    wanted = [{"name": name, "parameters": {"binary_data": form}} for name, form in binary.items()]
    signature = ModelSignature(ONE.inputs, specs)
    document, tail = parts(read({"inputs": [X], "outputs": wanted}, signature=signature).write(prediction(**outputs)))
    again = arrays_of(read({"inputs": document["outputs"]}, tail))
    assert list(again) == list(binary)
    for name, array in again.items():
        assert array.dtype == outputs[name].dtype
        np.testing.assert_array_equal(array, outputs[name])


def survives(sent: Message, signature: ModelSignature) -> None:
    """Read and check a message that may be anything, and only ever be refused in the two ways."""
    try:
        request = open_inference.read(sent, signature)
        checked = signature.validate(arrays_of(request))
    except (MalformedRequestError, InvalidInputError) as error:
        assert "Expected" in str(error)  # noqa: PT017 - reading it is right too
        assert "Received" in str(error)  # noqa: PT017
        return
    for array in checked.values():
        assert np.isfinite(array).all()


_MIXED = {
    "id": "1",
    "parameters": {"binary_data_output": True, "bln_mini_batch_rows": 2},
    "inputs": [
        {"name": "a", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
        {"name": "b", "shape": [1], "datatype": "INT64", "data": [7]},
    ],
    "outputs": [{"name": "z", "parameters": {"binary_data": False}}],
}
_WHOLE = message(_MIXED, X_BYTES)
_LENGTH = _WHOLE.headers["inference-header-content-length"]
_EDIT = st.tuples(st.sampled_from(["set", "insert", "delete", "truncate"]), st.integers(0, 400), st.binary(max_size=4))


@law
@given(st.lists(_EDIT, min_size=1, max_size=4), st.sampled_from([None, _LENGTH, _LENGTH, "0", "1", "x"]))
def test_a_damaged_message_is_read_or_refused(edits: list[tuple[str, int, bytes]], length: str | None) -> None:
    body = bytearray(_WHOLE.body)
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
    headers = {} if length is None else {"inference-header-content-length": length}
    survives(Message(bytes(body), headers, {}), TWO)


@law
@given(st.integers(0, len(_WHOLE.body)), st.integers(0, 400))
def test_a_message_cut_short_anywhere_is_refused(end: int, length: int) -> None:
    headers = {"inference-header-content-length": str(length)}
    survives(Message(_WHOLE.body[:end], headers, {}), TWO)
    if end < len(_WHOLE.body):
        with pytest.raises(MalformedRequestError):
            open_inference.read(Message(_WHOLE.body[:end], _WHOLE.headers, {}), TWO)


_LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "FP32", "INT8", "BOOL", "y", "8"])
)
_JSON = st.recursive(
    _LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "binary_data_size", "bln_x"]), inner
        )
    ),
    max_leaves=10,
)
_TENSOR = st.fixed_dictionaries(
    {"name": st.just("x"), "shape": st.just([1, 2]) | _JSON, "datatype": st.sampled_from(list(DATATYPES)) | _JSON},
    optional={
        "data": st.lists(_LEAF, min_size=2, max_size=2) | _JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(0, 20) | _JSON}) | _JSON,
    },
)


@law
@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(_TENSOR, min_size=1, max_size=2) | _JSON},
        optional={"id": _JSON, "parameters": _JSON, "outputs": _JSON | st.just([{"name": "y"}])},
    ),
    st.binary(max_size=20),
)
def test_whatever_json_says_it_is_read_or_refused(document: Any, tail: bytes) -> None:
    survives(message(document, tail), ONE)


# tritonclient, without its network


def _tritonclient(module: str) -> Any:
    """Load a module of tritonclient.http by its path: the package around it needs gevent."""
    pytest.importorskip("tritonclient.utils", reason="tritonclient is of the dev extra")
    package = importlib.util.find_spec("tritonclient")
    assert package
    path = Path(package.submodule_search_locations[0]) / "http" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"tritonclient_http{module}", path)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def triton() -> SimpleNamespace:
    return SimpleNamespace(
        infer_input=_tritonclient("_infer_input").InferInput,
        wanted=_tritonclient("_requested_output").InferRequestedOutput,
        result=_tritonclient("_infer_result").InferResult,
        request=_tritonclient("_utils")._get_inference_request,
    )


NO_WISHES = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "priority": 0, "timeout": None}


def sent_by(triton: SimpleNamespace, inputs: Any, outputs: Any = None, request_id: str = "", **wishes: Any) -> Message:
    wishes = {**NO_WISHES, "custom_parameters": None, **wishes}
    body, length = triton.request(inputs=inputs, request_id=request_id, outputs=outputs, **wishes)
    return Message(body, {} if length is None else {"inference-header-content-length": str(length)}, {})


def received_by(triton: SimpleNamespace, encoded: Encoded) -> Any:
    length = encoded.headers.get("inference-header-content-length")
    return triton.result.from_response_body(encoded.body, header_length=None if length is None else int(length))


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_and_we_understand_each_other(triton: SimpleNamespace, datatype: str, binary: bool) -> None:
    array = np.array([[[1, 0, 1]], [[0, 1, 1]]]).astype(DATATYPES[datatype])
    asked = triton.infer_input("x", list(array.shape), datatype).set_data_from_numpy(array, binary_data=binary)
    signature = ModelSignature(ONE.inputs, (TensorSpec("y", array.dtype.name, (None, 1, 3)),))
    for outputs in (None, [triton.wanted("y", binary_data=True)], [triton.wanted("y", binary_data=False)]):
        request = open_inference.read(sent_by(triton, [asked], outputs, request_id="7"), signature)
        np.testing.assert_array_equal(arrays_of(request)["x"], array)
        result = received_by(triton, request.write(prediction(y=array)))
        assert result.as_numpy("y").dtype == array.dtype
        np.testing.assert_array_equal(result.as_numpy("y"), array)
        assert result.get_response()["id"] == "7"
        assert result.get_response()["parameters"]["bln_mini_batches"] == "25x40,7"


def test_tritons_client_names_our_parameter_and_several_tensors(triton: SimpleNamespace) -> None:
    a, b = np.array([[0.5, 1.5]], np.float32), np.array([7])
    inputs = [
        triton.infer_input("a", [1, 2], "FP32").set_data_from_numpy(a),
        triton.infer_input("b", [1], "INT64").set_data_from_numpy(b, binary_data=False),
    ]
    outputs = [triton.wanted("z"), triton.wanted("y", binary_data=False)]
    request = open_inference.read(sent_by(triton, inputs, outputs, custom_parameters={"bln_mini_batch_rows": 0}), TWO)
    assert request.mini_batch_rows == 0
    assert {name: array.tolist() for name, array in TWO.validate(arrays_of(request)).items()} == {
        "a": [[0.5, 1.5]],
        "b": [7],
    }
    result = received_by(triton, request.write(ANSWER))
    np.testing.assert_array_equal(result.as_numpy("y"), Y)
    np.testing.assert_array_equal(result.as_numpy("z"), Z)


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"sequence_id": 5, "sequence_start": True}, "no parameter sequence_id"),
        ({"priority": 2}, "no parameter priority"),
        ({"timeout": 1000}, "no parameter timeout"),
    ],
)
def test_what_tritons_client_wishes_and_we_do_not_do_is_refused(
    triton: SimpleNamespace, wishes: dict[str, Any], sentence: str
) -> None:
    asked = triton.infer_input("x", [1, 2], "FP32").set_data_from_numpy(np.ones((1, 2), np.float32))
    with pytest.raises(MalformedRequestError, match=sentence):
        open_inference.read(sent_by(triton, [asked], **wishes), ONE)
    with pytest.raises(MalformedRequestError, match="no parameter classification"):
        open_inference.read(sent_by(triton, [asked], [triton.wanted("y", class_count=2)]), ONE)
    asked.set_shared_memory("region", 8)
    with pytest.raises(MalformedRequestError, match="no parameter shared_memory_region"):
        open_inference.read(sent_by(triton, [asked]), ONE)


# What the service says of itself


def test_the_service_says_that_it_reads_binary_tensors() -> None:
    assert open_inference_metadata.server_metadata("1.2.3") == {
        "name": "bln_serve",
        "version": "1.2.3",
        "extensions": ["binary_tensor_data"],
    }


def test_a_model_says_what_may_be_sent(golden_artifacts: Path) -> None:
    manifest = replace(read_manifest(golden_artifacts / "digits_rnn" / "1"), signature=TWO)
    document = open_inference_metadata.model_metadata(
        "digits", [1, 12], manifest, {"bln_max_run_rows": 512, "bln_nothing": None}
    )
    parameters = document.pop("parameters")
    assert document == {
        "name": "digits",
        "versions": ["1", "12"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "b", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "z", "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert parameters == {
        "bln_statistics": "MMMM",
        "bln_row_coupling": "mini-batch",
        "bln_row_coupling_reason": manifest.row_coupling_reason,
        "bln_mini_batch_rows": manifest.mini_batch_rows,
        "bln_min_mini_batch_rows": 2,
        "bln_max_run_rows": 512,
    }
    assert all(isinstance(value, str | int) for value in orjson.loads(orjson.dumps(parameters)).values())


@pytest.mark.parametrize("name", ["digits_cnn", "tiny_two_inputs", "tiny_pppp"])
def test_what_a_model_says_is_what_its_own_signature_takes(golden_artifacts: Path, name: str) -> None:
    manifest = read_manifest(golden_artifacts / name / "1")
    document = open_inference_metadata.model_metadata(name, [1], manifest, {})
    assert [tensor["name"] for tensor in document["inputs"]] == [spec.name for spec in manifest.signature.inputs]
    inputs = []
    for tensor in document["inputs"]:
        shape = [2 if size == -1 else size for size in tensor["shape"]]
        inputs.append({**tensor, "shape": shape, "data": np.ones(shape, int).reshape(-1).tolist()})
    checked = manifest.signature.validate(arrays_of(read({"inputs": inputs}, signature=manifest.signature)))
    assert {datatype_of(array.dtype) for array in checked.values()} <= DATATYPES.keys()
