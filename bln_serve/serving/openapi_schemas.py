"""The JSON of every protocol as schemas, and the headers: what /openapi.json says of bodies and answers.

They are read and written by hand, so they are described by hand. A schema says what every model has in common; what a
model's own shapes are, GET /models/NAME says.
"""

from typing import Any

from bln_serve.serving.binary_tensors import DATATYPES

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Return a reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    properties = {**required, **(optional or {})}
    listed = {"required": list(required)} if required else {}
    return {"type": "object", **listed, "properties": properties, **more}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(kind: str, description: str) -> Schema:
    return {"type": [kind, "null"], "description": description}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_STATISTICS = _or_null("string", "the statistics policy, such as PPMM; mixed where layers differ; null without BLN")
_MINI_BATCHES = _or_null("string", "rows of each mini-batch, such as 25x40,7; null where rows are independent")
MINI_BATCH_ROWS: Schema = {
    "type": "integer",
    "minimum": 0,
    "description": "rows of each mini-batch; 0 for one mini-batch of all rows; by default the model's. "
    "Has no effect where rows are independent",
}
_TENSORS_OR_ROWS = {"oneOf": [ref("RowsByName"), ref("Rows")]}
_ASKED_ROWS = {
    "instances": _list(
        {}, minItems=1, description="rows: numbers or nested lists; for several inputs an object {name: row} for each"
    ),
    "inputs": {"oneOf": [ref("RowsByName"), ref("Rows")]},
}
_ONE_OF_BOTH = [{"required": ["instances"]}, {"required": ["inputs"]}]
_RANGE = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_PARAMETERS: Schema = {"type": "object", "description": "facts by name; those of our own begin with bln_"}
_TENSOR_HEAD = {"name": _TEXT, "shape": _list(_COUNT), "datatype": {"type": "string", "enum": list(DATATYPES)}}
_DATA = _list({}, description="numbers in row-major order, flat or nested; left out where they follow as bytes")

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {"error": {"type": "string", "description": "what was expected, what was received, and what to do"}}
    ),
    "Rows": _list({}, description="rows: numbers or nested lists of them, all of one shape"),
    "RowsByName": {"type": "object", "additionalProperties": ref("Rows")},
    "PredictRequest": _object(
        {}, {**_ASKED_ROWS, "mini_batch_rows": MINI_BATCH_ROWS}, additionalProperties=False, oneOf=_ONE_OF_BOTH
    ),
    "PredictAnswer": _object(
        {
            "predictions": _TENSORS_OR_ROWS,
            "model": _TEXT,
            "version": {"type": "integer", "minimum": 1},
            "statistics": _STATISTICS,
            "mini_batches": _MINI_BATCHES,
        }
    ),
    "TensorSpec": _object(
        {
            "name": _TEXT,
            "dtype": {"type": "string", "description": "as NumPy calls it, such as float32"},
            "shape": _list({"type": ["integer", "null"]}, description="null for the rows"),
        },
        {
            "value_range": {**_RANGE, "description": "other values are refused"},
            "typical_range": {**_RANGE, "description": "other values are taken too"},
            "labels": {"type": ["array", "null"], "items": _TEXT, "description": "of an output's last dimension"},
        },
    ),
    "Model": _object(
        {
            "name": _TEXT,
            "version": {"type": "integer", "minimum": 1},
            "statistics": _STATISTICS,
            "row_coupling": {"type": "string", "enum": ["independent", "positional", "mini-batch"]},
            "row_coupling_reason": _TEXT,
            "mini_batch_rows": _or_null("integer", "rows of a mini-batch where a request names none"),
            "min_mini_batch_rows": {"type": "integer", "minimum": 1},
            "max_mini_batch_rows": _or_null("integer", "null for no limit"),
            "max_run_rows": {"type": "integer", "minimum": 1, "description": "rows of several requests in one run"},
            "inputs": _list(ref("TensorSpec"), minItems=1),
            "outputs": _list(ref("TensorSpec"), minItems=1),
            "tolerance": _object({"atol": {"type": "number"}, "rtol": {"type": "number"}}),
            "created": _TEXT,
        }
    ),
    "Models": _object({"models": _list(ref("Model"))}),
    "Readiness": _object(
        {"ready": {"type": "boolean"}},
        {
            "models": _list(_object({"name": _TEXT, "version": _COUNT})),
            "loading": _list(_TEXT, description="models whose loading has not ended"),
            "broken": _list(
                _object({"name": _TEXT, "version": _COUNT, "reason": _TEXT}), description="tried, and not served"
            ),
            "workers": _object(
                {"ready": _COUNT, "count": _COUNT}, description="where several share the port: so many of them are"
            ),
        },
    ),
    "Alive": _object({"alive": {"const": True}}),
    "Start": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "status": {"const": "alive"},
            "links": {"type": "object", "additionalProperties": _TEXT},
        }
    ),
    "TfServingRequest": _object(
        {},
        {"signature_name": {"type": "string", "enum": ["serving_default"]}, **_ASKED_ROWS},
        additionalProperties=False,
        oneOf=_ONE_OF_BOTH,
    ),
    "TfServingAnswer": _object(
        {},
        {"predictions": ref("Rows"), "outputs": _TENSORS_OR_ROWS},
        oneOf=[{"required": ["predictions"]}, {"required": ["outputs"]}],
    ),
    "TfServingStatus": _object(
        {
            "name": _TEXT,
            "ready": {"type": "boolean"},
            "model_version_status": _list(
                _object(
                    {
                        "version": _TEXT,
                        "state": {"type": "string", "enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]},
                        "status": _object({"error_code": _TEXT, "error_message": _TEXT}),
                    }
                )
            ),
        }
    ),
    "TfServingMetadata": _object(
        {
            "model_spec": _object({"name": _TEXT, "signature_name": _TEXT, "version": _TEXT}),
            "metadata": _object({"signature_def": {"type": "object"}}),
        }
    ),
    "InferRequest": _object(
        {"inputs": _list(ref("InferInput"), minItems=1)},
        {
            "id": {"type": "string", "description": "comes back with the answer"},
            "model_name": {"type": "string", "description": "not read: the URL names the model"},
            "model_version": {"type": "string", "description": "not read: the URL names the version"},
            "parameters": _object(
                {},
                {
                    "bln_mini_batch_rows": MINI_BATCH_ROWS,
                    "binary_data_output": _or_null("boolean", "whether outputs follow the JSON as bytes"),
                },
            ),
            "outputs": _list(ref("WantedOutput"), description="those that are wanted; left out for all"),
        },
        additionalProperties=False,
    ),
    "InferInput": _object(
        _TENSOR_HEAD,
        {"data": _DATA, "parameters": _object({}, {"binary_data_size": _COUNT})},
        additionalProperties=False,
    ),
    "WantedOutput": _object(
        {"name": _TEXT},
        {"parameters": _object({}, {"binary_data": {"type": "boolean"}})},
        additionalProperties=False,
    ),
    "InferAnswer": _object(
        {"model_name": _TEXT, "model_version": _TEXT, "outputs": _list(ref("InferOutput"))},
        {"id": _TEXT, "parameters": _PARAMETERS},
    ),
    "InferOutput": _object(_TENSOR_HEAD, {"data": _DATA, "parameters": _object({}, {"binary_data_size": _COUNT})}),
    "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "TensorMetadata": _object(
        {**_TENSOR_HEAD, "shape": _list({"type": "integer", "minimum": -1}, description="-1 for the rows")}
    ),
    "ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(ref("TensorMetadata"), minItems=1),
            "outputs": _list(ref("TensorMetadata"), minItems=1),
        },
        {"parameters": _PARAMETERS},
    ),
    "Live": _object({"live": {"const": True}}),
    "Ready": _object({"ready": {"type": "boolean"}}, {"name": _TEXT}),
}
