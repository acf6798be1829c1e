"""What every wire protocol shares: a message within its limits of size and time, and a client that may be gone.

This is the hot path, spoken in ASGI's own words (https://asgi.readthedocs.io/en/latest/specs/www.html) and without a
framework: a small request costs the service little more than its HTTP.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from bln_serve.errors import (
    BodyTimeoutError,
    MalformedRequestError,
    MiniBatchError,
    RequestTooLargeError,
)
from bln_serve.serving.prediction import Message

T = TypeVar("T")
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

# Working through this much text takes about a millisecond, which every other request would wait for.
_OFF_LOOP_BYTES = 32 * 1024
# Nearly every answer is there by then; whoever waits longer may have gone.
_WATCH_AFTER_S = 0.05


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is there to answer."""


async def read_message(scope: Scope, receive: Receive, max_body_bytes: int, deadline: float) -> Message:
    """Read a request, and no more of its body than the limit.

    Args:
        scope: of an HTTP request.
        receive: gives its body.
        max_body_bytes: the largest body.
        deadline: when the body must be complete, in the event loop's time.

    Raises:
        RequestTooLargeError: it announces, or has, more bytes.
        BodyTimeoutError: it was not complete in time.
        ClientGoneError: the client left in the middle of it.
        MalformedRequestError: a parameter of the URL stands there twice.
    """
    headers = _headers(scope)
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_body_bytes:
        raise _too_large(f"{announced} bytes", max_body_bytes)
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout_at(deadline):
            while more:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGoneError
                part = event.get("body", b"")
                size += len(part)
                if size > max_body_bytes:
                    raise _too_large(f"at least {size} bytes", max_body_bytes)
                parts.append(part)
                more = event.get("more_body", False)
    except TimeoutError as error:
        expected = f"all {announced} bytes of the body" if announced else "the whole body"
        raise BodyTimeoutError(
            f"Expected {expected} within the request's time. Received: {size} bytes of it. Send it faster, or start "
            "the service with a longer --request-timeout-s."
        ) from error
    query = scope["query_string"]
    return Message(parts[0] if len(parts) == 1 else b"".join(parts), headers, _query(query) if query else {})


def mini_batch_rows(query: Mapping[str, str]) -> int | None:
    """Return the rows of a mini-batch that the URL names, or None.

    Raises:
        MalformedRequestError: the URL has other parameters, which would otherwise be misspelt in silence.
        MiniBatchError: it is no whole number from 0.
    """
    for name in query:
        if name != "mini_batch_rows":
            raise MalformedRequestError(f"Expected no other URL parameter than mini_batch_rows. Received: {name!r}.")
    if (value := query.get("mini_batch_rows")) is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise MiniBatchError(
            "Expected mini_batch_rows to be a whole number: 0 for one mini-batch of all rows, or more. "
            f"Received: {value!r}. Leave it out for the default."
        )
    return int(value)


async def off_loop(slow_bytes: int, function: Callable[[], T]) -> T:
    """Call a function that works through text of that size: in a thread if that takes long enough to be noticed."""
    return function() if slow_bytes <= _OFF_LOOP_BYTES else await asyncio.to_thread(function)


async def unless_gone(receive: Receive, answer: Awaitable[T]) -> T:
    """Wait for an answer as long as the client waits for it; cancel it otherwise.

    Args:
        receive: of the request, whose body was read.
        answer: what to wait for.

    Raises:
        ClientGoneError: the client closed its connection first.
        Exception: what `answer` raised.
    """
    waiter = asyncio.current_task()
    if waiter is None:
        raise RuntimeError("Expected to be awaited within a task, which can be cancelled")
    watch = _Watch(receive, waiter)
    try:
        return await answer
    except asyncio.CancelledError:
        if watch.client_gone and waiter.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watch.end()


class _Watch:
    """Looks, after a while, whether the client is still there, and cancels the task that waits if it is not."""

    def __init__(self, receive: Receive, waiter: "asyncio.Task[Any]") -> None:
        self._receive = receive
        self._waiter = waiter
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._begin)
        self.client_gone = False

    def end(self) -> None:
        self._timer.cancel()
        if self._task:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_gone = True
        self._waiter.cancel()


def deadline_of(headers: Mapping[str, str], now: float, request_timeout_s: float) -> float:
    """Return when a request's answer is too late, in the event loop's time.

    Args:
        headers: `bln-timeout-ms` may name less time than the service gives.
        now: the event loop's time.
        request_timeout_s: the time the service gives.

    Raises:
        MalformedRequestError: the header is no positive number.
    """
    if (value := headers.get("bln-timeout-ms")) is None:
        return now + request_timeout_s
    if not (value.isascii() and value.isdigit() and 0 < len(value) <= 9):
        raise MalformedRequestError(f"Expected bln-timeout-ms to be milliseconds, from 0. Received: {value!r}.")
    return now + min(request_timeout_s, int(value) / 1000)


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        # A list may also be sent in pieces (RFC 9110, section 5.3).
        headers[name] = f"{headers[name]}, {value}" if name == "accept" and name in headers else value
    return headers


def _query(query: bytes) -> dict[str, str]:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    for index, (name, _) in enumerate(pairs):
        if any(name == earlier for earlier, _ in pairs[:index]):
            values = ", ".join(value for each, value in pairs if each == name)
            raise MalformedRequestError(f"Expected {name} once in the URL. Received: {values}.")
    return dict(pairs)


def _too_large(received: str, max_body_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"Expected a body of at most {max_body_bytes} bytes. Received: {received}. Send fewer rows a request, use a "
        "binary format, or start the service with a larger --max-body-bytes."
    )
