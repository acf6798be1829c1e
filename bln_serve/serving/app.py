"""The application: in front what asks a model; behind it, with FastAPI, health, descriptions and metadata."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bln_serve.serving import examples, openapi, pages, predict_json, protocol_routes, statuses, tokens
from bln_serve.serving.answering import Answering, Front
from bln_serve.serving.catalog import Catalog
from bln_serve.serving.gate import Gate, is_stranger
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.served_model import ServedModel
from bln_serve.serving.settings import Settings


class Application(FastAPI):
    """FastAPI behind layers of our own, from which most requests are answered before any of its own sees them.

    Attributes:
        entry: the outermost layer; FastAPI itself until one is put in front of it.
    """

    def __init__(self, **described: Any) -> None:
        super().__init__(**described)
        self.entry: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the outermost layer, as the server does without this one."""
        await self.entry(scope, receive, send)


def create_app(settings: Settings) -> Application:
    """Make the application.

    Returns:
        An ASGI application; its models load in the background once it has started. `app.state.catalog` holds them.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: the paths contradict one another, or a token is none.
    """
    metrics = Metrics()
    catalog = Catalog(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        catalog.start()
        yield
        await catalog.close()

    app = Application(
        docs_url=None,  # FastAPI's page fetches its scripts from another address
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.catalog, app.state.metrics = catalog, metrics
    front = Front(app.entry, Answering(catalog, settings, metrics))
    app.entry = Gate(front, tokens.read(settings), log_requests=settings.log_requests)
    statuses.install(app)
    _add_health_routes(app, catalog, metrics)
    _add_model_routes(app, catalog)
    app.include_router(protocol_routes.routes(catalog))
    app.include_router(pages.routes())
    # FastAPI's own way of replacing its description, which knows neither our bodies nor the routes that ask a model.
    app.openapi = lambda: openapi.document(catalog.readiness().served)  # type: ignore[method-assign]
    return app


def _add_health_routes(app: FastAPI, catalog: Catalog, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return _json({"alive": True})

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        readiness = catalog.readiness()
        status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
        if is_stranger(request.scope):
            return _json({"ready": readiness.ready}, status)
        served = [
            {"name": each.name, "version": each.version, "queued_rows": each.queue.queued_rows}
            for each in readiness.served
        ]
        broken = [
            {"name": each.version.name, "version": each.version.version, "reason": each.reason}
            for each in readiness.broken
        ]
        document = {
            "ready": readiness.ready,
            "models": served,
            "loading": readiness.loading,
            "broken": broken,
        }
        if readiness.workers is not None:
            document["workers"] = readiness.workers
        return _json(document, status)

    @app.get("/metrics")
    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})


def _add_model_routes(app: FastAPI, catalog: Catalog) -> None:
    @app.get("/models")
    async def models() -> Response:
        return _json({"models": [_metadata(served) for served in catalog.readiness().served]})

    @app.get("/models/{name}")
    async def model(name: str) -> Response:
        return _json(_metadata(catalog.get(name)))

    @app.get("/models/{name}/example")
    async def example(name: str) -> Response:
        return _json(examples.request(catalog.get(name).manifest))


def _metadata(served: ServedModel) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "name": served.name,
        "version": served.version,
        "statistics": manifest.statistics,
        "row_coupling": manifest.row_coupling,
        "row_coupling_reason": manifest.row_coupling_reason,
        "mini_batch_rows": manifest.mini_batch_rows,
        "min_mini_batch_rows": manifest.min_mini_batch_rows,
        "max_mini_batch_rows": manifest.max_mini_batch_rows,
        "max_run_rows": served.max_run_rows,
        "inputs": msgspec.to_builtins(manifest.signature.inputs),
        "outputs": msgspec.to_builtins(manifest.signature.outputs),
        "tolerance": msgspec.to_builtins(manifest.tolerance),
        "created": manifest.created,
    }


def _json(document: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(document), status, media_type=predict_json.MEDIA_TYPE)
