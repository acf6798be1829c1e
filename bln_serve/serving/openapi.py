"""What /openapi.json says of bodies and answers. They are read and written by hand, so they are described by hand."""

from typing import Any

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

PREDICT: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {predict_json.MEDIA_TYPE: {"schema": _REQUEST}, predict_npy.MEDIA_TYPE: _NPY},
        },
        "parameters": [{"name": "mini_batch_rows", "in": "query", "required": False, "schema": _MINI_BATCH_ROWS}],
    },
    "responses": {
        200: {
            "description": "the answer to these rows, whatever else the service is doing",
            "headers": _ANSWER_HEADERS,
            "content": {predict_json.MEDIA_TYPE: {"schema": _ANSWER}, predict_npy.MEDIA_TYPE: _NPY},
        },
        400: _json("the body or the URL cannot be read", _ERROR),
        404: _json("no such model or version, or no default model", _ERROR),
        413: _json("too many bytes or rows", _ERROR),
        415: _json("the body is of another media type", _ERROR),
        422: _json(
            "wrong names, shapes, dtypes or values; rows that make no mini-batch; an answer JSON cannot say", _ERROR
        ),
        500: _json("the model could not be run", _ERROR),
        503: _json("the queue is full, the model still loads, or the service is going down: see Retry-After", _ERROR),
    },
}

HEALTH: dict[int | str, dict[str, Any]] = {200: _json("it is", {"type": "object"})}
READINESS: dict[int | str, dict[str, Any]] = {
    200: _json("they are", {"type": "object"}),
    503: _json("not yet, or a model that is needed could not be loaded: `broken` says why", {"type": "object"}),
}
MODEL: dict[int | str, dict[str, Any]] = {
    200: _json("name, version, statistics, row coupling, rows of a mini-batch, inputs and outputs", {"type": "object"}),
    404: _json("no such model", _ERROR),
    503: _json("it still loads, or could not be loaded", _ERROR),
}
