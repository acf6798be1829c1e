"""The application: in front what asks a model; behind it, with FastAPI, health, descriptions and metadata."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

import bln_serve
from bln_serve.serving import openapi, predict_json, protocol_routes, statuses
from bln_serve.serving.answering import Answering, Front
from bln_serve.serving.catalog import Catalog, ServedModel
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """Make the application.

    Returns:
        An ASGI application; its models load in the background once it has started. `app.state.catalog` holds them.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: the paths contradict one another.
    """
    metrics = Metrics()
    catalog = Catalog(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        catalog.start()
        yield
        await catalog.close()

    app = FastAPI(
        title="bln_serve",
        description=bln_serve.__doc__ or "",
        version=bln_serve.__version__,
        docs_url=None,  # FastAPI's page fetches its scripts from another address
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.catalog = catalog
    app.add_middleware(Front, answering=Answering(catalog, settings, metrics))
    statuses.install(app)
    _add_health_routes(app, catalog, metrics)
    _add_model_routes(app, catalog)
    app.include_router(protocol_routes.routes(catalog))
    openapi.describe_asking(app)
    return app


def _add_health_routes(app: FastAPI, catalog: Catalog, metrics: Metrics) -> None:
    @app.get("/healthz", summary="Is the service alive?", responses=openapi.HEALTH)
    async def healthz() -> Response:
        return _json({"alive": True})

    @app.get("/readyz", summary="Are its models loaded, verified and warmed?", responses=openapi.READINESS)
    async def readyz() -> Response:
        readiness = catalog.readiness()
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
        return _json(document, HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/metrics", summary="What Prometheus reads", responses=openapi.METRICS)
    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})


def _add_model_routes(app: FastAPI, catalog: Catalog) -> None:
    @app.get("/models/{name}", summary="What is this model, and what may be sent?", responses=openapi.MODEL)
    async def model(name: str) -> Response:
        return _json(_metadata(catalog.get(name)))


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
