"""Requests and answers as JSON.

{"instances": [row, ...]}            rows of a single-input model
{"instances": [{NAME: row}, ...]}    rows of any model
{"inputs": {NAME: [row, ...]}}       or the rows themselves, for a single-input model
    "mini_batch_rows": R                 optional, in each

An answer is {"predictions": [row, ...]}, or {NAME: [row, ...]} of several outputs, beside what it was computed with.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError, MalformedRequestError, MiniBatchError
from bln_serve.serving import json_arrays, json_values
from bln_serve.serving.prediction import Encoded, Prediction, PredictRequest

MEDIA_TYPE = json_values.MEDIA_TYPE

_KEYS = ("instances", "inputs", "mini_batch_rows")


def read(body: bytes) -> PredictRequest:
    """Read a request's body.

    Raises:
        MalformedRequestError: it is not a JSON object with the right keys.
        InvalidInputError: an input is no rectangular array of numbers.
        MiniBatchError: `mini_batch_rows` is no whole number from 0.
    """
    return json_values.read(body, partial(_request, body))


def _request(body: bytes, document: Any) -> PredictRequest:
    if not json_values.is_object(document):
        received = json_values.kind(document)
        raise MalformedRequestError(f'Expected a JSON object, {{"instances": [...]}}. Received: {received}.')
    named = json_values.members("the request", document, _KEYS)
    return PredictRequest(rows(named, body), write, _mini_batch_rows(named))


def rows(named: Mapping[str, Any], body: bytes) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    """Return what a request holds as `instances` or as `inputs`.

    Args:
        named: the request's members, in whose other values there are no brackets, or which are refused.
        body: the request's text.

    Raises:
        MalformedRequestError: it holds both or neither, or an input twice.
        InvalidInputError: an input is no rectangular array of numbers.
    """
    if ("instances" in named) == ("inputs" in named):
        received = "both" if "inputs" in named else "neither"
        raise MalformedRequestError(f"Expected either 'instances' or 'inputs'. Received: {received}.")
    return _instances(named["instances"], body) if "instances" in named else _inputs(named["inputs"], body)


def write(prediction: Prediction) -> Encoded:
    """Write an answer.

    Raises:
        NonFiniteAnswerError: an output holds NaN or infinity, for which JSON has no word.
    """
    for name, output in prediction.outputs.items():
        json_values.check_finite(name, output)
    # orjson writes C-contiguous arrays alone.
    outputs = {name: np.ascontiguousarray(output) for name, output in prediction.outputs.items()}
    document = {
        "predictions": next(iter(outputs.values())) if len(outputs) == 1 else outputs,
        "model": prediction.model,
        "version": prediction.version,
        "statistics": prediction.statistics,
        "mini_batches": prediction.mini_batches,
    }
    return Encoded(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), MEDIA_TYPE, {})


def _mini_batch_rows(document: Mapping[str, Any]) -> int | None:
    if "mini_batch_rows" not in document:
        return None
    value = document["mini_batch_rows"]
    if type(value) is not int or value < 0:
        received = value if isinstance(value, int | float) else json_values.kind(value)
        raise MiniBatchError(
            "Expected mini_batch_rows to be a whole number: 0 for one mini-batch of all rows, or more. "
            f"Received: {received}. Leave it out for the default."
        )
    return value


def _instances(rows: Any, body: bytes) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    if not json_values.is_list(rows):
        raise InvalidInputError(f"Expected 'instances' to be a list of rows. Received: {json_values.kind(rows)}.")
    if not len(rows):
        raise InvalidInputError("Expected 'instances' to hold at least one row. Received: an empty list.")
    if not json_values.is_object(rows[0]):
        return json_arrays.array("instances", rows, body)
    names = list(rows[0].keys())
    by_name: dict[str, list[Any]] = {name: [] for name in names}
    for index, row in enumerate(rows):
        given = list(row.keys()) if json_values.is_object(row) else []
        if len(given) != len(names) or set(given) != by_name.keys():
            received = json_values.shown(given)[1:-1] if json_values.is_object(row) else json_values.kind(row)
            raise InvalidInputError(
                f"Expected each of 'instances' to be an object with the first one's keys, "
                f"{', '.join(map(repr, by_name))}, each once. Received: {received or 'no keys'} at index {index}."
            )
        for name, values in by_name.items():
            values.append(row[name])
    return {name: json_arrays.array(name, values) for name, values in by_name.items()}


def _inputs(inputs: Any, body: bytes) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    if json_values.is_object(inputs):
        named = json_values.members("inputs", inputs, list(inputs.keys()))
        return {name: json_arrays.array(name, values) for name, values in named.items()}
    return json_arrays.array("inputs", inputs, body)
