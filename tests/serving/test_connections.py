"""What connections.py relies on in uvicorn and httptools, so that a release that moves it is noticed here first.

What the connections do is tested byte by byte in tests/e2e/test_connections.py.
"""

import asyncio
import contextlib
import inspect
import unittest.mock
from collections.abc import Iterator
from typing import Any

import httptools
import pytest
import uvicorn
from support.queues import Loop, turns
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from bln_serve.serving.connections import LINGER_S, Connection

OVERRIDDEN = sorted(
    name for name, value in vars(Connection).items() if inspect.isfunction(value) and hasattr(HttpToolsProtocol, name)
)


def a_transport() -> Any:
    transport = unittest.mock.create_autospec(asyncio.Transport, instance=True)
    transport.get_extra_info.return_value = None
    transport.is_closing.return_value = False
    return transport


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


def test_a_connection_that_is_gone_leaves_the_loop_no_timer(connection: Connection) -> None:
    """Many short connections would otherwise leave one each, for as long as a client may be silent."""
    with contextlib.closing(Loop()) as loop:
        transport = a_transport()
        gone = Connection(connection.config, ServerState(), {}, loop, idle_timeout_s=3)
        gone.connection_made(transport)
        assert [timer.cancelled() for timer in loop.timers] == [False]
        transport.is_closing.return_value = True
        gone.connection_lost(None)
        assert [timer.cancelled() for timer in loop.timers] == [True]


@pytest.mark.parametrize(
    ("request_head", "answer_head", "at_once"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", [(b"connection", b"close")], False),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", [], True),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", [(b"connection", b"close")], True),
        (b"GET / HTTP/1.0\r\n\r\n", [], True),
        (b"GET / HTTP/1.1\r\n\r\n", [], None),
    ],
    ids=["the service ends it", "the client ends it", "both end it", "an old client", "nobody ends it"],
)
def test_what_a_client_may_have_sent_meanwhile_is_read_before_its_connection_is_closed(
    request_head: bytes, answer_head: list[tuple[bytes, bytes]], at_once: bool | None
) -> None:
    """Closed with that unread, it would be reset, and the answer lost on its way to the client."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"1"), *answer_head]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        transport = a_transport()
        connection = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}, loop, idle_timeout_s=60)
        connection.connection_made(transport)
        connection.data_received(request_head)
        await turns(10)
        assert transport.write.called
        assert (transport.close.called, transport.write_eof.called) == (at_once is True, at_once is False)
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())


LAST = b"GET /last HTTP/1.1\r\n\r\n"
BEGUN = b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"


@pytest.mark.parametrize(
    "segments",
    [
        [LAST],
        [LAST, LAST],
        [LAST + LAST],
        [LAST * 3],
        [LAST + BEGUN],
        [LAST, BEGUN],
        [LAST + BEGUN, b"def"],
        [LAST, b"nonsense"],
        [LAST + b"nonsense"],
        [LAST + BEGUN, b"nonsense"],
        [LAST + b"GET"],
        [LAST, b"GET"],
    ],
)
@pytest.mark.parametrize("draining", [False, True])
def test_whatever_comes_after_an_answer_that_is_the_last_the_connection_ends_soon(
    segments: list[bytes], draining: bool
) -> None:
    """Neither never nor only when a client has been silent for long enough; and nothing more is answered."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if draining:  # for longer than idle connections are left alone
            await asyncio.sleep(1)
        await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x"})

    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        transport = a_transport()
        connection = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}, loop, idle_timeout_s=60)
        connection.connection_made(transport)
        if draining:
            connection.shutdown()
        for segment in segments:
            connection.data_received(segment)
            await turns(10)
        if draining:
            loop.pass_time(1)
            await turns(10)
        assert b"".join(call.args[0] for call in transport.write.call_args_list).count(b"HTTP/1.1 413") == 1
        transport.write_eof.assert_called_once()
        transport.close.assert_not_called()
        loop.pass_time(0.5 if draining else LINGER_S)
        await turns(10)
        transport.close.assert_called_once()
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())
        loop = runner.get_loop()
        assert isinstance(loop, Loop)
        assert not loop.troubles


CHUNKED = b"POST /early HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"


def test_the_rest_of_a_body_that_was_answered_must_come_soon_however_little_of_it_comes() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        transport = a_transport()
        connection = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}, loop, idle_timeout_s=60)
        connection.connection_made(transport)
        for segment in (CHUNKED, b"1", b"0"):  # of the size of a chunk
            connection.data_received(segment)
            await turns(10)
        transport.close.assert_not_called()
        loop.pass_time(LINGER_S)
        await turns(10)
        transport.close.assert_called_once()
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())


def test_nobody_is_asked_for_a_body_after_its_refusal(caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append((await receive())["type"])

    async def body() -> None:
        transport = a_transport()
        loop = asyncio.get_running_loop()
        connection = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}, loop, idle_timeout_s=60)
        connection.connection_made(transport)
        connection.data_received(CHUNKED.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n") + b"no size\r\n")
        await turns(10)
        assert events == ["http.disconnect"]
        (written,) = (call.args[0] for call in transport.write.call_args_list)
        assert written.startswith(b"HTTP/1.1 400 ")
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())
    assert [record.levelname for record in caplog.records if record.exc_info] == []


def test_a_request_behind_one_whose_application_failed_is_given_up() -> None:
    """It had its answer already; the next one's, which cannot be sent any more, is no second error."""
    given_up: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/last":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
            await asyncio.sleep(0)
            raise ZeroDivisionError
        while (event := await receive())["type"] != "http.disconnect":
            assert event["type"] == "http.request"
        given_up.append(True)

    async def body() -> None:
        transport = a_transport()
        loop = asyncio.get_running_loop()
        connection = Connection(uvicorn.Config(app, log_config=None), ServerState(), {}, loop, idle_timeout_s=60)
        connection.connection_made(transport)
        connection.data_received(LAST + BEGUN)
        await turns(20)
        assert given_up == [True]
        connection.connection_lost(None)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())


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
