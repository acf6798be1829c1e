"""What connections.py relies on in uvicorn and httptools, so that a release that moves it is noticed here first.

What the connections do is tested byte by byte in tests/e2e/connections.
"""

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from bln_serve.serving.connections import Connection

OVERRIDDEN = sorted(
    name for name, value in vars(Connection).items() if inspect.isfunction(value) and hasattr(HttpToolsProtocol, name)
)


@pytest.fixture
def connection() -> Iterator[Connection]:
    async def nothing(scope: Any, receive: Any, send: Any) -> None: ...

    loop = asyncio.new_event_loop()
    yield Connection(
        config=uvicorn.Config(nothing, log_config=None),
        server_state=ServerState(),
        app_state={},
        _loop=loop,
        idle_timeout_s=3,
    )
    loop.close()


def test_what_is_overridden_is_there_and_takes_the_same() -> None:
    assert OVERRIDDEN == [
        "__init__",
        "_unsupported_upgrade_warning",
        "connection_lost",
        "connection_made",
        "data_received",
        "on_body",
        "on_headers_complete",
        "on_message_complete",
        "on_response_complete",
        "send_400_response",
        "shutdown",
    ]
    for name in OVERRIDDEN[1:]:
        ours, theirs = getattr(Connection, name), getattr(HttpToolsProtocol, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


def test_a_connection_has_what_is_asked_of_it(connection: Connection) -> None:
    for name in (
        "loop",
        "parser",
        "pipeline",
        "cycle",
        "flow",
        "transport",
        "expect_100_continue",
        "app",
        "server_state",
    ):
        assert name in vars(connection), name
    assert callable(connection._start_asgi_task)
    connection.on_message_begin()
    assert (connection.url, connection.headers) == (b"", [])


def test_a_request_s_cycle_has_what_is_asked_of_it() -> None:
    cycle = RequestResponseCycle(**dict.fromkeys(inspect.signature(RequestResponseCycle).parameters))
    for name in ("keep_alive", "more_body", "response_complete", "disconnected", "message_event", "transport"):
        assert name in vars(cycle), name
    assert (cycle.body, cycle.response_started) == (b"", False)
    for name in ("pause_reading", "resume_reading"):
        assert callable(getattr(FlowControl, name))
    assert httptools_impl.STATUS_LINE[400] == b"HTTP/1.1 400 Bad Request\r\n"


def test_an_exception_in_a_callback_is_the_parser_s_error_s_context() -> None:
    class Refusing:
        def on_headers_complete(self) -> None:
            raise ZeroDivisionError

    parser = httptools.HttpRequestParser(Refusing())
    with pytest.raises(httptools.HttpParserCallbackError) as raised:
        parser.feed_data(b"GET / HTTP/1.1\r\n\r\n")
    assert isinstance(raised.value.__context__, ZeroDivisionError)
