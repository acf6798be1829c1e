"""By what a request is known: to its client, in the log, and to whoever traces it over several services.

The client may say it: `x-request-id`, of which this repeats the value in its answer, and `traceparent`, as
https://www.w3.org/TR/trace-context/ has it. Otherwise an id is made where one is needed: for an error's answer and for
a line in the log.
"""

import re
import secrets
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

Headers = Iterable[tuple[bytes, bytes]]

HEADER = b"x-request-id"
_TRACE_HEADER = b"traceparent"
_KEY = "bln_serve.request_ids"  # in the scope: one request has the same ids wherever they are asked for

_GIVEN_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_TRACEPARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


@dataclass(frozen=True, slots=True)
class RequestIds:
    """The ids of one request.

    Attributes:
        request_id: the client's, or made here.
        trace_id: of the trace that the client takes part in, 32 hex digits; None without one.
        span_id: of this service's part in that trace, 16 hex digits, made here; None without one.
    """

    request_id: str
    trace_id: str | None = None
    span_id: str | None = None


def ids_of(scope: MutableMapping[str, Any]) -> RequestIds:
    """Return a request's ids; the first call makes those that are missing."""
    ids: RequestIds | None = scope.get(_KEY)
    if ids is None:
        given = given_id(scope["headers"])
        trace_id = trace_id_of(scope["headers"])
        ids = scope[_KEY] = RequestIds(
            secrets.token_hex(8) if given is None else given.decode("ascii"),
            trace_id,
            trace_id and secrets.token_hex(8),
        )
    return ids


def given_id(headers: Headers) -> bytes | None:
    """Return the id that the client gave; None where it is missing, too long, or not plain text."""
    for name, value in headers:
        if name == HEADER:
            return value if _GIVEN_ID.fullmatch(value) else None
    return None


def trace_id_of(headers: Headers) -> str | None:
    """Return the trace that the client takes part in; None where it says none, or not as the standard has it."""
    values = [value for name, value in headers if name == _TRACE_HEADER]
    if len(values) != 1 or not (match := _TRACEPARENT.fullmatch(values[0].strip())):
        return None
    if match["version"] == b"00" and match["more"]:
        return None  # later versions may say more, this one may not
    return match["trace_id"].decode("ascii")
