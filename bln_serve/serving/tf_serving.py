"""Requests and answers in TensorFlow Serving's REST protocol, version 1.

    {"instances": [row, ...]}              -> {"predictions": [row, ...]}
    {"instances": [{NAME: row}, ...]}      -> the same, of a model with several inputs
    {"inputs": [row, ...]}                 -> {"outputs": [row, ...]}
    {"inputs": {NAME: [row, ...]}}         -> the same, of a model with several inputs

Several outputs have names: a row of predictions is {NAME: row}, outputs are {NAME: [row, ...]}. What our own JSON says
beside its predictions travels as headers, as it does with .npy. The rows of a mini-batch stand in the URL alone. Unlike
there, NaN and Infinity, which are no JSON, are neither read nor written.

Source: https://www.tensorflow.org/tfx/serving/api_rest
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson

from bln_serve.errors import InvalidInputError, MalformedRequestError
from bln_serve.manifest import Manifest
from bln_serve.serving import json_values, predict_json
from bln_serve.serving.json_values import shown
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest
from bln_serve.signature import Arrays, ModelSignature, TensorSpec

_SIGNATURE = "serving_default"
_KEYS = ("inputs", "instances", "signature_name")
_DTYPES = {
    "bool": "DT_BOOL",
    **{f"uint{bits}": f"DT_UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"DT_INT{bits}" for bits in (8, 16, 32, 64)},
    "float16": "DT_HALF",
    "float32": "DT_FLOAT",
    "float64": "DT_DOUBLE",
}


def read(message: Message, _: ModelSignature | None = None) -> PredictRequest:
    """Read a request. Nothing in it depends on the model's signature, which other protocols' readers need.

    Raises:
        MalformedRequestError: the body is not a JSON object with the right keys, or asks for another signature.
        InvalidInputError: an input is no rectangular array of numbers.
    """
    try:
        return json_values.read(message.body, partial(_request, message.body))
    except InvalidInputError as error:
        if b'"b64"' not in message.body:
            raise
        raise InvalidInputError(f'{error} No model here takes bytes, such as {{"b64": TEXT}}.') from error


def _request(body: bytes, document: Any) -> PredictRequest:
    named = json_values.members("the request", document, _KEYS, " mini_batch_rows goes into the URL.")
    if (signature := named.get("signature_name", _SIGNATURE)) != _SIGNATURE:
        raise MalformedRequestError(
            f"Expected signature_name to be {_SIGNATURE!r}, or left out. Received: {shown(signature)}."
        )
    return PredictRequest(predict_json.rows(named, body), _write_rows if "instances" in named else _write_columns)


def slow_bytes(message: Message) -> int:
    """Return how many bytes are parsed slowly: all of them."""
    return len(message.body)


def model_status(versions: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
    """Return what GET /v1/models/NAME says.

    Args:
        versions: of each its number, its state (START, LOADING, AVAILABLE, UNLOADING or END) and what went wrong with
            it, or nothing.
    """
    return {
        "model_version_status": [
            {
                "version": str(version),
                "state": state,
                "status": {"error_code": "UNKNOWN" if error_message else "OK", "error_message": error_message},
            }
            for version, state, error_message in versions
        ]
    }


def model_metadata(name: str, version: int, manifest: Manifest) -> dict[str, Any]:
    """Return what GET /v1/models/NAME/metadata says: the default signature, whose rows have the size -1."""
    signature = {
        "inputs": {spec.name: _tensor_info(spec) for spec in manifest.signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in manifest.signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": str(version)},
        "metadata": {"signature_def": {"signature_def": {_SIGNATURE: signature}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    sizes = [{"size": "-1" if size is None else str(size), "name": ""} for size in spec.shape]
    return {
        "dtype": _DTYPES[spec.dtype],
        "tensor_shape": {"dim": sizes, "unknown_rank": False},
        "name": f"{spec.name}:0",  # of a node in a graph that is not here: for people alone
    }


def _write_rows(prediction: Prediction) -> Encoded:
    """Write the answer to instances.

    Raises:
        NonFiniteAnswerError: an output holds NaN or infinity.
    """
    outputs = _outputs(prediction)
    if len(outputs) == 1:
        return _encoded({"predictions": next(iter(outputs.values()))}, prediction)
    rows = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
    return _encoded({"predictions": rows}, prediction)


def _write_columns(prediction: Prediction) -> Encoded:
    """Write the answer to inputs.

    Raises:
        NonFiniteAnswerError: an output holds NaN or infinity.
    """
    outputs = _outputs(prediction)
    return _encoded({"outputs": next(iter(outputs.values())) if len(outputs) == 1 else outputs}, prediction)


def _outputs(prediction: Prediction) -> Arrays:
    for name, output in prediction.outputs.items():
        json_values.check_finite(name, output)
    # orjson writes C-contiguous arrays alone.
    return {name: np.ascontiguousarray(output) for name, output in prediction.outputs.items()}


def _encoded(document: Mapping[str, Any], prediction: Prediction) -> Encoded:
    return Encoded(
        orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), json_values.MEDIA_TYPE, prediction.headers
    )
