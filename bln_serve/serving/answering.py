"""From a request to its answer: read, check, queue, run, write. Everything wrong with it shows before it is queued."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bln_serve.errors import BlnServeError
from bln_serve.serving import statuses
from bln_serve.serving.catalog import Catalog, ServedModel
from bln_serve.serving.exchange import (
    ClientGoneError,
    Receive,
    Scope,
    deadline_of,
    mini_batch_rows,
    off_loop,
    read_message,
    unless_gone,
)
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest, Work, mini_batches, prepare
from bln_serve.serving.routes import Target, target_of
from bln_serve.serving.settings import Settings

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

_CLIENT_CLOSED_REQUEST = 499  # nginx's, for the metrics alone: nobody reads an answer


class Answering:
    """Answers the requests that ask a model.

    Args:
        catalog: the models.
        settings: the limits of size and time.
        metrics: where each request is counted.
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self._catalog = catalog
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, target: Target, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, be it with an error."""
        clock = asyncio.get_running_loop().time
        began, status, reason = clock(), _CLIENT_CLOSED_REQUEST, "ClientGone"
        self._metrics.in_flight.inc()
        try:
            answer = await self._answer(target, scope, receive)
            status, reason = 200, ""
            await send({"type": "http.response.start", "status": status, "headers": _headers(answer)})
            await send({"type": "http.response.body", "body": answer.body})
        except ClientGoneError:
            return
        except BlnServeError as error:
            response = statuses.response_to(error, scope["method"], scope["path"])
            status, reason = response.status_code, type(error).__name__.removesuffix("Error")
            await response(scope, receive, send)  # type: ignore[arg-type]
        except Exception as error:
            status, reason = 500, type(error).__name__
            raise
        finally:
            self._metrics.in_flight.dec()
            self._metrics.answered(status, clock() - began, reason)

    async def _answer(self, target: Target, scope: Scope, receive: Receive) -> Encoded:
        now = asyncio.get_running_loop().time()
        deadline = now + self._settings.request_timeout_s
        served = self._catalog.get(target.name, target.version)
        message = await read_message(scope, receive, self._settings.max_body_bytes, deadline)
        deadline = deadline_of(message.headers, now, self._settings.request_timeout_s)
        request, work = await off_loop(target.protocol.slow_bytes(message), lambda: _prepare(target, served, message))
        outputs = await unless_gone(receive, served.answer(work, deadline))
        prediction = Prediction(outputs, served.name, served.version, served.manifest.statistics, mini_batches(work))
        return await off_loop(prediction.byte_count, lambda: request.write(prediction))


class Front:
    """In front of the application: requests that ask a model go straight to their answer, past its routing.

    Args:
        app: the application, for all other requests.
        answering: for these.
    """

    def __init__(self, app: App, answering: Answering) -> None:
        self._app = app
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call one or the other."""
        if scope["type"] != "http" or (target := target_of(scope["path"])) is None:
            await self._app(scope, receive, send)
        elif scope["method"] == "POST":
            await self._answering(target, scope, receive, send)
        else:
            await statuses.not_allowed(scope["method"], scope["path"], "POST")(scope, receive, send)  # type: ignore[arg-type]


def _headers(answer: Encoded) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", answer.media_type.encode("latin-1")),
        (b"content-length", b"%d" % len(answer.body)),
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()),
    ]


def _prepare(target: Target, served: ServedModel, message: Message) -> tuple[PredictRequest, Work]:
    rows = mini_batch_rows(message.query)
    request = target.protocol.read(message, served.manifest.signature)
    return request, prepare(served.manifest, request, rows)
