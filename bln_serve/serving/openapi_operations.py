"""Every route with what it takes and how it answers, errors included: the operations of /openapi.json."""

from collections.abc import Mapping
from typing import Any

from bln_serve.serving import predict_json, predict_npy
from bln_serve.serving.binary_tensors import HEADER_LENGTH
from bln_serve.serving.binary_tensors import MEDIA_TYPE as OCTETS
from bln_serve.serving.gate import OPEN_PATHS
from bln_serve.serving.openapi_schemas import MINI_BATCH_ROWS, ref
from bln_serve.serving.request_ids import HEADER as REQUEST_ID

JSON, NPY = predict_json.MEDIA_TYPE, predict_npy.MEDIA_TYPE

SERVICE, MODELS, PREDICT = "Service", "Models", "Predict"
OPEN_INFERENCE, TF_SERVING = "Open Inference Protocol v2", "TensorFlow Serving REST v1"
TAGS: Mapping[str, str] = {
    PREDICT: "The service's own protocol, as JSON or npy.",
    MODELS: "Which models there are, and what may be sent.",
    OPEN_INFERENCE: "For clients of KServe and Triton, with the binary tensor extension.",
    TF_SERVING: "For clients of TensorFlow Serving.",
    SERVICE: "How the service is.",
}

Operation = dict[str, Any]


