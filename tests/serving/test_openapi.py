"""/openapi.json describes every route, and holds for what is answered. tests/clients asks schemathesis about it too."""

import re
import warnings
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi

from bln_serve.serving.openapi_operations import OPERATIONS
from bln_serve.serving.routes import target_of

FILES = {"/docs/{file}", "/static/{file}"}
"""Of which the pages consist: nobody asks for them by hand."""


@pytest.fixture(scope="module")
def document(service: Any) -> Any:
    return service.get("/openapi.json").json()


def operations(document: Any) -> dict[tuple[str, str], Any]:
    return {(method, path): each for path, item in document["paths"].items() for method, each in item.items()}


def known_to_fastapi(service: Any) -> dict[tuple[str, str], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ids, which it makes up alike for GET and HEAD, and which are not ours
        return operations(get_openapi(title="", version="", routes=service.app.routes))


def filled(path: str) -> str:
    return path.replace("{name}", "digits_cnn").replace("{version}", "1")


def test_every_route_is_described_and_every_description_is_a_route(document: Any, service: Any) -> None:
    described = operations(document)
    asking = {key for key in described if target_of(filled(key[1]))}
    assert all(method == "post" for method, _ in asking)
    routes = {(method, path) for method, path in known_to_fastapi(service) if method != "head" and path not in FILES}
    assert described.keys() - asking == routes
    for protocol in ("/predict", "/models/{name}/predict", "/v1/models/{name}:predict", "/v2/models/{name}/infer"):
        assert ("post", protocol) in asking
    assert len({target_of(filled(path)) for _, path in asking}) == len(asking)


def test_every_route_is_reached_as_it_is_described(document: Any, service: Any) -> None:
    for method, path in operations(document):
        status = service.request(method, filled(path)).status_code
        assert status not in (404, 405) or path == "/predict", path  # which has no default model here


def test_every_operation_has_a_name_of_its_own_and_words(document: Any) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    each = list(operations(document).values())
    assert all(operation["summary"] and set(operation["tags"]) <= tags for operation in each)
    assert len({operation["operationId"] for operation in each}) == len(each)
    assert all(re.fullmatch(r"[a-z0-9_]+", operation["operationId"]) for operation in each)


def test_a_path_and_its_parameters_agree(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        in_path = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
        assert in_path == re.findall(r"{(\w+)}", path)
        assert all(each["required"] for each in operation["parameters"] if each["in"] == "path")


def test_every_reference_leads_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    used = set(re.findall(r"'#/components/schemas/(\w+)'", str(document)))
    assert used == set(schemas)


def test_what_asks_a_model_names_every_refusal(document: Any) -> None:
    from bln_serve.serving.statuses import STATUSES

    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for (method, path), operation in operations(document).items():
        if method == "post":
            assert {str(int(status)) for status in STATUSES.values()} | {"200", "401"} == operation["responses"].keys()
            names = {each["name"] for each in operation["parameters"]}
            assert {"mini_batch_rows", "bln-timeout-ms"} <= names
            assert ("inference-header-content-length" in names) == path.endswith("/infer")
        refusals = {status: each for status, each in operation["responses"].items() if status[0] in "45"}
        if "ready" not in path:
            assert all(each["content"] == error for each in refusals.values()), path


def test_the_formats_of_each_protocol(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        if body := operation.get("requestBody"):
            other = {"infer": {"application/octet-stream"}, "v1": set()}
            kind = "infer" if path.endswith("/infer") else "v1" if path.startswith("/v1") else ""
            formats = {"application/json", *other.get(kind, {"application/x-npy"})}
            assert set(body["content"]) == set(operation["responses"]["200"]["content"]) == formats


def test_a_token_is_optional_and_health_never_needs_one(document: Any) -> None:
    assert document["security"] == [{}, {"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for (_, path), operation in operations(document).items():
        is_open = path in ("/healthz", "/readyz")
        assert (operation.get("security") == []) == is_open == ("401" not in operation["responses"])


def test_the_examples_are_answered(document: Any, service: Any) -> None:
    asked = 0
    for (_, path), operation in operations(document).items():
        if not (body := operation.get("requestBody")) or "{name}" not in path:
            continue
        parameters = {
            each["name"]: each.get("examples", {}) for each in operation["parameters"] if each["in"] == "path"
        }
        for model, example in body["content"]["application/json"]["examples"].items():
            url = path.replace("{name}", parameters["name"][model]["value"])
            if "{version}" in path:
                url = url.replace("{version}", parameters["version"][model]["value"])
            answer = service.post(url, json=example["value"], headers={"content-type": "application/json"})
            assert answer.status_code == 200, (url, answer.text)
            asked += 1
    assert asked == 6 * 7


def test_the_description_of_one_request_does_not_leak_into_the_next(service: Any) -> None:
    assert service.get("/openapi.json").content == service.get("/openapi.json").content
    assert "digits_cnn" not in str(OPERATIONS)
