"""Who may ask, and by which id a request is known, from the first layer to the answer and the log."""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bln_serve.errors import DeadlineExceededError, OverloadedError, RunError
from bln_serve.serving import gate as gate_module
from bln_serve.serving import request_ids
from bln_serve.serving.gate import Gate
from bln_serve.serving.logs import JsonFormatter
from bln_serve.serving.served_model import ServedModel
from bln_serve.serving.tokens import Tokens

TOKEN = "0123456789abcdef"
RIGHT = {"authorization": f"Bearer {TOKEN}"}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
BODY = {"instances": [[[0.0] * 8] * 8]}
GENERATED = re.compile("[0-9a-f]{16}")


@pytest.fixture
def closed(repository: Callable[..., Path], start: Callable[..., Any], tmp_path_factory: Any) -> Any:
    """A service with a token."""
    file = tmp_path_factory.mktemp("secrets") / "tokens"
    file.write_text(f"{TOKEN}\n")
    return start(paths=[repository("digits_cnn")], token_file=file)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ServedModel, "answer", fail)


def routes_of(service: Any) -> list[tuple[str, str]]:
    """Every route that is described, with names filled in, and some that are not there."""
    paths = service.request("GET", "/openapi.json", headers=RIGHT).json()["paths"]
    found = [
        (method.upper(), path.replace("{name}", "digits_cnn").replace("{version}", "1"))
        for path, methods in paths.items()
        for method in methods
        if method in {"get", "post"}
    ]
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/"), ("POST", "/nowhere"), ("GET", "/predict")]


def test_every_route_but_two_needs_a_token(closed: Any) -> None:
    routes = routes_of(closed)
    assert {("POST", "/predict"), ("GET", "/metrics"), ("GET", "/v2/health/live"), ("GET", "/healthz")} < set(routes)
    for method, path in [*routes, ("GET", "/healthz/"), ("GET", "//readyz"), ("GET", "/readyz/x"), ("GET", "/Healthz")]:
        answer = closed.request(method, path)
        if path in {"/healthz", "/readyz"}:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert GENERATED.fullmatch(answer.headers["x-request-id"])
        assert answer.json().keys() == {"error"}
        assert answer.json()["error"].startswith("Expected a token of this service in the header Authorization: Bearer")
        assert closed.request(method, path, headers=RIGHT).status_code != 401
    assert closed.post("/predict", json=BODY, headers=RIGHT).status_code == 200


@pytest.mark.parametrize(
    "values",
    [
        [f"Basic {TOKEN}"],
        [f"Bearer {TOKEN}", f"Bearer {TOKEN}"],
        ["Bearer \xe9\xff"],
        [f"Bearer {TOKEN[:-1]}"],
        ["Bearer"],
        [""],
    ],
)
def test_a_wrong_token_is_refused_as_none_is(closed: Any, values: list[str]) -> None:
    headers = [(b"authorization", value.encode("latin-1")) for value in values]
    answer = closed.request("POST", "/predict", json=BODY, headers=headers)
    assert answer.status_code == 401
    assert answer.json() == closed.post("/predict", json=BODY).json()


def test_strangers_learn_of_readiness_yes_or_no(
    closed: Any, repository: Callable[..., Path], start: Callable[..., Any]
) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = closed.request("GET", "/readyz", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"ready": True})
    assert closed.request("GET", "/readyz", headers=RIGHT).json()["models"]
    folder = repository("digits_rnn/7")
    (folder / "digits_rnn" / "7" / "model.onnx").write_bytes(b"")
    broken = start(paths=[folder / "digits_rnn"], token_file=closed_token(folder))
    answer = broken.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})
    assert "SHA-256" in broken.request("GET", "/readyz", headers=RIGHT).text


def closed_token(folder: Path) -> Path:
    file = folder / "tokens"
    file.write_text(TOKEN)
    return file


def test_the_refusal_comes_before_the_body_is_read(closed: Any) -> None:
    async def body() -> Any:
        pytest.fail("the body was read")
        yield b""

    assert closed.post("/predict", content=body()).status_code == 401


def test_without_anything_to_do_the_gate_makes_no_coroutine_and_looks_at_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate_module, "given_id", None)
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    gate = Gate(app, Tokens(), log_requests=False)
    for scope in ({"type": "lifespan"}, {"type": "http", "headers": [(b"accept", b"x"), (b"traceparent", b"x")]}):
        before = dict(scope)
        call: Any = gate(scope, None, None)
        assert call.cr_code is app.__code__
        asyncio.run(call)
        assert scope == before
        assert seen.pop()[0] is scope


