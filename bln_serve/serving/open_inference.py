"""Requests and answers in the Open Inference Protocol, version 2, which KServe, Triton and MLServer speak over HTTP.

    request   {"id": TEXT, "parameters": {...}, "inputs": [INPUT, ...], "outputs": [WANTED, ...]}
    INPUT     {"name": N, "shape": [S, ...], "datatype": "FP32", "parameters": {...}, "data": [NUMBER, ...]}
    WANTED    {"name": N, "parameters": {...}}; where `outputs` is left out, every output is wanted
    answer    {"model_name": M, "model_version": "1", "id": TEXT, "parameters": {...}, "outputs": [OUTPUT, ...]}
    OUTPUT    {"name": N, "datatype": "FP32", "shape": [S, ...], "data": [NUMBER, ...]}

Elements may stand as bytes behind the JSON instead (`binary_tensors`): an input's with its parameter binary_data_size,
an output's where the request has binary_data_output or the wanted output binary_data. Parameters of our own begin with
bln_: bln_mini_batch_rows in a request, bln_statistics and bln_mini_batches in an answer. Others' are ignored, as the
protocol allows, except those that ask for what would not be done.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bln_serve.errors import MalformedRequestError
from bln_serve.serving import binary_tensors, json_values
from bln_serve.serving.json_values import shown
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest
from bln_serve.signature import ModelSignature

_ROWS = "bln_mini_batch_rows"
_EXPECTED_ROWS = f"{_ROWS} to be a whole number from 0 (one mini-batch of all rows), or left out"
# The URL decides which model is asked; KServe's client repeats its name.
_KEYS = ("id", "inputs", "model_name", "model_version", "outputs", "parameters")
_INPUT_KEYS = ("data", "datatype", "name", "parameters", "shape")
_OUTPUT_KEYS = ("name", "parameters")
_AFTER_JSON = " Inference-Header-Content-Length must name the length of the JSON where bytes of tensors follow it."
_REMEMBERED, _REMEMBERED_BYTES = 256, 1024

_NO_SEQUENCE = "No model here remembers earlier requests"
_NO_SHARED_MEMORY = "No memory is shared with clients: data travel in the bodies"
_NOT_DONE = {
    "sequence_id": _NO_SEQUENCE,
    "sequence_start": _NO_SEQUENCE,
    "sequence_end": _NO_SEQUENCE,
    "priority": "Requests are answered in their order",
    "timeout": "Send the header bln-timeout-ms instead",
    "classification": "Take the largest entries of the output itself",
    "shared_memory_region": _NO_SHARED_MEMORY,
    "shared_memory_byte_size": _NO_SHARED_MEMORY,
    "shared_memory_offset": _NO_SHARED_MEMORY,
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input: what the JSON says of it, and its elements or how many bytes behind the JSON they are."""

    head: binary_tensors.Head
    array: NDArray[Any] | None
    size: int | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the JSON of a request says. Compared by nothing: it may be read once and answered often."""

    request_id: str | None
    mini_batch_rows: int | None
    tensors: tuple[_Tensor, ...]
    binary: Mapping[str, bool]  # the outputs to answer, in order, and whether as bytes
    heads: dict[tuple[Any, ...], bytes] = field(default_factory=dict)  # JSON that was answered with bytes behind it


_remembered: dict[bytes, tuple[ModelSignature, _Asked]] = {}
"""What JSON of a few bytes was found to say. Clients that send tensors as bytes send it again and again."""


def read(message: Message, signature: ModelSignature) -> PredictRequest:
    """Read a request. Bytes of tensors are not copied.

    Args:
        message: with inference-header-content-length among its headers where tensors stand behind the JSON.
        signature: of the model, among whose outputs the request may choose.

    Raises:
        MalformedRequestError: the message is none of this protocol, contradicts itself, or asks for what is not done.
        InvalidInputError: the data of an input are no rectangular array of its datatype.
    """
    body = message.body
    length = binary_tensors.header_length(message.headers, body)
    if length == 0 and binary_tensors.HEADER_LENGTH in message.headers:
        asked = _Asked(None, None, (), dict.fromkeys([spec.name for spec in signature.outputs], True))
        inputs = binary_tensors.only_input(signature, body)
    else:
        asked = _read_json(body, length, signature)
        inputs = _inputs(asked.tensors, body, length)
    text = not all(asked.binary.values())
    return PredictRequest(inputs, partial(_write, asked), asked.mini_batch_rows, answers_text=text)


def slow_bytes(message: Message) -> int:
    """Return how many bytes are parsed slowly: those of the JSON."""
    try:
        return binary_tensors.header_length(message.headers, message.body)
    except MalformedRequestError:  # which is for `read` to say
        return 0


def _read_json(body: bytes, length: int, signature: ModelSignature) -> _Asked:
    """Read the JSON, or remember what it says."""
    may_be_known = length <= _REMEMBERED_BYTES and length < len(body)
    if may_be_known and (known := _remembered.get(body[:length])) and known[0] is signature:
        return known[1]
    text = body[:length]
    expected = f"JSON in the first {length} of {len(body)} bytes"
    asked = json_values.read(text, partial(_asked, text, signature), expected, _AFTER_JSON)
    # An id makes each request's JSON another one.
    if may_be_known and asked.request_id is None and all(tensor.size is not None for tensor in asked.tensors):
        if len(_remembered) >= _REMEMBERED:
            _remembered.clear()
        _remembered[text] = signature, asked
    return asked


def _asked(text: bytes, signature: ModelSignature, document: Any) -> _Asked:
    """Return what a document says."""
    named = json_values.members("the request", document, _KEYS)
    parameters = _parameters(named, _ROWS)
    request_id, rows = named.get("id"), parameters.get(_ROWS)
    _checked(request_id, request_id is None or type(request_id) is str, "id to be text")
    _checked(rows, rows is None or (type(rows) is int and rows >= 0), _EXPECTED_ROWS)
    binary = _outputs(named.get("outputs"), _flag(parameters, "binary_data_output", default=False), signature)
    tensors = _checked(named.get("inputs"), json_values.is_list(named.get("inputs")), "inputs to be a list")
    # Each list that the protocol knows counted, none is left that could be nested in one.
    lists = np.count_nonzero(np.frombuffer(text, np.uint8) == ord("["))
    flat = lists == 1 + 2 * len(tensors) + ("outputs" in named)
    inputs: dict[str, _Tensor] = {}
    for tensor in tensors:
        members = json_values.members("each of inputs", tensor, _INPUT_KEYS)
        name = _name("inputs", members, inputs)
        inputs[name] = _tensor(name, members, flat=flat)
    return _Asked(request_id, rows, tuple(inputs.values()), binary)


def _tensor(name: str, members: Mapping[str, Any], *, flat: bool) -> _Tensor:
    head = binary_tensors.head(name, members.get("datatype"), members.get("shape"))
    size, data = _parameters(members).get("binary_data_size"), members.get("data")
    if (size is None) == (data is None):
        expected = f"either data or parameters.binary_data_size of input {shown(name)}"
        raise MalformedRequestError(f"Expected {expected}. Received: {'neither' if data is None else 'both'}.")
    array = binary_tensors.from_json(head, data, flat=flat) if size is None else None
    return _Tensor(head, array, None if size is None else binary_tensors.checked_size(head, size))


def _inputs(tensors: Sequence[_Tensor], body: bytes, start: int) -> dict[str, NDArray[Any]]:
    """Return the inputs, of which those as bytes follow one another from `start` to the body's end."""
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.array is not None:
            inputs[tensor.head.name] = tensor.array
        else:
            inputs[tensor.head.name] = binary_tensors.from_bytes(tensor.head, body, start)
            start += tensor.size or 0
    if start != len(body):
        raise MalformedRequestError(
            f"Expected a body of {start} bytes, the JSON and the tensors behind it. Received: {len(body)} bytes."
        )
    return inputs


