"""What a connection says to what is no request, or is one that it will not read: an answer after which it ends."""

from http import HTTPStatus

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

MAX_HEAD_BYTES = 64 * 1024

TOO_LARGE = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"Expected a request's head, or what frames its body, to have at most {MAX_HEAD_BYTES} bytes. Received: more. "
    "Send fewer and shorter headers.",
)
UPGRADE = (
    HTTPStatus.BAD_REQUEST,
    "Expected a request that stays with HTTP/1.1. Received: one with a body and the header Upgrade. Leave that header "
    "out (Java's HttpClient does so with version(HTTP_1_1)).",
)


class RefusalError(Exception):
    """Raised through the parser, which ends at it, with a status and a sentence."""


def answer(status: HTTPStatus, sentence: str) -> bytes:
    """Return a whole answer, after which its connection ends."""
    body = orjson.dumps({"error": sentence})
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body


def size(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    """Return about how many bytes a head has."""
    return len(url) + sum(len(name) + len(value) + 4 for name, value in headers)


def has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a head announces a body."""
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def reason(error: BaseException | None) -> str:
    """Return what the parser says; where a callback of it failed, that is the request's target."""
    if isinstance(error, httptools.HttpParserCallbackError):
        return "a target that is no path"
    return str(error or "something else")
