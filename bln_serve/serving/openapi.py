"""/openapi.json: every route, every body, every error, with requests that the models served at this moment answer."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from bln_serve import __version__
from bln_serve.manifest import Manifest
from bln_serve.serving import examples
from bln_serve.serving.openapi_operations import JSON, OPEN_INFERENCE, OPERATIONS, PREDICT, TAGS, TF_SERVING, operation
from bln_serve.serving.openapi_schemas import SCHEMAS
from bln_serve.serving.served_model import ServedModel

_VERSION = "3.1.0"
_DESCRIPTION = (
    "Models behind Batch Layer Normalization, each request answered as it would be alone, whatever else is asked. "
    "GET /models/NAME says what may be sent, GET /models/NAME/example is a request to begin with. Every error is "
    '`{"error": "Expected ... Received: ..."}`.'
)
_BEARER = {"type": "http", "scheme": "bearer", "description": "needed where the service was started with tokens"}
_MOST_NUMBERS = 2000
"""Of a model's example: a larger one is at /models/NAME/example alone."""
_EXAMPLES: Mapping[str, Callable[[Manifest], dict[str, Any]]] = {
    PREDICT: examples.request,
    OPEN_INFERENCE: examples.open_inference,
    TF_SERVING: examples.tf_serving,
}


def document(served: Iterable[ServedModel]) -> dict[str, Any]:
    """Return the description of a service of these models."""
    small = [each for each in served if examples.number_count(each.manifest) <= _MOST_NUMBERS]
    paths: dict[str, Any] = {}
    for path in OPERATIONS:
        method, described = operation(path)
        paths[path] = {method: _with_examples(described, small) if "{name}" in path and small else described}
    return {
        "openapi": _VERSION,
        "info": {"title": "bln_serve", "description": _DESCRIPTION, "version": __version__},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"bearer": _BEARER}},
        "security": [{}, {"bearer": []}],
    }


def _with_examples(described: dict[str, Any], models: list[ServedModel]) -> dict[str, Any]:
    """Name the models where the path takes one, and give a body for each, all in one order."""
    described = deepcopy(described)
    values = {"name": [each.name for each in models], "version": [str(each.version) for each in models]}
    for parameter in described["parameters"]:
        if parameter["in"] == "path":
            pairs = zip(models, values[parameter["name"]], strict=True)
            parameter["examples"] = {each.name: {"value": value} for each, value in pairs}
    if body := described.get("requestBody"):
        example = _EXAMPLES[described["tags"][0]]
        body["content"][JSON]["examples"] = {each.name: {"value": example(each.manifest)} for each in models}
    return described
