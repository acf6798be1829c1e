"""What every wire protocol shares: a message within its limits of size and time, and a client that may be gone.

This is the hot path, spoken in ASGI's own words (https://asgi.readthedocs.io/en/latest/specs/www.html) and without a
framework: a small request costs the service little more than its HTTP.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from bln_serve.errors import (
    MalformedRequestError,
    MiniBatchError,
    RequestTooLargeError,
)
from bln_serve.serving.prediction import Message
from bln_serve.serving.visits import ClientGoneError, Receive, Visit

T = TypeVar("T")
Scope = MutableMapping[str, Any]

OFF_LOOP_BYTES = 256 * 1024
"""Working through this much text takes about a millisecond, which every other request would wait for."""

_READ = {
    name.encode(): name
    for name in ("accept", "bln-timeout-ms", "content-length", "content-type", "inference-header-content-length")
}
"""The headers that mean something to a wire protocol; the others are not even decoded."""


async def read_message(scope: Scope, receive: Receive, max_body_bytes: int, visit: Visit) -> Message:
    """Read a request, and no more of its body than the limit.

    Args:
        scope: of an HTTP request.
        receive: gives its body.
        max_body_bytes: the largest body.
        visit: is told of each part that comes.

    Raises:
        RequestTooLargeError: it announces, or has, more bytes.
        ClientGoneError: the client left in the middle of it.
        MalformedRequestError: a parameter of the URL stands there twice.
    """
    headers = _headers(scope)
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_body_bytes:
        raise _too_large(f"{announced} bytes", max_body_bytes)
    event = await receive()
    body: bytes = event.get("body", b"")
    if event["type"] == "http.disconnect" or event.get("more_body", False):
        body = await _rest_of(event, receive, max_body_bytes, visit)
    elif len(body) > max_body_bytes:
        raise _too_large(f"{len(body)} bytes", max_body_bytes)
    visit.has_come(len(body))
    query = scope["query_string"]
    return Message(body, headers, _query(query) if query else {})


async def _rest_of(event: Mapping[str, Any], receive: Receive, max_body_bytes: int, visit: Visit) -> bytes:
    """Read a body that comes in parts, of which `event` is the first."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        if event["type"] == "http.disconnect":
            raise ClientGoneError
        part = event.get("body", b"")
        size += len(part)
        if size > max_body_bytes:
            raise _too_large(f"at least {size} bytes", max_body_bytes)
        parts.append(part)
        if more := event.get("more_body", False):
            visit.comes(size)
            event = await receive()
    return b"".join(parts)


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
        if (name := _READ.get(raw_name)) is not None:
            value = raw_value.decode("latin-1")
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
