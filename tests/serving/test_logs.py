"""What a line of the log holds, as text and as JSON, whatever clients and files put into it."""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bln_serve.errors import UsageError
from bln_serve.serving import logs
from bln_serve.serving.settings import make


def scope_of(path: str = "/predict", **headers: str) -> dict[str, Any]:
    sent = {"x-request-id": "me", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
    return {"type": "http", "method": "POST", "path": path, "headers": pairs}


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., logging.Logger]]:
    """Set the log up as a service does, and give it back as it was."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    handlers, level, uvicorns = root.handlers[:], root.level, uvicorn.level
    monkeypatch.setattr(root, "handlers", [])

    def configure_as(log_format: Any) -> logging.Logger:
        logs.configure(log_format)
        return logging.getLogger("bln_serve.somewhere")

    yield configure_as
    root.handlers[:] = handlers
    root.setLevel(level)
    uvicorn.setLevel(uvicorns)


def line_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\n")
    (line,) = out[:-1].split("\n")
    return dict(json.loads(line))


def test_text_is_the_sentence_alone(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = configure("text")
    logger.info("serving %s version %d", "digits", 3, extra=logs.of_request(scope_of(), status=200))
    logger.debug("not said")
    logging.getLogger("uvicorn.error").info("not said either")
    logging.getLogger("uvicorn.error").warning("said")
    assert capsys.readouterr() == ("serving digits version 3\nsaid\n", "")


def test_json_has_what_every_line_has_and_no_more(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    configure("json").warning("note: %s", "a\nb", extra={"secret": 1})
    line = line_of(capsys)
    when = line.pop("time")
    assert line == {"level": "WARNING", "logger": "bln_serve.somewhere", "message": "note: a\nb"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", when)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()) < 60


def test_json_says_of_a_request_what_is_known(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    scope = scope_of(traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    said = logs.of_request(scope, status=504, duration_s=1.5, model="digits", reason="DeadlineExceeded")
    configure("json").warning("late", extra=said)
    line = line_of(capsys)
    assert re.fullmatch("[0-9a-f]{16}", line.pop("span_id"))
    assert {name: line[name] for name in list(line)[4:]} == {
        "request_id": "me",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "method": "POST",
        "path": "/predict",
        "status": 504,
        "duration_s": 1.5,
        "model": "digits",
        "reason": "DeadlineExceeded",
    }
    configure("json").info("no more of it", extra=logs.of_request(scope_of()))
    assert list(line_of(capsys)) == ["time", "level", "logger", "message", "request_id", "method", "path"]


def test_json_has_a_traceback_in_one_string(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = configure("json")
    try:
        raise ZeroDivisionError("of what")
    except ZeroDivisionError:
        logger.exception("it failed")
    error = line_of(capsys)["error"]
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith("ZeroDivisionError: of what")


@pytest.mark.parametrize(
    "text", ["\udcff of no encoding", "\u2028 \x85 \x1b[31m \x00", '"}\n{"level": "ERROR"}', "ä 数"]
)
def test_json_is_one_object_a_line_whatever_stands_in_it(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    configure("json").error("error: %s", text, extra=logs.of_request(scope_of(), model=text, reason=object()))
    line = line_of(capsys)
    assert line["level"] == "ERROR"
    assert line["model"] == text.replace("\udcff", "\\udcff")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/models/digits:predict", "/v1/models/digits:predict"),
        ("/a\nerror: b", "/a%0Aerror:%20b"),
        ("/\x1b[2J\x85\u2028\x7f", "/%1B%5B2J%C2%85%E2%80%A8%7F"),
        ("/ä%2f\udcff", "/%C3%A4%252f%3F"),
        ("/" + "x" * 600, "/" + "x" * 511 + "..."),
    ],
)
def test_a_path_cannot_end_a_line_nor_hide_in_it(path: str, shown: str) -> None:
    assert logs.path_of({"path": path}) == shown
    assert logs.of_request(scope_of(path))["path"] == shown


def test_lines_go_to_stdout_and_once(
    configure: Callable[..., logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    configure("text")
    configure("text").info("once")
    assert capsys.readouterr() == ("once\n", "")
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.stream is sys.stdout


def test_the_formats_are_two(tmp_path: Path) -> None:
    assert make().log_format == "text"
    with pytest.raises(UsageError, match=r"--log-format \(BLN_SERVE_LOG_FORMAT\) to be 'text' or 'json'\. R.*'xml'"):
        make(paths=[tmp_path], log_format="xml")
