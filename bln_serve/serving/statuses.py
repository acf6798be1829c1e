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
from bln_serve.serving import logs
from bln_serve.serving.request_ids import HEADER, ids_of

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
    # The rest of the body may still come: it must not be taken for the next request, nor be waited for.
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: {"connection": "close"},
    HTTPStatus.REQUEST_TIMEOUT: {"connection": "close"},
}
_GOING_DOWN = "Expected the whole request before the service goes down. Received: a part of it. Try again later."
_OUR_FAULT = "Expected to be able to answer. Received: an error inside the service; its log has the details."


def status_of(error: errors.BlnServeError) -> HTTPStatus:
    """Return the status that an error is answered with."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_response(scope: Scope, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the body every error has, and the id under which a request's errors are logged."""
    known_as = {HEADER.decode(): ids_of(scope).request_id}
    return Response(
        orjson.dumps({"error": sentence}), status, {**(headers or {}), **known_as}, media_type="application/json"
    )


def install(app: FastAPI) -> None:
    """Have the application answer every error so."""
    # Starlette types a handler as taking any Exception, and gives it only its own.
    app.add_exception_handler(errors.BlnServeError, _answer_our_own)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _answer_validation)  # type: ignore[arg-type]
    app.add_middleware(LastResort)


def response_to(
    error: errors.BlnServeError, scope: Scope, duration_s: float | None = None, model: str | None = None
) -> Response:
    """Return what a request is answered with because of this error, and log what somebody should look into.

    Args:
        error: why it has no answer.
        scope: of the request.
        duration_s: since its arrival, where that is known; for the log.
        model: which it asks, where that is known; for the log.
    """
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        # What ONNX Runtime says is for whoever runs the service, and may hold paths.
        return our_fault(error, scope, duration_s, model)
    # A 503 says of itself when to come again, and a service under load gives thousands: they are counted instead.
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status is not HTTPStatus.SERVICE_UNAVAILABLE:
        _log(logging.WARNING, scope, error, status, duration_s=duration_s, model=model)
    return error_response(scope, status, str(error), _HEADERS.get(status))


def _log(level: int, scope: Scope, error: Exception, status: int, **more: object) -> None:
    said = logs.of_request(scope, status=int(status), reason=type(error).__name__.removesuffix("Error"), **more)
    traceback = error if level == logging.ERROR else None
    begin = "error" if level == logging.ERROR else "warning"
    words = (begin, said["method"], said["path"], said["request_id"], error)
    logger.log(level, "%s: %s %s failed (request %s): %s", *words, exc_info=traceback, extra=said)


async def _answer_our_own(request: Request, error: errors.BlnServeError) -> Response:
    return response_to(error, request.scope)


def not_allowed(scope: Scope, allowed: str) -> Response:
    """Return what a request with a wrong method is answered with."""
    sentence = f"Expected {allowed}. Received: {scope['method']} {scope['path']}."
    return error_response(scope, HTTPStatus.METHOD_NOT_ALLOWED, sentence, {"allow": allowed})


def unauthorized(scope: Scope) -> Response:
    """Return what a request without a token is answered with, where tokens are set."""
    sentence = (
        f"Expected a token of this service in the header Authorization: Bearer TOKEN. Received: {scope['method']} "
        f"{scope['path']} without one, or with another. Ask whoever runs the service."
    )
    return error_response(scope, HTTPStatus.UNAUTHORIZED, sentence, {"www-authenticate": "Bearer"})


def our_fault(error: Exception, scope: Scope, duration_s: float | None = None, model: str | None = None) -> Response:
    """Return what a request is answered with because of an exception that nobody foresaw, and log that.

    Args:
        error: the exception. The answer says nothing of it.
        scope: of the request.
        duration_s: since its arrival, where that is known; for the log.
        model: which it asks, where that is known; for the log.
    """
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    _log(logging.ERROR, scope, error, status, duration_s=duration_s, model=model)
    return error_response(scope, status, _OUR_FAULT)


def going_down(scope: Scope) -> Response:
    """Return what a request is answered with that the ending server gives up."""
    return error_response(scope, HTTPStatus.SERVICE_UNAVAILABLE, _GOING_DOWN, _RETRY)


async def _answer_http(request: Request, error: HTTPException) -> Response:
    received = f"{request.method} {request.url.path}"
    sentence = {
        HTTPStatus.NOT_FOUND: f"Expected a route of this service; /openapi.json lists them. Received: {received}.",
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"Expected {(error.headers or {}).get('Allow', 'another method')}. Received: {received}."
        ),
    }.get(HTTPStatus(error.status_code), str(error.detail))
    return error_response(request.scope, error.status_code, sentence, error.headers)


async def _answer_validation(request: Request, error: RequestValidationError) -> Response:
    problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    sentence = f"Expected a request as /openapi.json says. Received: {problems}."
    return error_response(request.scope, HTTPStatus.UNPROCESSABLE_ENTITY, sentence)


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
        except Exception as error:  # the last resort, by definition
            if scope["type"] != "http" or started:
                raise
            await our_fault(error, scope)(scope, receive, send)
        except asyncio.CancelledError:
            # Only the server cancels a request, at the end of its time to shut down, and has no better answer.
            if scope["type"] != "http" or started:
                raise
            await going_down(scope)(scope, receive, send)
