"""What people open in a browser: `/`, to try a model, and `/docs`, the description of the service.

Whoever asks `/` for no page, such as curl, is told in JSON where things are.

Every file comes from this service, and the pages tell the browser to fetch from nowhere else: no Internet is needed to
see them, and none learns of it. Swagger UI's files are those that the wheel of fastapi-swagger carries. Addresses in
the pages are relative, so that they work behind a proxy's prefix too.
"""

from collections.abc import Mapping
from pathlib import Path

import orjson
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import bln_serve

HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a browser asks whether its copy is the newest: upgrades show at once
}
OWN = ("try.js", "written.js", "drawing.js", "try.css", "docs.js", "icon.svg")
SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")

# "status" is what KServe's v1 clients look for, to see whether a server is alive.
_START = {
    "name": "bln_serve",
    "version": bln_serve.__version__,
    "status": "alive",
    "links": {
        "models": "/models",
        "predict": "/predict",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "metrics": "/metrics",
        "alive": "/healthz",
        "ready": "/readyz",
    },
}
_METHODS = ["GET", "HEAD"]


def routes() -> APIRouter:
    """Return the routes of the pages and of the files they consist of."""
    own = StaticFiles(directory=Path(__file__).parent / "static")
    swagger = StaticFiles(packages=[("fastapi_swagger", "resources")])
    router = APIRouter()

    @router.api_route("/", methods=_METHODS)
    async def start(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            response = await _file(own, "index.html", request)
        else:
            response = Response(orjson.dumps(_START), media_type="application/json")
        response.headers["vary"] = "accept"
        return response

    @router.api_route("/docs", methods=_METHODS)
    async def docs(request: Request) -> Response:
        return await _file(own, "docs.html", request)

    @router.api_route("/docs/{file}", methods=_METHODS)
    async def swagger_file(file: str, request: Request) -> Response:
        return await _file(swagger, _one_of(SWAGGER, file), request)

    @router.api_route("/static/{file}", methods=_METHODS)
    async def own_file(file: str, request: Request) -> Response:
        return await _file(own, _one_of(OWN, file), request)

    return router


async def _file(files: StaticFiles, name: str, request: Request) -> Response:
    response = await files.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response


def _one_of(names: tuple[str, ...], name: str) -> str:
    if name not in names:
        raise HTTPException(404)
    return name
