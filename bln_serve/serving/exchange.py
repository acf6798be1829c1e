"""What every wire format shares: a body within its limit, the formats asked for, a client that may be gone."""

import asyncio
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from bln_serve.errors import MalformedRequestError, MiniBatchError, RequestTooLargeError, UnsupportedFormatError
from bln_serve.serving import predict_json, predict_npy

T = TypeVar("T")

FORMATS: dict[str, ModuleType] = {predict_json.MEDIA_TYPE: predict_json, predict_npy.MEDIA_TYPE: predict_npy}
"""A wire format's module by its media type. Each has `read(body)` and `write(prediction)`."""

# Parsing this much takes about a millisecond, which every other request would wait for.
_OFF_LOOP_BYTES = 32 * 1024


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is there to answer."""


def request_format(request: Request) -> str:
    """Return the media type of the body.

    Raises:
        UnsupportedFormatError: the service does not read it.
    """
    received = request.headers.get("content-type", "")
    media_type = received.partition(";")[0].strip().lower()
    if media_type not in FORMATS:
        raise UnsupportedFormatError(
            f"Expected Content-Type: {' or '.join(FORMATS)}. Received: {repr(received) if received else 'none'}."
        )
    return media_type


def answer_format(request: Request) -> str:
    """Return the media type of the answer: of those that Accept names, the preferred; else JSON."""
    preferred, best = predict_json.MEDIA_TYPE, 0.0
    for item in ",".join(request.headers.getlist("accept")).split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((_quality(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
        if media_type in FORMATS and quality > best:
            preferred, best = media_type, quality
    return preferred


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def mini_batch_rows(request: Request) -> int | None:
    """Return the rows of a mini-batch that the URL names, or None.

    Raises:
        MalformedRequestError: the URL has other parameters, which would otherwise be misspelt in silence.
        MiniBatchError: it is no whole number from 0.
    """
    values = []
    for name, value in request.query_params.multi_items():
        if name != "mini_batch_rows":
            raise MalformedRequestError(f"Expected no other URL parameter than mini_batch_rows. Received: {name!r}.")
        values.append(value)
    if len(values) > 1:
        raise MalformedRequestError(f"Expected mini_batch_rows once in the URL. Received: {', '.join(values)}.")
    if not values:
        return None
    if not (values[0].isascii() and values[0].isdigit() and len(values[0]) <= 18):
        raise MiniBatchError(
            "Expected mini_batch_rows to be a whole number: 0 for one mini-batch of all rows, or more. "
            f"Received: {values[0]!r}. Leave it out for the default."
        )
    return int(values[0])


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Read the body, and no more of it than the limit.

    Raises:
        RequestTooLargeError: it announces, or has, more bytes.
        ClientGoneError: the client left in the middle of it.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_body_bytes:
        raise _too_large(f"{announced} bytes", max_body_bytes)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_body_bytes:
                raise _too_large(f"at least {size} bytes", max_body_bytes)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return b"".join(parts)


def _too_large(received: str, max_body_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"Expected a body of at most {max_body_bytes} bytes. Received: {received}. Send fewer rows a request, use "
        f"{predict_npy.MEDIA_TYPE}, or start the service with a larger --max-body-bytes."
    )


async def off_loop(size: int, function: Callable[[], T]) -> T:
    """Call a function that works through `size` bytes: in a thread if that takes long enough to be noticed."""
    return function() if size <= _OFF_LOOP_BYTES else await asyncio.to_thread(function)


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer as long as the client waits for it; cancel it otherwise.

    Args:
        request: whose body was read.
        answer: what to wait for.

    Raises:
        ClientGoneError: the client closed its connection first.
        Exception: what `answer` raised.
    """
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGoneError
        return answering.result()
    finally:
        gone.cancel()
        answering.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
