"""The process: the socket, the signals, the log and the exit code."""

import asyncio
import logging
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from bln_serve import processors
from bln_serve.errors import UsageError
from bln_serve.serving.app import create_app
from bln_serve.serving.catalog import Catalog
from bln_serve.serving.settings import Settings

logger = logging.getLogger(__name__)

FAILED = 1

_BACKLOG = 2048
# After the refusals of the last moment: for them to be sent, and for clients that never finished their request.
_LAST_WORDS_S = 1


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, answer what was accepted, and return the exit code.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: the paths contradict one another, or the address cannot be listened on.
    """
    app = create_app(settings)
    _log_plainly()
    listener = _listen(settings.host, settings.port)
    logger.info("bln-serve listening on %s", _url(listener))
    logger.info("threads of a run: %s", _threads(settings.threads))
    server = _Server(_configuration(app, settings), app.state.catalog, settings.shutdown_timeout_s)
    server.run(sockets=[listener])
    if app.state.catalog.threads_busy:
        # The interpreter would wait for a run that nobody waits for any more.
        sys.stdout.flush()
        os._exit(FAILED)
    return FAILED if server.refused_rows else 0


class _Server(uvicorn.Server):
    """Uvicorn, ending by itself: with the exit code 0 and, in time, with a refusal for what is left."""

    def __init__(self, config: uvicorn.Config, catalog: Catalog, shutdown_timeout_s: int) -> None:
        super().__init__(config)
        self._catalog = catalog
        self._shutdown_timeout_s = shutdown_timeout_s
        self.refused_rows = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        # Uvicorn's own raises the signal again at the end, and so the process would end as if it had been killed.
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._shutdown_timeout_s, self._refuse_rest)
        await super().shutdown(sockets)
        timer.cancel()

    def _refuse_rest(self) -> None:
        self.refused_rows = self._catalog.abort()
        if self.refused_rows:
            logger.error(
                "error: %d rows were refused %d s after the signal", self.refused_rows, self._shutdown_timeout_s
            )


def _configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s + _LAST_WORDS_S,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"Expected an address to listen on. Received: {host} port {port}: {error.strerror}. "
            "Give another --host or --port; port 0 takes any free one."
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _threads(threads: int | None) -> str:
    if threads:
        return f"{threads}, as set"
    available = processors.available()
    return f"{available.count}, for {available}"


def _log_plainly() -> None:
    """One line an event on stdout, flushed; of uvicorn only what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
