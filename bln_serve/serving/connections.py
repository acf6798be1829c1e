"""A client's connection: uvicorn's, with an end to each wait for the client, and a bound to what it may send.

A connection waits for the client in three ways, and for none of them for ever:

    for a request's head     idle_timeout_s from its first byte; from the connection's start, or from the last answer,
                             for that byte. It may have MAX_HEAD_BYTES
    for its body             whoever reads it says how long; its framing (sizes of chunks, trailers) is bounded likewise
    for what nobody reads    the rest of a body that was answered before its end: LINGER_S, and LINGER_BYTES, which are
                             thrown away. Closing at once would reset the connection, and the client might never see
                             the answer (RFC 9112, section 9.6)

What it relies on in uvicorn's HttpToolsProtocol is held in tests/serving/test_connections.py.
"""

import asyncio
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
LINGER_S = 5
LINGER_BYTES = 128 * 1024 * 1024

# While the service ends: what a client sent on an idle connection before it could know.
_LAST_REQUESTS_S = 0.5


_TOO_LARGE = (
    f"Expected a request's head, or what frames its body, to have at most {MAX_HEAD_BYTES} bytes. Received: more. "
    "Send fewer and shorter headers."
)
_UPGRADE = (
    "Expected a request that stays with HTTP/1.1. Received: one with a body and the header Upgrade. Leave that header "
    "out (Java's HttpClient does so with version(HTTP_1_1))."
)


class _RefusalError(Exception):
    """Raised through the parser, which ends at it, with a status and a sentence."""


class Connection(HttpToolsProtocol):
    """One client's connection.

    Args:
        arguments: uvicorn's own.
        idle_timeout_s: how long a client may send nothing, where it is its turn.
        more: uvicorn's own.
    """

    def __init__(self, *arguments: Any, idle_timeout_s: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.timeout_keep_alive = cast("int", idle_timeout_s)  # uvicorn declares whole seconds, and needs none
        self._idle_timeout_s = idle_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._received = 0  # bytes since the head began, or since the last of the body
        self._refusal: bytes | None = None  # what is said after the answers that are still due
        self._unread: int | None = None  # how much more of a body that nobody reads is thrown away
        self._deaf = False  # nothing more is parsed
        self._draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", _Closing(transport, self._may_close))
        self._wait(self._idle_timeout_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if self._unread is not None:
            self._unread -= len(data)
            if self._unread < 0:
                self._hang_up()
                return
        if self._deaf:
            return
        self._received += len(data)
        super().data_received(data)
        if self._received > MAX_HEAD_BYTES and not self._deaf:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
        elif self._timer is None and self._answered and not self._deaf:
            self._wait(self._idle_timeout_s, self._give_up)

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        if self._received > MAX_HEAD_BYTES and _size(self.url, self.headers) > MAX_HEAD_BYTES:
            raise _RefusalError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LARGE)
        if self.parser.should_upgrade() and _has_body(self.headers):
            raise _RefusalError(HTTPStatus.BAD_REQUEST, _UPGRADE)  # the parser takes the body for the other protocol's
        self._received = 0
        self._stop_waiting()
        super().on_headers_complete()
        if self._draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._received = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self._received = 0
        self._unread = None
        if self._timer and self._answered:  # the rest of it was thrown away, and the next one may come
            self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on, once a request is answered."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal and self._answered:
            self._say(self._refusal)
        elif self._answered and self.cycle.more_body:
            self._throw_away()
            if self.expect_100_continue:  # the client may send its body all the same, or never: both end it
                self._close_politely()

    def shutdown(self) -> None:
        """End after what is asked already, as the service does; requests that are under way are not lost."""
        self._draining = True
        if self.cycle:
            self.cycle.keep_alive = False
        self.loop.call_later(_LAST_REQUESTS_S, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature, and its sentence
        """Refuse what is no HTTP, from within the handling of the parser's error."""
        error = sys.exception()
        if error and isinstance(error.__context__, _RefusalError):
            self._refuse(*error.__context__.args)
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, f"Expected a request in HTTP/1.1. Received: {_reason(error)}.")

    def _unsupported_upgrade_warning(self) -> None:
        # A request may ask for another protocol, and is answered in this one: no reason to say more.
        pass

    @property
    def _answered(self) -> bool:
        """Whether no request waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Answer what cannot be understood, after what came before it, and listen no more."""
        self._deaf = True
        refusal = _response(status, sentence)
        if not self._answered and (not self.cycle.more_body or self.pipeline):
            self._refusal = refusal
        else:
            self._say(refusal)

    def _say(self, refusal: bytes) -> None:
        self._refusal = None
        self.transport.write(refusal)
        if self.cycle and not self.cycle.response_complete:  # who reads its body must not answer, too
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._close_politely()

    def _may_close(self) -> bool:
        """Whether nothing is left to be read, so that closing is no reset; otherwise that is thrown away first."""
        if self._deaf or (self.cycle and self.cycle.more_body):
            self._close_politely()
            return False
        return True

    def _close_politely(self) -> None:
        """Say that nothing more will come, and throw away for a while what does."""
        self._deaf, self._refusal = True, None
        self.pipeline.clear()
        self._throw_away()
        self.transport.write_eof()

    def _throw_away(self) -> None:
        self._unread = LINGER_BYTES
        self.flow.resume_reading()
        seconds = min(LINGER_S, self._idle_timeout_s)
        self._wait(_LAST_REQUESTS_S if self._draining else seconds, self._hang_up)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        """End a connection that sent no request, or a part of one."""
        self._timer = None
        if self._answered:
            if self._received:
                sentence = f"Expected a request's whole head within {self._idle_timeout_s:g} s. Received: a part of it."
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"{sentence} Send it faster.")
            else:
                self._hang_up()

    def _close_if_idle(self) -> None:
        if self._answered or self._unread is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self._deaf = True
        self._stop_waiting()
        cast("_Closing", self.transport).close_now()


class _Closing:
    """A transport that asks before it closes.

    Args:
        transport: to the client.
        may_close: returns whether it may close now.
    """

    def __init__(self, transport: asyncio.Transport, may_close: Callable[[], bool]) -> None:
        self._transport = transport
        self._may_close = may_close
        self.write, self.is_closing = transport.write, transport.is_closing  # those that each request calls
        self.close_now = transport.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close, unless that is seen to otherwise."""
        if not self.is_closing() and self._may_close():
            self.close_now()


def _response(status: HTTPStatus, sentence: str) -> bytes:
    """Return a whole answer, after which its connection ends."""
    body = orjson.dumps({"error": sentence})
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body


def _size(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    return len(url) + sum(len(name) + len(value) + 4 for name, value in headers)


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def _reason(error: BaseException | None) -> str:
    """Return what the parser says; where a callback of it failed, that is the request's target."""
    if isinstance(error, httptools.HttpParserCallbackError):
        return "a target that is no path"
    return str(error or "something else")
