"""A request and its answer on a connection: uvicorn's, for the price of what nearly all of them need.

    body      a request that comes in one part is not copied
    answer    head and body leave in one write: ASGI has servers wait with the head until the body comes
              (https://asgi.readthedocs.io/en/latest/specs/www.html#response-start-send-event). What a head says is
              checked once, and remembered

Whatever is not of this kind, such as an answer that is large, in several parts, without its length or to HEAD, goes
uvicorn's way.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

ONE_WRITE_BYTES = 64 * 1024
"""The largest body that is copied behind its head, which costs less than a second write."""

_FRAMING = (b"connection", b"transfer-encoding")


class Cycle(RequestResponseCycle):
    """One request and its answer.

    Args:
        scope: ASGI's.
        transport: to the client.
        flow: of the connection.
        logger: told of what the application raises.
        default_headers: that each answer has.
        expect_100_continue: whether the client waits to be asked for the body.
        keep_alive: whether the connection goes on after the answer.
        on_response: called after the answer.
    """

    body: Any  # bytes while it is one part, otherwise a bytearray

    def __init__(
        self,
        *,
        scope: Any,
        transport: asyncio.Transport,
        flow: FlowControl,
        logger: logging.Logger,
        default_headers: list[tuple[bytes, bytes]],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
    ) -> None:
        super().__init__(
            scope=scope,
            transport=transport,
            flow=flow,
            logger=logger,
            access_logger=logger,
            access_log=False,
            default_headers=default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expect_100_continue,
            keep_alive=keep_alive,
            on_response=on_response,
        )
        self._start: Any = None

    def take(self, body: bytes) -> int:
        """Take a part of the body, and return how many bytes wait to be read."""
        if not self.body:
            self.body = body
        elif type(self.body) is bytes:
            self.body = bytearray().join((self.body, body))
        else:
            self.body += body
        self.message_event.set()
        return len(self.body)

    async def send(self, message: Any) -> None:
        """Take an event of the answer, as ASGI has it."""
        if self.response_started:
            await super().send(message)
        elif message["type"] == "http.response.start":
            self._start = message
        elif self._start is None:
            await super().send(message)  # which says what is wrong
        elif self.disconnected or self.flow.write_paused or (answer := self._whole(self._start, message)) is None:
            await super().send(self._start)
            await super().send(message)
        else:
            self._start = None
            self.response_started = self.response_complete = True
            self.waiting_for_100_continue = False
            self.transport.write(answer)
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def _whole(self, start: Mapping[str, Any], message: Mapping[str, Any]) -> bytes | None:
        """Return an answer of the common kind as it is sent; None for another."""
        body: bytes = message.get("body", b"")
        if message.get("more_body") or len(body) > ONE_WRITE_BYTES or self.scope["method"] == "HEAD":
            return None
        parts = [STATUS_LINE[start["status"]]]
        length = None
        for name, value in (*self.default_headers, *start.get("headers", ())):
            if (line := _line(name, value)) is None:
                return None
            if name == b"content-length":
                if length is not None:
                    return None
                length = value
            parts.append(line)
        if length != b"%d" % len(body):
            return None
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        parts.append(body)
        return b"".join(parts)


@lru_cache(maxsize=1024)
def _line(name: bytes, value: bytes) -> bytes | None:
    """Return a header's line; None where it is uvicorn's to see what it does to the answer, or to refuse it."""
    name = name.lower()
    if name in _FRAMING or HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
        return None
    return name + b": " + value + b"\r\n"
