"""What clients of the Open Inference Protocol v2 and of TensorFlow Serving's REST v1 ask beside predictions.

Sources: https://github.com/kserve/open-inference-protocol and https://www.tensorflow.org/tfx/serving/api_rest
"""

from http import HTTPStatus
from typing import Any

import orjson
from fastapi import APIRouter, Response

import bln_serve
from bln_serve.errors import ModelNotFoundError, ModelNotReadyError
from bln_serve.serving import open_inference_metadata, tf_serving
from bln_serve.serving.catalog import Catalog
from bln_serve.serving.served_model import ServedModel

_NOT_READY = HTTPStatus.BAD_REQUEST  # as the protocol demands: 4xx


def routes(catalog: Catalog) -> APIRouter:
    """Return the routes of both protocols."""
    router = APIRouter()
    _add_open_inference(router, catalog)
    _add_tf_serving(router, catalog)
    return router


def _add_open_inference(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/v2", summary="What is this server?", tags=["Open Inference Protocol v2"])
    async def server() -> Response:
        return _json(open_inference_metadata.server_metadata(bln_serve.__version__))

    @router.get("/v2/health/live", summary="Is the service alive?", tags=["Open Inference Protocol v2"])
    async def live() -> Response:
        return _json({"live": True})

    @router.get("/v2/health/ready", summary="Can it answer?", tags=["Open Inference Protocol v2"])
    async def ready() -> Response:
        is_ready = catalog.readiness().ready
        return _json({"ready": is_ready}, HTTPStatus.OK if is_ready else _NOT_READY)

    @router.get("/v2/models/{name}", summary="What is this model?", tags=["Open Inference Protocol v2"])
    async def model(name: str) -> Response:
        return _json(_open_inference_metadata(catalog.get(name)))

    @router.get("/v2/models/{name}/versions/{version}", tags=["Open Inference Protocol v2"])
    async def model_version(name: str, version: str) -> Response:
        return _json(_open_inference_metadata(catalog.get(name, version)))

    @router.get("/v2/models/{name}/ready", summary="Can it answer?", tags=["Open Inference Protocol v2"])
    async def model_ready(name: str) -> Response:
        return _model_ready(catalog, name, None)

    @router.get("/v2/models/{name}/versions/{version}/ready", tags=["Open Inference Protocol v2"])
    async def model_version_ready(name: str, version: str) -> Response:
        return _model_ready(catalog, name, version)


def _add_tf_serving(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/v1/models/{name}", summary="What is each version doing?", tags=["TensorFlow Serving REST v1"])
    async def status(name: str) -> Response:
        return _json(_status(catalog, name, None))

    @router.get("/v1/models/{name}/versions/{version}", tags=["TensorFlow Serving REST v1"])
    async def version_status(name: str, version: str) -> Response:
        return _json(_status(catalog, name, version))

    @router.get("/v1/models/{name}/metadata", summary="What is this model?", tags=["TensorFlow Serving REST v1"])
    async def metadata(name: str) -> Response:
        return _json(_tf_serving_metadata(catalog.get(name)))

    @router.get("/v1/models/{name}/versions/{version}/metadata", tags=["TensorFlow Serving REST v1"])
    async def version_metadata(name: str, version: str) -> Response:
        return _json(_tf_serving_metadata(catalog.get(name, version)))


def _open_inference_metadata(served: ServedModel) -> dict[str, Any]:
    return open_inference_metadata.model_metadata(
        served.name, [served.version], served.manifest, {"bln_max_run_rows": served.max_run_rows}
    )


def _model_ready(catalog: Catalog, name: str, version: str | None) -> Response:
    try:
        catalog.get(name, version)
    except ModelNotReadyError:
        return _json({"name": name, "ready": False}, _NOT_READY)
    return _json({"name": name, "ready": True})


def _status(catalog: Catalog, name: str, version: str | None) -> dict[str, Any]:
    states = catalog.states(name)
    found = [(each.version, each.state, each.reason) for each in states if version in (None, str(each.version))]
    if version is not None and not found:
        known = ", ".join(str(each.version) for each in states) or "none"
        raise ModelNotFoundError(
            f"Expected one of the versions of model {name!r} that are served, loading or broken: {known}. "
            f"Received: {version!r}."
        )
    # KServe's own v1, which is TensorFlow Serving's otherwise, asks here whether a model is ready.
    ready = any(state == "AVAILABLE" for _, state, _ in found)
    return {"name": name, "ready": ready, **tf_serving.model_status(found)}


def _tf_serving_metadata(served: ServedModel) -> dict[str, Any]:
    return tf_serving.model_metadata(served.name, served.version, served.manifest)


def _json(document: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
