"""The application: routes that hand a request from room to room."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

import bln_serve
from bln_serve.serving import openapi, predict_json, predict_npy, statuses
from bln_serve.serving.catalog import Catalog, ServedModel
from bln_serve.serving.exchange import (
    FORMATS,
    ClientGoneError,
    answer_format,
    mini_batch_rows,
    off_loop,
    read_body,
    request_format,
    unless_gone,
)
from bln_serve.serving.prediction import Encoded, Prediction, mini_batches, prepare
from bln_serve.serving.settings import Settings
from bln_serve.signature import Arrays

_CLIENT_CLOSED_REQUEST = 499  # nginx's, for the log alone: nobody reads the answer


def create_app(settings: Settings) -> FastAPI:
    """Make the application.

    Returns:
        An ASGI application; its models load in the background once it has started. `app.state.catalog` holds them.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: the paths contradict one another.
    """
    catalog = Catalog(settings)

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
    statuses.install(app)
    _add_health_routes(app, catalog)
    _add_model_routes(app, catalog, settings)
    return app


def _add_health_routes(app: FastAPI, catalog: Catalog) -> None:
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


def _add_model_routes(app: FastAPI, catalog: Catalog, settings: Settings) -> None:
    async def answer(request: Request, name: str | None, version: str | None) -> Response:
        try:
            encoded = await _predict(request, catalog.get(name, version), settings.max_body_bytes)
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return Response(encoded.body, headers=encoded.headers, media_type=encoded.media_type)

    @app.get("/models/{name}", summary="What is this model, and what may be sent?", responses=openapi.MODEL)
    async def model(name: str) -> Response:
        return _json(_metadata(catalog.get(name)))

    @app.post("/predict", summary="Ask the default model", **openapi.PREDICT)
    async def predict_default(request: Request) -> Response:
        return await answer(request, None, None)

    @app.post("/models/{name}/predict", summary="Ask a model", **openapi.PREDICT)
    async def predict_model(request: Request, name: str) -> Response:
        return await answer(request, name, None)

    @app.post("/models/{name}/versions/{version}/predict", summary="Ask one version of a model", **openapi.PREDICT)
    async def predict_version(request: Request, name: str, version: str) -> Response:
        return await answer(request, name, version)


async def _predict(request: Request, served: ServedModel, max_body_bytes: int) -> Encoded:
    """Read, check, queue, run and write: everything wrong with a request shows before it is queued."""
    reader, writer = FORMATS[request_format(request)], FORMATS[answer_format(request)]
    if writer is predict_npy:
        predict_npy.check_single_output([spec.name for spec in served.manifest.signature.outputs])
    rows = mini_batch_rows(request)
    body = await read_body(request, max_body_bytes)
    work = await off_loop(len(body), lambda: prepare(served.manifest, reader.read(body), rows))
    outputs: Arrays = await unless_gone(request, served.queue.answer(work, work.rows))
    prediction = Prediction(outputs, served.name, served.version, served.manifest.statistics, mini_batches(work))
    encoded: Encoded = await off_loop(prediction.byte_count, lambda: writer.write(prediction))
    return encoded


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
        "inputs": msgspec.to_builtins(manifest.signature.inputs),
        "outputs": msgspec.to_builtins(manifest.signature.outputs),
        "tolerance": msgspec.to_builtins(manifest.tolerance),
        "created": manifest.created,
    }


def _json(document: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(document), status, media_type=predict_json.MEDIA_TYPE)