def _json(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": ref(schema)}}}


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _error(description: str, headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    request_id = {REQUEST_ID.decode(): _header("of the request, as the service's log has it")}
    return {**_json(description, "Error"), "headers": {**request_id, **(headers or {})}}


_REFUSED = {
    "400": "the body, the URL or a header cannot be read",
    "404": "no such model or version, or no default model",
    "408": "the body did not come in time",
    "413": "too many bytes or rows",
    "415": "the body is of another media type",
    "422": "wrong names, shapes, dtypes or values; rows that make no mini-batch; an answer that JSON cannot say",
    "500": "the model could not be run",
    "504": "the answer was not there within the request's time",
}
_NO_TOKEN = _error("the service asks for a token, and this is none of its own", {"www-authenticate": _header("Bearer")})
_UNAVAILABLE = _error(
    "the queue is full, the model still loads or cannot, or the service is going down",
    {"retry-after": _header("seconds", "integer")},
)
_ERRORS = {status: _error(description) for status, description in _REFUSED.items()}
_ASKING_ERRORS = {**_ERRORS, "401": _NO_TOKEN, "503": _UNAVAILABLE}
_MODEL_ERRORS = {"401": _NO_TOKEN, "404": _error("no such model or version"), "503": _UNAVAILABLE}

_FACTS = {
    "bln-model": _header("the model's name, where the body does not say it"),
    "bln-version": _header("its version, where the body does not say it"),
    "bln-statistics": _header("the statistics policy, where there is one and the body does not say it"),
    "bln-mini-batches": _header("rows of each mini-batch, where rows are coupled and the body does not say it"),
}
_FILE = {"schema": {"type": "string", "format": "binary", "description": "one array, as numpy.save writes it"}}
_BYTES = {"schema": {"type": "string", "format": "binary", "description": "JSON, and behind it the tensors' bytes"}}

_QUERY = {"name": "mini_batch_rows", "in": "query", "schema": MINI_BATCH_ROWS}
_TIMEOUT = {
    "name": "bln-timeout-ms",
    "in": "header",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    "description": "milliseconds in which the answer is of use; at most the service's own --request-timeout-s",
}
_LENGTH = {
    "name": HEADER_LENGTH,
    "in": "header",
    "schema": {"type": "integer", "minimum": 0},
    "description": "how many bytes of JSON the body begins with, where tensors follow it as bytes; "
    "0 where the body is nothing but the rows of a model's only input",
}
_PATH = {
    "name": {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "a model's"},
    "version": {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    },
}


def _ask(tag: str, summary: str, request: dict[str, Any], answer: dict[str, Any], *parameters: Any) -> Operation:
    headers = (
        {**_FACTS, HEADER_LENGTH: _header("bytes of JSON before the tensors")} if tag == OPEN_INFERENCE else _FACTS
    )
    description = "the answer to these rows, whatever else the service is doing"
    return {
        "tags": [tag],
        "summary": summary,
        "parameters": [_QUERY, _TIMEOUT, *parameters],
        "requestBody": {"required": True, "content": request},
        "responses": {"200": {"description": description, "headers": headers, "content": answer}, **_ASKING_ERRORS},
    }


def _predict(summary: str) -> Operation:
    request = {JSON: {"schema": ref("PredictRequest")}, NPY: _FILE}
    return _ask(PREDICT, summary, request, {JSON: {"schema": ref("PredictAnswer")}, NPY: _FILE})


def _tf_serving(summary: str) -> Operation:
    request = {JSON: {"schema": ref("TfServingRequest")}}
    return _ask(TF_SERVING, summary, request, {JSON: {"schema": ref("TfServingAnswer")}})


def _infer(summary: str) -> Operation:
    request = {JSON: {"schema": ref("InferRequest")}, OCTETS: _BYTES}
    return _ask(OPEN_INFERENCE, summary, request, {JSON: {"schema": ref("InferAnswer")}, OCTETS: _BYTES}, _LENGTH)


def _tell(tag: str, summary: str, schema: str, *, errors: Mapping[str, Any] = _MODEL_ERRORS) -> Operation:
    return {"tags": [tag], "summary": summary, "responses": {"200": _json("it is told", schema), **errors}}


def _page(summary: str, **others: Any) -> Operation:
    content = {"text/html": {"schema": {"type": "string"}}, **others}
    responses = {"200": {"description": "a page", "content": content}, "401": _NO_TOKEN}
    return {"tags": [SERVICE], "summary": summary, "responses": responses}


_ALONE = {"401": _NO_TOKEN}
_NOT_READY = {**_ALONE, "400": _json("not yet", "Ready")}
_METRICS: Operation = {
    "tags": [SERVICE],
    "summary": "What Prometheus reads",
    "responses": {
        "200": {
            "description": "in the text format, or OpenMetrics where Accept asks for it",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        },
        "401": _NO_TOKEN,
    },
}
_EXAMPLE = _tell(MODELS, "A request that it answers: the body of a POST to its /predict", "PredictRequest")
_READY_ERRORS = {**_NOT_READY, "404": _MODEL_ERRORS["404"]}

OPERATIONS: Mapping[str, tuple[str, Operation]] = {
    "/predict": ("post", _predict("Ask the default model")),
    "/models/{name}/predict": ("post", _predict("Ask a model")),
    "/models/{name}/versions/{version}/predict": ("post", _predict("Ask one version of a model")),
    "/models": ("get", _tell(MODELS, "Which models are served?", "Models", errors=_ALONE)),
    "/models/{name}": ("get", _tell(MODELS, "What is this model, and what may be sent?", "Model")),
    "/models/{name}/example": ("get", _EXAMPLE),
    "/v2/models/{name}/infer": ("post", _infer("Ask a model")),
    "/v2/models/{name}/versions/{version}/infer": ("post", _infer("Ask one version of a model")),
    "/v2": ("get", _tell(OPEN_INFERENCE, "What is this server?", "ServerMetadata", errors=_ALONE)),
    "/v2/health/live": ("get", _tell(OPEN_INFERENCE, "Is the service alive?", "Live", errors=_ALONE)),
    "/v2/health/ready": ("get", _tell(OPEN_INFERENCE, "Can it answer?", "Ready", errors=_NOT_READY)),
    "/v2/models/{name}": ("get", _tell(OPEN_INFERENCE, "What is this model?", "ModelMetadata")),
    "/v2/models/{name}/versions/{version}": ("get", _tell(OPEN_INFERENCE, "What is this version?", "ModelMetadata")),
    "/v2/models/{name}/ready": (
        "get",
        _tell(OPEN_INFERENCE, "Can this model answer?", "Ready", errors=_READY_ERRORS),
    ),
    "/v2/models/{name}/versions/{version}/ready": (
        "get",
        _tell(OPEN_INFERENCE, "Can this version answer?", "Ready", errors=_READY_ERRORS),
    ),
    "/v1/models/{name}:predict": ("post", _tf_serving("Ask a model")),
    "/v1/models/{name}/versions/{version}:predict": ("post", _tf_serving("Ask one version of a model")),
    "/v1/models/{name}": ("get", _tell(TF_SERVING, "What is each version doing?", "TfServingStatus")),
    "/v1/models/{name}/versions/{version}": (
        "get",
        _tell(TF_SERVING, "What is this version doing?", "TfServingStatus"),
    ),
    "/v1/models/{name}/metadata": ("get", _tell(TF_SERVING, "What is this model?", "TfServingMetadata")),
    "/v1/models/{name}/versions/{version}/metadata": (
        "get",
        _tell(TF_SERVING, "What is this version?", "TfServingMetadata"),
    ),
    "/healthz": ("get", _tell(SERVICE, "Is the service alive?", "Alive", errors={})),
    "/readyz": (
        "get",
        _tell(
            SERVICE,
            "Are its models loaded, verified and warmed?",
            "Readiness",
            errors={"503": _json("not yet, or a model that is needed could not be loaded", "Readiness")},
        ),
    ),
    "/metrics": ("get", _METRICS),
    "/": ("get", _page("A page to try a model", **{JSON: {"schema": ref("Start")}})),
    "/docs": ("get", _page("This description, as a page")),
}
"""By path: its method and what it does. Parameters of the path are added by `operation`."""


def operation(path: str) -> tuple[str, Operation]:
    """Return a route's method and its operation, with the parameters that its path names and an id of its own."""
    method, described = OPERATIONS[path]
    in_path = [_PATH[name] for name in _PATH if f"{{{name}}}" in path]
    words = path.replace("{", "").replace("}", "").replace(":", "/").strip("/").split("/")
    more: Operation = {"operationId": "_".join([method, *(words if words != [""] else ["start"])])}
    if path in OPEN_PATHS:
        more["security"] = []
    return method, {**described, "parameters": [*in_path, *described.get("parameters", ())], **more}
