"""How a connection ends: what its client may still have sent is read first, and for no longer than that takes.

On a loop whose time the tests pass, with a transport that notes what it is told.
"""

import asyncio
import unittest.mock
from typing import Any

import pytest
import uvicorn
from support.queues import in_time, the_loop, turns
from uvicorn.server import ServerState

from bln_serve.serving.connections import LINGER_S, Connection

LAST = b"GET /last HTTP/1.1\r\n\r\n"
BEGUN = b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"
CHUNKED = b"POST /early HTTP/1.1\r\ntransfer-encoding: chunked\r\n"
SILENCE_S = 60


class Client:
    """A client of an application, connected within the running loop.

    Args:
        app: what answers.
    """

    def __init__(self, app: Any) -> None:
        self.transport = unittest.mock.create_autospec(asyncio.Transport, instance=True)
        self.transport.get_extra_info.return_value = None
        self.transport.is_closing.side_effect = lambda: self.closed
        config = uvicorn.Config(app, log_config=None)
        self.connection = Connection(config, ServerState(), {}, the_loop(), idle_timeout_s=SILENCE_S)
        self.connection.connection_made(self.transport)

    async def send(self, *segments: bytes) -> None:
        for segment in segments:
            self.connection.data_received(segment)
            await turns(20)

    async def wait(self, seconds: float) -> None:
        the_loop().pass_time(seconds)
        await turns(20)

    def leave(self) -> None:
        self.transport.is_closing.side_effect = lambda: True
        self.connection.connection_lost(None)

    @property
    def closed(self) -> bool:
        return bool(self.transport.close.called)

    @property
    def half_closed(self) -> bool:
        return bool(self.transport.write_eof.called) and not self.closed

    @property
    def received(self) -> bytes:
        return b"".join(call.args[0] for call in self.transport.write.call_args_list)


async def answer(send: Any, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"1"), *headers]})
    await send({"type": "http.response.body", "body": b"x"})


@pytest.mark.parametrize(
    ("request_head", "answer_head", "end"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", [(b"connection", b"close")], "half"),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", [], "whole"),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", [(b"connection", b"close")], "whole"),
        (b"GET / HTTP/1.0\r\n\r\n", [], "whole"),
        (b"GET / HTTP/1.1\r\n\r\n", [], "none"),
    ],
    ids=["the service ends it", "the client ends it", "both end it", "an old client", "nobody ends it"],
)
@in_time
async def test_what_a_client_may_have_sent_meanwhile_is_read_before_its_connection_is_closed(
    request_head: bytes, answer_head: list[tuple[bytes, bytes]], end: str
) -> None:
    """Closed with that unread, it would be reset, and the answer lost on its way to the client."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 200, *answer_head)

    client = Client(app)
    await client.send(request_head)
    assert client.received.endswith(b"x")
    assert (client.closed, client.half_closed) == (end == "whole", end == "half")
    client.leave()


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
@in_time
async def test_whatever_comes_after_an_answer_that_is_the_last_the_connection_ends_soon(
    segments: list[bytes], draining: bool
) -> None:
    """Neither never nor only when a client has been silent for long enough; and nothing more is answered."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if draining:  # for longer than idle connections are left alone
            await asyncio.sleep(1)
        await answer(send, 413, (b"connection", b"close"))

    client = Client(app)
    if draining:
        client.connection.shutdown()
    await client.send(*segments)
    if draining:
        await client.wait(1)
    assert client.received.count(b"HTTP/1.1 413") == 1
    assert client.half_closed
    await client.wait(0.5 if draining else LINGER_S)
    assert client.closed
    client.leave()


@in_time
async def test_the_rest_of_a_body_that_was_answered_must_come_soon_however_little_of_it_comes() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 404)

    client = Client(app)
    await client.send(CHUNKED + b"\r\n", b"1", b"0")  # of the size of a chunk
    assert not client.closed
    await client.wait(LINGER_S)
    assert client.closed
    client.leave()


@in_time
async def test_nobody_is_asked_for_a_body_after_its_refusal() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append((await receive())["type"])

    client = Client(app)
    await client.send(CHUNKED + b"expect: 100-continue\r\n\r\n" + b"no size\r\n")
    assert events == ["http.disconnect"]
    assert client.received.startswith(b"HTTP/1.1 400 ")
    assert b"100 Continue" not in client.received
    client.leave()


@in_time
async def test_a_request_behind_one_whose_application_failed_is_given_up() -> None:
    """It had its answer already; the next one's, which cannot be sent any more, is no second error."""
    given_up: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/last":
            await answer(send, 200)
            await asyncio.sleep(0)
            raise ZeroDivisionError
        while (event := await receive())["type"] != "http.disconnect":
            assert event["type"] == "http.request"
        given_up.append(True)

    client = Client(app)
    await client.send(LAST + BEGUN)
    assert given_up == [True]
    client.leave()


@in_time
async def test_a_connection_that_is_gone_leaves_the_loop_no_timer() -> None:
    """Many short connections would otherwise leave one each, for as long as a client may be silent."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    client = Client(app)
    assert [timer.cancelled() for timer in the_loop().timers] == [False]
    client.leave()
    assert [timer.cancelled() for timer in the_loop().timers] == [True]
