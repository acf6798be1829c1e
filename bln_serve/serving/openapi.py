"""What /openapi.json says of bodies and answers. They are read and written by hand, so they are described by hand."""

from typing import Any

from fastapi import FastAPI

from bln_serve.serving import predict_json, predict_npy

_NESTED = {"type": "array", "items": {}, "description": "rows: nested lists of numbers, all of one shape"}
_BY_NAME = {"type": "object", "additionalProperties": _NESTED}
_NPY = {"schema": {"type": "string", "format": "binary", "description": "one array, as numpy.save writes it"}}
_MINI_BATCH_ROWS = {
    "type": "integer",
    "minimum": 0,
    "description": "rows of each mini-batch; 0 for one mini-batch of all rows; by default the model's. "
    "Has no effect where rows are independent",
}

_REQUEST = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "instances": {
            "type": "array",
            "minItems": 1,
            "items": {},
            "description": "rows, or for several inputs an object {name: row} for each",
        },
        "inputs": {"oneOf": [_BY_NAME, _NESTED]},
        "mini_batch_rows": _MINI_BATCH_ROWS,
    },
    "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
    "example": {"instances": [[0.0, 1.0], [2.0, 3.0]]},
}

_ANSWER = {
    "type": "object",
    "required": ["predictions", "model", "version", "statistics", "mini_batches"],
    "properties": {
        "predictions": {"oneOf": [_NESTED, _BY_NAME]},
        "model": {"type": "string"},
        "version": {"type": "integer"},
        "statistics": {
            "type": ["string", "null"],
            "description": "the statistics policy, such as PPMM; mixed where layers differ; null without BLN layers",
        },
        "mini_batches": {
            "type": ["string", "null"],
            "description": "rows of each mini-batch, such as 25x40,7; null where rows are independent",
        },
    },
}

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {predict_json.MEDIA_TYPE: {"schema": schema}}}


_ANSWER_HEADERS = {
    name: {"description": f"on {predict_npy.MEDIA_TYPE} answers: {what}", "schema": {"type": "string"}}
    for name, what in {
        "bln-model": "the model's name",
        "bln-version": "its version",
        "bln-statistics": "the statistics policy, where there is one",
        "bln-mini-batches": "rows of each mini-batch, where rows are coupled",
    }.items()
}

_REFUSALS = {
    "400": _json("the body or the URL cannot be read", _ERROR),
    "404": _json("no such model or version, or no default model", _ERROR),
    "408": _json("the body did not come in time", _ERROR),
    "413": _json("too many bytes or rows", _ERROR),
    "415": _json("the body is of another media type", _ERROR),
    "422": _json(
        "wrong names, shapes, dtypes or values; rows that make no mini-batch; an answer JSON cannot say", _ERROR
    ),
    "500": _json("the model could not be run", _ERROR),
    "503": _json("the queue is full, the model still loads, or the service is going down: see Retry-After", _ERROR),
    "504": _json("the answer was not there within the request's time", _ERROR),
}
_BINARY = {"schema": {"type": "string", "format": "binary", "description": "JSON, and behind it the tensors' bytes"}}


def _protocol(description: str, request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": request},
        "responses": {"200": {"description": description, "headers": _ANSWER_HEADERS, "content": answer}, **_REFUSALS},
    }


_PREDICT = _protocol(
    "the answer to these rows, whatever else the service is doing",
    {predict_json.MEDIA_TYPE: {"schema": _REQUEST}, predict_npy.MEDIA_TYPE: _NPY},
    {predict_json.MEDIA_TYPE: {"schema": _ANSWER}, predict_npy.MEDIA_TYPE: _NPY},
)
_TF_SERVING = _protocol(
    "predictions for instances, outputs for inputs",
    {
        predict_json.MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "signature_name": {"type": "string", "enum": ["serving_default"]},
                    "instances": {"type": "array", "minItems": 1, "items": {}},
                    "inputs": {"oneOf": [_BY_NAME, _NESTED]},
                },
                "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
            }
        }
    },
    {predict_json.MEDIA_TYPE: {"schema": {"type": "object", "properties": {"predictions": {}, "outputs": {}}}}},
)
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}
_INFER = _protocol(
    "the outputs, in JSON or, as asked for, as bytes behind it",
    {
        predict_json.MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": {"type": "object", "properties": {"bln_mini_batch_rows": _MINI_BATCH_ROWS}},
                    "inputs": {"type": "array", "items": _TENSOR, "minItems": 1},
                    "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
                },
            }
        },
        "application/octet-stream": _BINARY,
    },
    {
        predict_json.MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["model_name", "model_version", "outputs"],
                "properties": {
                    "model_name": {"type": "string"},
                    "model_version": {"type": "string"},
                    "id": {"type": "string"},
                    "parameters": {"type": "object"},
                    "outputs": {"type": "array", "items": _TENSOR},
                },
            }
        },
        "application/octet-stream": _BINARY,
    },
)
_PARAMETERS: dict[str, Any] = {
    "name": {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}},
    "version": {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}},
    "mini_batch_rows": {"name": "mini_batch_rows", "in": "query", "required": False, "schema": _MINI_BATCH_ROWS},
    "bln-timeout-ms": {
        "name": "bln-timeout-ms",
        "in": "header",
        "required": False,
        "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
        "description": "milliseconds in which the answer is of use; at most the service's own --request-timeout-s",
    },
}


_ASKING = {
    "/predict": ("Ask the default model", _PREDICT),
    "/models/{name}/predict": ("Ask a model", _PREDICT),
    "/models/{name}/versions/{version}/predict": ("Ask one version of a model", _PREDICT),
    "/v1/models/{name}:predict": ("Ask a model, as TensorFlow Serving is asked", _TF_SERVING),
    "/v1/models/{name}/versions/{version}:predict": ("Ask one version of a model", _TF_SERVING),
    "/v2/models/{name}/infer": ("Ask a model, in the Open Inference Protocol", _INFER),
    "/v2/models/{name}/versions/{version}/infer": ("Ask one version of a model", _INFER),
}


def describe_asking(app: FastAPI) -> None:
    """Add to /openapi.json the routes that ask a model, which FastAPI does not know."""
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = made_by_fastapi()
        document["paths"] |= {path: {"post": _asking(path, *of_path)} for path, of_path in _ASKING.items()}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of extending its document


def _asking(path: str, summary: str, protocol: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, each in _PARAMETERS.items() if each["in"] != "path" or f"{{{name}}}" in path]
    return {"summary": summary, "parameters": [_PARAMETERS[name] for name in names], **protocol}


HEALTH: dict[int | str, dict[str, Any]] = {200: _json("it is", {"type": "object"})}
READINESS: dict[int | str, dict[str, Any]] = {
    200: _json("they are", {"type": "object"}),
    503: _json("not yet, or a model that is needed could not be loaded: `broken` says why", {"type": "object"}),
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "in the text format, or OpenMetrics where Accept asks for it",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
MODEL: dict[int | str, dict[str, Any]] = {
    200: _json("name, version, statistics, row coupling, rows of a mini-batch, inputs and outputs", {"type": "object"}),
    404: _json("no such model", _ERROR),
    503: _json("it still loads, or could not be loaded", _ERROR),
}
