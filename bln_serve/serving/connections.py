"""A client's connection: uvicorn's, with an end to each wait for the client, and a bound to what it may send.

A connection waits for the client in three ways, and for none of them for ever:

    for a request's head     idle_timeout_s from its first byte, or from the first that comes apart from another
                             request's last; from the connection's start, or from the last answer, for that byte. It
                             may have MAX_HEAD_BYTES
    for its body             whoever reads it says how long; its framing (sizes of chunks, trailers) is bounded likewise
    for what nobody reads    the rest of a body that was answered before its end, and what may have been sent behind
                             an answer that is the last: LINGER_S, and LINGER_BYTES, which are thrown away. Closing at
                             once would reset the connection, and the client might never see the answer (RFC 9112,
                             section 9.6)

What it relies on in uvicorn's HttpToolsProtocol is held in tests/serving/test_connections.py.
"""

import asyncio
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bln_serve.serving import refusals
from bln_serve.serving.alarms import Alarm
from bln_serve.serving.cycles import Cycle
from bln_serve.serving.refusals import RefusalError

LINGER_S = 5
LINGER_BYTES = 128 * 1024 * 1024

# While the service ends: what a client sent on an idle connection before it could know.
_LAST_REQUESTS_S = 0.5


class Connection(HttpToolsProtocol):
    """One client's connection.

    Args:
        arguments: uvicorn's own.
        idle_timeout_s: how long a client may send nothing, where it is its turn.
        more: uvicorn's own.
    """

    def __init__(self, *arguments: Any, idle_timeout_s: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._idle_timeout_s = idle_timeout_s
        self._alarm = Alarm(self.loop)
        self._received = 0  # bytes since the head began, or since the last of the body
        self._refusal: bytes | None = None  # what is said after the answers that are still due
        self._unread: int | None = None  # how much more of a body that nobody reads is thrown away
        self._deaf = False  # nothing more is parsed
        self._client_stays = True  # and may send more, as it has not said that it will not
        self._draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", _Closing(transport, self._may_close))
        self._alarm.set(self._idle_timeout_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._alarm.end()
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
        begins = not self._received
        self._received += len(data)
        super().data_received(data)
        if self._received > refusals.MAX_HEAD_BYTES and not self._deaf:
            self._refuse(*refusals.TOO_LARGE)
        elif begins and self._received and self._answered and not self._deaf and self._unread is None:
            self._alarm.set(self._idle_timeout_s, self._give_up)

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        if self._received > refusals.MAX_HEAD_BYTES and refusals.size(self.url, self.headers) > refusals.MAX_HEAD_BYTES:
            raise RefusalError(*refusals.TOO_LARGE)
        if self.parser.should_upgrade() and refusals.has_body(self.headers):
            raise RefusalError(*refusals.UPGRADE)  # the parser takes the body for the other protocol's
        self._received = 0
        self._alarm.stop()
        before, self.cycle = self.cycle, self._new_cycle()
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._received = 0
        cycle = cast("Cycle", self.cycle)
        if not cycle.response_complete and cycle.take(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self._received = 0
        self._unread = None
        if self._answered:  # the rest of it was thrown away, and the next one may come
            self._alarm.set(self._idle_timeout_s, self._give_up)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on, once a request is answered."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._unread is None:
            self._alarm.set(self._idle_timeout_s, self._give_up)
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
        if error and isinstance(error.__context__, RefusalError):
            self._refuse(*error.__context__.args)
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, f"Expected a request in HTTP/1.1. Received: {refusals.reason(error)}.")

    def _unsupported_upgrade_warning(self) -> None:
        # A request may ask for another protocol, and is answered in this one: no reason to say more.
        pass

    def _new_cycle(self) -> Cycle:
        """Return what answers the request whose head has come."""
        scope, version, url = self.scope, self.parser.get_http_version(), httptools.parse_url(self.url)
        self._client_stays = version != "1.0" and self.parser.should_keep_alive()
        path = url.path.decode("ascii")
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        return Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            default_headers=self.server_state.default_headers,
            expect_100_continue=self.expect_100_continue,
            keep_alive=self._client_stays and not self._draining,
            on_response=self.on_response_complete,
        )

    @property
    def _answered(self) -> bool:
        """Whether no request waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Answer what cannot be understood, after what came before it, and listen no more."""
        self._deaf = True
        refusal = refusals.answer(status, sentence)
        if not self._answered and (not self.cycle.more_body or self.pipeline):
            self._refusal = refusal
        else:
            self._say(refusal)

    def _say(self, refusal: bytes) -> None:
        self._refusal = None
        self.transport.write(refusal)
        self._close_politely()

    def _may_close(self) -> bool:
        """Whether nothing is left to be read, nor can be on its way, so that closing is no reset.

        Otherwise what comes is thrown away first. It is on its way where the service ends what the client would go on
        with, which has perhaps sent its next request.
        """
        if self._deaf or self._client_stays or (self.cycle and self.cycle.more_body):
            self._close_politely()
            return False
        return True

    def _close_politely(self) -> None:
        """Say that nothing more will come, and throw away for a while what does."""
        self._deaf, self._refusal = True, None
        self.pipeline.clear()
        if not self._answered:  # nothing may be answered any more, be it what a client waits for or a body half read
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        self._throw_away()
        self.transport.write_eof()

    def _throw_away(self) -> None:
        self._unread = LINGER_BYTES
        self.flow.resume_reading()
        seconds = min(LINGER_S, self._idle_timeout_s)
        self._alarm.set(_LAST_REQUESTS_S if self._draining else seconds, self._hang_up)

    def _give_up(self) -> None:
        """End a connection that sent no request, or a part of one."""
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
        self._alarm.stop()
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
