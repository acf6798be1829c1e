"""The outermost layer: who may ask, by which id a request is known, and the line that a log may have of it.

A request that brings no id passes through at the cost of a look at its headers' names, unless tokens are set or every
request is logged.
"""

import asyncio
import logging
from collections.abc import Awaitable
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bln_serve.serving import logs, statuses
from bln_serve.serving.request_ids import HEADER, given_id
from bln_serve.serving.tokens import Tokens

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""What needs no token: whoever starts and stops the service has none."""

_STRANGER = "bln_serve.stranger"
_NO_ANSWER = 499  # nginx's, for a client that closed its connection first


def is_stranger(scope: Scope) -> bool:
    """Whether a request came without a token where tokens are set, to a path that is open all the same."""
    return _STRANGER in scope


class Gate:
    """Lets requests in.

    Args:
        app: the application inside.
        tokens: of which a request must bring one.
        log_requests: whether every request gets a line.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, *, log_requests: bool) -> None:
        self._app = app
        self._tokens = tokens
        self._log_requests = log_requests
        self._looks_closer = bool(tokens) or log_requests

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Call the application inside, or refuse."""
        # No coroutine of its own: whom nothing is asked passes for the price of this function.
        if scope["type"] != "http" or not (self._looks_closer or _has_id(scope)):
            return self._app(scope, receive, send)
        return self._look_closer(scope, receive, send)

    async def _look_closer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if given := given_id(scope["headers"]):
            send = _repeating(given, send)
        app = self._app
        if self._tokens and not self._tokens.opened_by(scope["headers"]):
            if scope["path"] in OPEN_PATHS:
                scope[_STRANGER] = True
            else:
                app = statuses.unauthorized(scope)
        await (_logged(app, scope, receive, send) if self._log_requests else app(scope, receive, send))


def _has_id(scope: Scope) -> bool:
    for name, _ in scope["headers"]:  # noqa: SIM110 - any() takes three times as long, and this is every request's way
        if name == HEADER:
            return True
    return False


def _repeating(given: bytes, send: Send) -> Send:
    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            if not any(name == HEADER for name, _ in headers):  # an error's answer has it
                message = {**message, "headers": [*headers, (HEADER, given)]}
        await send(message)

    return send_with_id


async def _logged(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    clock = asyncio.get_running_loop().time
    began, status = clock(), _NO_ANSWER

    async def note_status(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        await send(message)

    try:
        await app(scope, receive, note_status)
    except Exception:
        status = HTTPStatus.INTERNAL_SERVER_ERROR if status == _NO_ANSWER else status
        raise
    finally:
        _log(scope, status, clock() - began)


def _log(scope: Scope, status: int, duration_s: float) -> None:
    said: dict[str, Any] = {**logs.of_request(scope, status=int(status), duration_s=round(duration_s, 6))}
    logger.info(
        "%s %s %d %.1f ms (request %s)",
        said["method"],
        said["path"],
        said["status"],
        1000 * duration_s,
        said["request_id"],
        extra=said,
    )
