"""From a request to its answer: read, check, queue, run, write. Everything wrong with it shows before it is queued."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bln_serve.errors import BlnServeError
from bln_serve.serving import statuses
from bln_serve.serving.catalog import Catalog
from bln_serve.serving.exchange import OFF_LOOP_BYTES, Scope, deadline_of, mini_batch_rows, read_message
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.prediction import Encoded, Message, Prediction, PredictRequest, Work, mini_batches, prepare
from bln_serve.serving.routes import Target, target_of
from bln_serve.serving.served_model import ServedModel
from bln_serve.serving.settings import Settings
from bln_serve.serving.visits import ClientGoneError, Receive, Visit, Visits

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
        self._max_body_bytes = settings.max_body_bytes
        self._request_timeout_s = settings.request_timeout_s
        self._idle_timeout_s = settings.idle_timeout_s
        self._metrics = metrics
        self._visits = Visits()

    async def __call__(self, target: Target, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, be it with an error."""
        clock = asyncio.get_running_loop().time
        arrived, status, reason, started = clock(), _CLIENT_CLOSED_REQUEST, "ClientGone", False
        self._metrics.in_flight += 1
        try:
            answer = await self._answer(target, scope, receive, arrived)
            status, reason, started = 200, "", True
            await send({"type": "http.response.start", "status": 200, "headers": _headers(answer)})
            await send({"type": "http.response.body", "body": answer.body})
        except ClientGoneError:
            return
        except BlnServeError as error:
            response = statuses.response_to(error, scope, clock() - arrived, target.name)
            status, reason = response.status_code, type(error).__name__.removesuffix("Error")
            await response(scope, receive, send)  # type: ignore[arg-type]
        except Exception as error:
            status, reason = 500, type(error).__name__
            if started:
                raise
            await statuses.our_fault(error, scope, clock() - arrived, target.name)(scope, receive, send)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            # Only the server cancels a request, at the end of its time to shut down, and has no better answer.
            if started:
                raise
            status, reason = 503, "GoingDown"
            await statuses.going_down(scope)(scope, receive, send)  # type: ignore[arg-type]
        finally:
            self._metrics.in_flight -= 1
            self._metrics.answered(status, clock() - arrived, reason)

    async def _answer(self, target: Target, scope: Scope, receive: Receive, arrived: float) -> Encoded:
        deadline = arrived + self._request_timeout_s
        served = self._catalog.get(target.name, target.version)
        with served.users, Visit(self._visits, receive, arrived, deadline, self._idle_timeout_s) as visit:
            message = await read_message(scope, receive, self._max_body_bytes, visit)
            deadline = deadline_of(message.headers, arrived, self._request_timeout_s)
            if len(message.body) > OFF_LOOP_BYTES and target.protocol.slow_bytes(message) > OFF_LOOP_BYTES:
                request, work = await asyncio.to_thread(_prepare, target, served, message)
            else:
                request, work = _prepare(target, served, message)
            outputs = await served.answer(work, deadline)
            manifest = served.manifest
            prediction = Prediction(outputs, served.name, served.version, manifest.statistics, mini_batches(work))
            if request.slow_bytes(prediction) > OFF_LOOP_BYTES:
                return await asyncio.to_thread(request.write, prediction)
            return request.write(prediction)


class Front:
    """In front of the application: requests that ask a model go straight to their answer, past its routing.

    Args:
        app: the application, for all other requests.
        answering: for these.
    """

    def __init__(self, app: App, answering: Answering) -> None:
        self._app = app
        self._answering = answering

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Call one or the other."""
        if scope["type"] != "http" or (target := target_of(scope["path"])) is None:
            return self._app(scope, receive, send)
        if scope["method"] == "POST":
            return self._answering(target, scope, receive, send)
        return statuses.not_allowed(scope, "POST")(scope, receive, send)  # type: ignore[arg-type]


def _headers(answer: Encoded) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", answer.media_type.encode()), (b"content-length", b"%d" % len(answer.body))]
    for name, value in answer.headers.items():
        headers.append((name.encode("latin-1"), value.encode("latin-1")))
    return headers


def _prepare(target: Target, served: ServedModel, message: Message) -> tuple[PredictRequest, Work]:
    rows = mini_batch_rows(message.query) if message.query else None
    request = target.protocol.read(message, served.manifest.signature)
    return request, prepare(served.manifest, request, rows)
