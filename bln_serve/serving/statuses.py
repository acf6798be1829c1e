"""Errors as HTTP statuses: one table, and one shape of body, {"error": "a sentence"}.

No exception leaves the application: the server would close the connection, and later requests on it would be lost.
"""

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bln_serve import errors

logger = logging.getLogger(__name__)

STATUSES: Mapping[type[errors.BlnServeError], HTTPStatus] = {
    errors.BodyTimeoutError: HTTPStatus.REQUEST_TIMEOUT,
    errors.MalformedRequestError: HTTPStatus.BAD_REQUEST,
    errors.ModelNotFoundError: HTTPStatus.NOT_FOUND,
    errors.RequestTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnsupportedFormatError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.InvalidInputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.MiniBatchError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.NonFiniteAnswerError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.ModelNotReadyError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.OverloadedError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DeadlineExceededError: HTTPStatus.GATEWAY_TIMEOUT,
    errors.BlnServeError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The nearest class above an error decides."""

_RETRY = {"retry-after": "1"}  # seconds
_HEADERS = {
    HTTPStatus.SERVICE_UNAVAILABLE: _RETRY,
    # The rest of the body may still come: it must not be taken for the next request.
    HTTPStatus.REQUEST_TIMEOUT: {"connection": "close"},
}
_GOING_DOWN = "Expected the whole request before the service goes down. Received: a part of it. Try again later."
_OUR_FAULT = "Expected to be able to answer. Received: an error inside the service; its log has the details."


def status_of(error: errors.BlnServeError) -> HTTPStatus:
    """Return the status that an error is answered with."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_response(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the body every error has."""
    return Response(orjson.dumps({"error": sentence}), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Have the application answer every error so."""
    # Starlette types a handler as taking any Exception, and gives it only its own.
    app.add_exception_handler(errors.BlnServeError, _answer_our_own)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _answer_validation)  # type: ignore[arg-type]
    app.add_middleware(LastResort)


def response_to(error: errors.BlnServeError, method: str, path: str) -> Response:
    """Return what a request to this path is answered with because of this error."""
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        # What ONNX Runtime says is for whoever runs the service, and may hold paths.
        logger.error("error: %s %s failed: %s", method, path, error, exc_info=error)
        return error_response(status, _OUR_FAULT)
    return error_response(status, str(error), _HEADERS.get(status))


async def _answer_our_own(request: Request, error: errors.BlnServeError) -> Response:
    return response_to(error, request.method, request.url.path)


def not_allowed(method: str, path: str, allowed: str) -> Response:
    """Return what a request with a wrong method is answered with."""
    sentence = f"Expected {allowed}. Received: {method} {path}."
    return error_response(HTTPStatus.METHOD_NOT_ALLOWED, sentence, {"allow": allowed})


async def _answer_http(request: Request, error: HTTPException) -> Response:
    received = f"{request.method} {request.url.path}"
    sentence = {
        HTTPStatus.NOT_FOUND: f"Expected a route of this service; /openapi.json lists them. Received: {received}.",
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"Expected {(error.headers or {}).get('Allow', 'another method')}. Received: {received}."
        ),
    }.get(HTTPStatus(error.status_code), str(error.detail))
    return error_response(error.status_code, sentence, error.headers)


async def _answer_validation(_: Request, error: RequestValidationError) -> Response:
    problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return error_response(
        HTTPStatus.UNPROCESSABLE_ENTITY, f"Expected a request as /openapi.json says. Received: {problems}."
    )


class LastResort:
    """Answers an exception that nothing else took, and a request that the ending server gave up, while it still can.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application inside."""
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except Exception:  # the last resort, by definition
            if scope["type"] != "http" or started:
                raise
            logger.exception("error: %s %s failed", scope["method"], scope["path"])
            await error_response(HTTPStatus.INTERNAL_SERVER_ERROR, _OUR_FAULT)(scope, receive, send)
        except asyncio.CancelledError:
            # Only the server cancels a request, at the end of its time to shut down, and has no better answer.
            if scope["type"] != "http" or started:
                raise
            await error_response(HTTPStatus.SERVICE_UNAVAILABLE, _GOING_DOWN, _RETRY)(scope, receive, send)