def _outputs(wanted: Any, binary: bool, signature: ModelSignature) -> dict[str, bool]:
    """Return the names of the outputs to answer, in order, and whether as bytes."""
    names = [spec.name for spec in signature.outputs]
    if wanted is None:
        return dict.fromkeys(names, binary)
    chosen: dict[str, bool] = {}
    for output in _checked(wanted, json_values.is_list(wanted), "outputs to be a list"):
        members = json_values.members("each of outputs", output, _OUTPUT_KEYS)
        name = _name("outputs", members, chosen)
        if name not in names:
            raise MalformedRequestError(
                f"Expected outputs to name outputs of the model: {', '.join(names)}. Received: {shown(name)}."
            )
        chosen[name] = _flag(_parameters(members), "binary_data", default=binary)
    return chosen or dict.fromkeys(names, binary)


def _checked(value: Any, is_right: bool, expected: str) -> Any:
    if is_right:
        return value
    raise MalformedRequestError(f"Expected {expected}. Received: {shown(value)}.")


def _name(what: str, holder: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    name = holder.get("name")
    if type(name) is str and name not in others:
        return name
    received = f"{shown(name)} twice" if type(name) is str else shown(name)
    raise MalformedRequestError(f"Expected each of {what} to have a name of its own. Received: {received}.")


def _parameters(holder: Mapping[str, Any], own: str | None = None) -> Mapping[str, Any]:
    if (given := holder.get("parameters")) is None:
        return {}
    _checked(given, json_values.is_object(given), "parameters to be a JSON object")
    parameters = json_values.members("parameters", given, list(given.keys()))
    for name, value in parameters.items():
        # 0, "", false and null are Triton's words for not asking.
        if name in _NOT_DONE and value:
            raise MalformedRequestError(f"Expected no parameter {name}. Received: {shown(value)}. {_NOT_DONE[name]}.")
        if name.startswith("bln_") and name != own:
            of = "of the request" if own else "of an input or output"
            expected = f"no parameter that begins with bln_ but {_ROWS}, of the request"
            raise MalformedRequestError(f"Expected {expected}. Received: {shown(name)} {of}.")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    return default if value is None else bool(_checked(value, type(value) is bool, f"{name} to be true or false"))


def _write(asked: _Asked, prediction: Prediction) -> Encoded:
    """Write an answer.

    Raises:
        NonFiniteAnswerError: an output in JSON holds NaN or infinity.
    """
    tail = [binary_tensors.to_bytes(prediction.outputs[name]) for name, as_bytes in asked.binary.items() if as_bytes]
    if len(tail) < len(asked.binary) or asked.request_id is not None:
        header = orjson.dumps(_answer(asked, prediction), option=orjson.OPT_SERIALIZE_NUMPY)
        return binary_tensors.join(header, tail) if tail else Encoded(header, json_values.MEDIA_TYPE, {})
    # Of one version of a model, everything else in that JSON follows from how many rows there are.
    which = prediction.model, prediction.version, prediction.mini_batches, len(tail[0])
    if which not in asked.heads:
        if len(asked.heads) >= _REMEMBERED:
            asked.heads.clear()
        asked.heads[which] = orjson.dumps(_answer(asked, prediction))
    return binary_tensors.join(asked.heads[which], tail)


def _answer(asked: _Asked, prediction: Prediction) -> dict[str, Any]:
    outputs = list[dict[str, Any]]()
    for name, as_bytes in asked.binary.items():
        array = prediction.outputs[name]
        datatype = binary_tensors.datatype_of(array.dtype)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        if as_bytes:
            output["parameters"] = {"binary_data_size": array.nbytes}
        else:
            json_values.check_finite(name, array)
            output["data"] = array.ravel()
        outputs.append(output)
    document: dict[str, Any] = {"model_name": prediction.model, "model_version": str(prediction.version)}
    if asked.request_id is not None:
        document["id"] = asked.request_id
    if facts := known({"bln_statistics": prediction.statistics, "bln_mini_batches": prediction.mini_batches}):
        document["parameters"] = facts
    document["outputs"] = outputs
    return document


def known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the facts that are null."""
    return {name: value for name, value in facts.items() if value is not None}
