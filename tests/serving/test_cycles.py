"""A request and its answer, byte for byte as uvicorn's own has it."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from support.queues import in_time, turns
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from bln_serve.serving import cycles
from bln_serve.serving.cycles import ONE_WRITE_BYTES, Cycle

JSON = (b"content-type", b"application/json")
DATE = (b"date", b"Sun, 22 Nov 2026 12:00:00 GMT")


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def resume_reading(self) -> None: ...


class Exchange:
    """One cycle of either class, and what comes of it."""

    def __init__(self, kind: type[RequestResponseCycle], *, method: str = "POST", keep_alive: bool = True) -> None:
        self.transport = Transport()
        self.flow = FlowControl(self.transport)  # type: ignore[arg-type]
        self.answered = 0
        what: dict[str, Any] = {
            "scope": {"type": "http", "method": method},
            "transport": self.transport,
            "flow": self.flow,
            "logger": logging.getLogger("test"),
            "default_headers": [DATE],
            "expect_100_continue": True,
            "keep_alive": keep_alive,
            "on_response": self._count,
        }
        if kind is RequestResponseCycle:
            what |= {"access_logger": None, "access_log": False, "message_event": asyncio.Event()}
        self.cycle = kind(**what)

    def _count(self) -> None:
        self.answered += 1

    async def send(self, events: Iterable[dict[str, Any]]) -> str:
        """Send these, and return what that raised."""
        try:
            for event in events:
                await self.cycle.send(event)  # type: ignore[arg-type]
        except Exception as error:
            return repr(error)
        return ""

    @property
    def outcome(self) -> tuple[Any, ...]:
        cycle = self.cycle
        states = (
            cycle.response_started,
            cycle.response_complete,
            cycle.message_event.is_set(),
            cycle.waiting_for_100_continue,
        )
        return b"".join(self.transport.writes), self.transport.closed, self.answered, *states


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


def body(data: bytes = b"", **more: Any) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, **more}


def length(count: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % count


WHOLE = {
    "an answer": [start(JSON, length(2)), body(b"{}")],
    "with an id": [start(JSON, length(2), (b"x-request-id", b"a b")), body(b"{}")],
    "an error's": [start(JSON, length(2), status=422), body(b"{}")],
    "of a status without a name": [start(length(2), status=499), body(b"{}")],
    "empty": [start(length(0)), body()],
    "a name in capitals": [start((b"Content-Type", b"x"), length(1)), body(b"x")],
    "as large as may be": [start(length(ONE_WRITE_BYTES)), body(bytes(ONE_WRITE_BYTES))],
}
OTHER = {
    "larger": [start(length(ONE_WRITE_BYTES + 1)), body(bytes(ONE_WRITE_BYTES + 1))],
    "in parts": [start(length(4)), body(b"ab", more_body=True), body(b"cd")],
    "in parts without a length": [start(), body(b"ab", more_body=True), body(b"cd")],
    "without a length": [start(JSON), body(b"{}")],
    "its length in capitals": [start((b"Content-Length", b"2")), body(b"{}")],
    "without headers": [{"type": "http.response.start", "status": 200}, body(b"{}")],
    "with nothing": [start(status=204), body()],
    "chunked": [start((b"transfer-encoding", b"chunked")), body(b"{}")],
    "that closes": [start(length(2), (b"connection", b"close")), body(b"{}")],
    "that keeps alive": [start(length(2), (b"connection", b"keep-alive")), body(b"{}")],
    "longer than its length": [start(length(1)), body(b"{}")],
    "shorter than its length": [start(length(3)), body(b"{}")],
    "a header's name with a line's end": [start((b"a\r\nb", b"c"), length(2)), body(b"{}")],
    "a header's value with a line's end": [start((b"a", b"b\r\nc: d"), length(2)), body(b"{}")],
    "no start": [body(b"{}")],
    "two lengths": [start(length(2), length(3)), body(b"{}")],
    "two lengths, the first of which is wrong": [start(length(3), length(2)), body(b"{}")],
    "two bodies": [start(length(2)), body(b"{}"), body(b"{}")],
}


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("method", ["POST", "HEAD"])
@pytest.mark.parametrize("events", (WHOLE | OTHER).values(), ids=(WHOLE | OTHER).keys())
@in_time
async def test_what_is_sent_is_what_uvicorn_sends(events: list[dict[str, Any]], method: str, keep_alive: bool) -> None:
    ours, theirs = (Exchange(kind, method=method, keep_alive=keep_alive) for kind in (Cycle, RequestResponseCycle))
    assert await ours.send(events) == await theirs.send(events)
    assert ours.outcome == theirs.outcome


@pytest.mark.parametrize("events", WHOLE.values(), ids=WHOLE.keys())
@in_time
async def test_the_common_kind_leaves_in_one_write(events: list[dict[str, Any]]) -> None:
    for _ in range(2):  # what a head says is remembered from the second on
        exchange = Exchange(Cycle)
        assert await exchange.send(events) == ""
        assert len(exchange.transport.writes) == 1
        assert exchange.answered == 1


@in_time
async def test_a_head_waits_for_its_body_and_another_one_may_take_its_place() -> None:
    """As where an application fails after it began, and what it had to say is still unsaid."""
    exchange = Exchange(Cycle)
    assert await exchange.send([start(length(9))]) == ""
    assert exchange.outcome == (b"", False, 0, False, False, False, True)
    assert await exchange.send([start(length(2), status=500), body(b"no")]) == ""
    assert exchange.outcome[0].startswith(b"HTTP/1.1 500 Internal Server Error\r\n")


@in_time
async def test_an_application_that_fails_after_its_head_is_a_500() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(length(2)))
        raise ZeroDivisionError

    exchange = Exchange(Cycle)
    await exchange.cycle.run_asgi(app)
    assert exchange.outcome[0].startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert exchange.answered == 1


@in_time
async def test_a_client_that_takes_nothing_more_is_waited_for() -> None:
    exchange = Exchange(Cycle)
    exchange.flow.pause_writing()
    task = asyncio.create_task(exchange.send(WHOLE["an answer"]))
    await turns(10)
    assert exchange.transport.writes == []
    exchange.flow.resume_writing()
    assert await task == ""
    expected = Exchange(RequestResponseCycle)
    await expected.send(WHOLE["an answer"])
    assert exchange.outcome == expected.outcome


@in_time
async def test_a_client_that_is_gone_gets_nothing() -> None:
    exchange = Exchange(Cycle)
    exchange.cycle.disconnected = True
    assert await exchange.send(WHOLE["an answer"]) == ""
    assert exchange.transport.writes == []


@pytest.mark.parametrize("parts", [[b"abc"], [b"a", b"", b"bc"], [b"", b"abc"], [b"a", b"b", b"c"]])
@in_time
async def test_a_body_is_read_as_it_came(parts: list[bytes]) -> None:
    cycle = Exchange(Cycle).cycle
    assert isinstance(cycle, Cycle)
    for number, part in enumerate(parts):
        assert cycle.take(part) == len(b"".join(parts[: number + 1]))
    cycle.more_body = False
    assert await cycle.receive() == {"type": "http.request", "body": b"abc", "more_body": False}


@in_time
async def test_a_body_is_read_while_it_comes() -> None:
    cycle = Exchange(Cycle).cycle
    assert isinstance(cycle, Cycle)
    for part in (b"ab", b"c"):
        assert cycle.take(part) == len(part)
        assert await cycle.receive() == {"type": "http.request", "body": part, "more_body": True}
    cycle.more_body = False
    cycle.message_event.set()
    assert await cycle.receive() == {"type": "http.request", "body": b"", "more_body": False}


@in_time
async def test_a_body_in_one_part_is_not_copied() -> None:
    cycle, data = Exchange(Cycle).cycle, b"abc"
    assert isinstance(cycle, Cycle)
    cycle.take(data)
    assert (await cycle.receive())["body"] is data  # type: ignore[typeddict-item]


def test_what_a_client_can_say_does_not_grow_what_is_remembered() -> None:
    for number in range(5000):
        cycles._line(b"x-request-id", b"%d" % number)
    assert cycles._line.cache_info().currsize <= 1024