def test_an_answer_without_an_error_repeats_the_client_s_id_and_makes_none(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_ids, "RequestIds", None)  # making ids would fail
    for method, path, sent in (("POST", "/models/digits_cnn/predict", {"json": BODY}), ("GET", "/healthz", {})):
        answer = service.request(method, path, headers={"x-request-id": "abc 1"}, **sent)
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["abc 1"])
        for headers in ({}, {"x-request-id": "x" * 129}, {"traceparent": f"00-{TRACE}-{'1' * 16}-01"}):
            answer = service.request(method, path, headers=headers, **sent)
            assert answer.status_code == 200
            assert not {"x-request-id", "traceparent", "tracestate"} & set(answer.headers)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/models/nope/predict", 404),
        ("POST", "/models/digits_cnn/predict", 415),
        ("GET", "/predict", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/healthz", 405),
        ("GET", "/models/nope", 404),
    ],
)
def test_every_error_s_answer_has_one_id(service: Any, method: str, path: str, status: int) -> None:
    given = service.request(method, path, headers={"x-request-id": "abc"})
    assert (given.status_code, given.headers.get_list("x-request-id")) == (status, ["abc"])
    made = [service.request(method, path).headers.get_list("x-request-id") for _ in range(2)]
    assert all(len(ids) == 1 and GENERATED.fullmatch(ids[0]) for ids in made)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("error", "status", "level"),
    [
        (RunError("of the engine"), 500, "ERROR"),
        (ZeroDivisionError("of the engine"), 500, "ERROR"),
        (DeadlineExceededError("too late"), 504, "WARNING"),
        (OverloadedError("full"), 503, None),
    ],
)
def test_what_went_wrong_is_found_in_the_log_by_the_answer_s_id(
    *,
    service: Any,
    error: Exception,
    status: int,
    level: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_with(monkeypatch, error)
    headers = {"traceparent": f"00-{TRACE}-{'1' * 16}-01"}
    answer = service.post("/models/digits_cnn/predict", json=BODY, headers=headers)
    assert answer.status_code == status
    records = [record for record in caplog.records if record.name.startswith("bln_serve")]
    if level is None:
        assert records == []
        return
    (record,) = records
    request_id = answer.headers["x-request-id"]
    begin = "error" if status == 500 else "warning"
    assert record.getMessage() == f"{begin}: POST /models/digits_cnn/predict failed (request {request_id}): {error}"
    line = json.loads(JsonFormatter().format(record))
    assert ("error" in line) == (status == 500)
    assert "engine" not in answer.text
    expected = {
        "level": level,
        "request_id": request_id,
        "trace_id": TRACE,
        "method": "POST",
        "path": "/models/digits_cnn/predict",
        "status": status,
        "model": "digits_cnn",
        "reason": type(error).__name__.removesuffix("Error"),
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["duration_s"] < 60
    assert line["span_id"] not in {"1" * 16, request_id}


def test_a_request_that_fails_outside_a_model_is_logged_alike(
    repository: Callable[..., Path], start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    service = start(paths=[repository("digits_cnn")])
    service.app.add_api_route("/fails", _fails)
    answer = service.request("GET", "/fails", headers={"x-request-id": "abc"})
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["abc"])
    assert answer.json()["error"].startswith("Expected to be able to answer. Received: an error inside the service")
    (record,) = [record for record in caplog.records if record.name.startswith("bln_serve")]
    assert record.getMessage() == "error: GET /fails failed (request abc): of what"
    assert record.exc_info
    assert record.__dict__["status"] == 500


def _fails() -> None:
    raise ZeroDivisionError("of what")


def test_with_log_requests_every_request_has_a_line(
    repository: Callable[..., Path],
    start: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    tmp_path_factory: Any,
) -> None:
    caplog.set_level(logging.INFO, "bln_serve.serving.gate")
    tokens = closed_token(tmp_path_factory.mktemp("secrets"))
    service = start(paths=[repository("digits_cnn")], log_requests=True, token_file=tokens)
    caplog.clear()
    made = [
        service.post("/predict", json=BODY, headers={**RIGHT, "x-request-id": "one"}),
        service.post("/predict?secret=1", headers=RIGHT),
        service.get("/healthz"),
        service.get("/nowhere"),
    ]
    lines = [record.getMessage() for record in caplog.records if record.name == "bln_serve.serving.gate"]
    shown = [re.sub(r"\d+\.\d ms", "_ ms", line) for line in lines]
    assert shown[:2] == [
        "POST /predict 200 _ ms (request one)",
        f"POST /predict 400 _ ms (request {made[1].headers['x-request-id']})",
    ]
    assert re.fullmatch(r"GET /healthz 200 _ ms \(request [0-9a-f]{16}\)", shown[2])
    assert shown[3] == f"GET /nowhere 401 _ ms (request {made[3].headers['x-request-id']})"
    record = next(record for record in caplog.records if record.name == "bln_serve.serving.gate")
    assert (record.levelname, record.__dict__["status"], record.__dict__["method"]) == ("INFO", 200, "POST")
    assert 0 < record.__dict__["duration_s"] < 60


def test_without_log_requests_none_has_a_line(service: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bln_serve")
    service.get("/healthz")
    service.get("/nowhere")
    service.post("/models/digits_cnn/predict", json=BODY)
    assert [record for record in caplog.records if record.name.startswith("bln_serve")] == []


def test_a_client_that_leaves_has_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bln_serve")

    async def app(*_: Any) -> None:
        """Answer nothing, as for a client that closed its connection."""

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(_awaited(Gate(app, Tokens(), log_requests=True)(scope, None, None)))  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.getMessage().startswith("POST /predict 499 ")


async def _awaited(call: Any) -> None:
    await call
