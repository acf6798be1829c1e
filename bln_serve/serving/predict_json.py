"""Requests and answers as JSON.

    {"instances": [row, ...]}            rows of a single-input model
    {"instances": [{NAME: row}, ...]}    rows of any model
    {"inputs": {NAME: [row, ...]}}       or the rows themselves, for a single-input model
    "mini_batch_rows": R                 optional, in each

JSON says less than an array does, so lists are read strictly: no text, null or boolean becomes a number, and lists of
different lengths become no array.
"""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError, MalformedRequestError, MiniBatchError, NonFiniteAnswerError
from bln_serve.serving.prediction import Encoded, Prediction, PredictRequest

MEDIA_TYPE = "application/json"

_KEYS = ("instances", "inputs", "mini_batch_rows")
_KIND_NAMES = {
    bool: "booleans",
    dict: "objects",
    float: "numbers",
    int: "numbers",
    list: "lists",
    str: "text",
    type(None): "null",
}
_MAX_DIMENSIONS = 32
_MAX_ROWS_NAMED = 10


def read(body: bytes) -> PredictRequest:
    """Read a request's body.

    Raises:
        MalformedRequestError: it is not a JSON object with the right keys.
        InvalidInputError: an input is no rectangular array of numbers.
        MiniBatchError: `mini_batch_rows` is no whole number from 0.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # Python's own writer makes NaN and Infinity, which are no JSON.
        hint = " JSON has no NaN and no Infinity." if re.search(rb"NaN|Infinity", body) else ""
        raise MalformedRequestError(
            f"Expected a JSON object. Received: {len(body)} bytes, and {error}.{hint}"
        ) from error
    if not isinstance(document, dict):
        raise MalformedRequestError(f'Expected a JSON object, {{"instances": [...]}}. Received: {_kind(document)}.')
    if unknown := [key for key in document if key not in _KEYS]:
        raise MalformedRequestError(
            f"Expected no other keys than {', '.join(_KEYS)}. Received: {', '.join(map(repr, unknown[:5]))}."
        )
    if ("instances" in document) == ("inputs" in document):
        received = "both" if "inputs" in document else "neither"
        raise MalformedRequestError(f"Expected either 'instances' or 'inputs'. Received: {received}.")
    inputs = _instances(document["instances"]) if "instances" in document else _inputs(document["inputs"])
    return PredictRequest(inputs, write, _mini_batch_rows(document))


def write(prediction: Prediction) -> Encoded:
    """Write an answer.

    Raises:
        NonFiniteAnswerError: an output holds NaN or infinity, for which JSON has no word.
    """
    for name, output in prediction.outputs.items():
        _check_finite(name, output)
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
        raise MiniBatchError(
            "Expected mini_batch_rows to be a whole number: 0 for one mini-batch of all rows, or more. "
            f"Received: {value if isinstance(value, int | float) else _kind(value)}. Leave it out for the default."
        )
    return value


def _instances(rows: Any) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    if not isinstance(rows, list):
        raise InvalidInputError(f"Expected 'instances' to be a list of rows. Received: {_kind(rows)}.")
    if not rows:
        raise InvalidInputError("Expected 'instances' to hold at least one row. Received: an empty list.")
    if not isinstance(rows[0], dict):
        return rectangular("instances", rows)
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != rows[0].keys():
            received = ", ".join(map(repr, row)) if isinstance(row, dict) else _kind(row)
            raise InvalidInputError(
                f"Expected each of 'instances' to be an object with the first one's keys, "
                f"{', '.join(map(repr, rows[0]))}. Received: {received or 'no keys'} at index {index}."
            )
    return {name: rectangular(name, [row[name] for row in rows]) for name in rows[0]}


def _inputs(inputs: Any) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    if isinstance(inputs, dict):
        return {name: rectangular(name, rows) for name, rows in inputs.items()}
    return rectangular("inputs", inputs)


def rectangular(name: str, value: Any) -> NDArray[Any]:
    """Turn nested lists into an array.

    NumPy alone would turn `[true, 0.5]` into numbers, and one long text among many short ones into gigabytes.

    Args:
        name: what it is, for messages.
        value: lists of lists of numbers, or of booleans, as a JSON parser gives them.

    Returns:
        An array of bool, int64, uint64 or float64.

    Raises:
        InvalidInputError: lists of different lengths, or anything else than numbers alone or booleans alone.
    """
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], list):
        _check_level(name, level, len(shape))
        shape.append(len(level[0]))
        level = list(chain.from_iterable(level))
    kinds = {_KIND_NAMES[kind] for kind in set(map(type, level))}
    if level and kinds not in ({"numbers"}, {"booleans"}):
        raise _not_rectangular(name, " beside ".join(sorted(kinds)))
    return np.array(level).reshape(shape)


def _check_level(name: str, level: list[Any], depth: int) -> None:
    if len(kinds := {_KIND_NAMES[kind] for kind in set(map(type, level))}) > 1:
        raise _not_rectangular(name, " beside ".join(sorted(kinds)))
    lengths = set(map(len, level))
    if len(lengths) > 1:
        shortest, longest = min(lengths), max(lengths)
        raise _not_rectangular(name, f"lists of {shortest} and of {longest} items at depth {depth + 1}")
    if depth >= _MAX_DIMENSIONS:
        raise _not_rectangular(name, f"more than {_MAX_DIMENSIONS} levels of lists")


def _not_rectangular(name: str, received: str) -> InvalidInputError:
    return InvalidInputError(f"Expected {name!r} to be a rectangular array of numbers. Received: {received}.")


def _kind(value: Any) -> str:
    """Name the kind of a parsed value, such as a body that should have been an object."""
    singular = {bool: "a boolean", dict: "an object", list: "a list", str: "text", type(None): "null"}
    return singular.get(type(value), "a number")


def _check_finite(name: str, output: NDArray[Any]) -> None:
    if output.dtype.kind != "f" or np.isfinite(output).all():
        return
    finite = np.isfinite(output).reshape(output.shape[0], -1).all(axis=1)
    rows = np.flatnonzero(~finite)
    listed = ", ".join(map(str, rows[:_MAX_ROWS_NAMED])) + (", ..." if len(rows) > _MAX_ROWS_NAMED else "")
    raise NonFiniteAnswerError(
        f"Expected finite numbers in output {name!r}, since JSON has no NaN and no infinity. Received: NaN or "
        f"infinity in {len(rows)} of {len(finite)} rows, at index {listed}. "
        "Check these rows' values, or ask for Accept: application/x-npy."
    )
