"""The process that answers: the signals, and the exit code."""

import asyncio
import logging
import os
import shutil
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from bln_serve import processors
from bln_serve.serving import address, logs
from bln_serve.serving.app import Application, create_app
from bln_serve.serving.catalog import Catalog
from bln_serve.serving.connections import Connection
from bln_serve.serving.lifeline import Lifeline
from bln_serve.serving.metrics import Metrics, folder_of_all
from bln_serve.serving.settings import Settings
from bln_serve.serving.together import Together

logger = logging.getLogger(__name__)

FAILED = 1

# After the refusals of the last moment: for them to be sent, and for clients that never finished their request.
_LAST_WORDS_S = 1


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, answer what was accepted, and return the exit code.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: the paths contradict one another, or the address cannot be listened on.
    """
    app = create_app(settings)
    logs.configure(settings.log_format)
    listener = address.listen(settings.host, settings.port)
    logger.info("bln-serve listening on %s", address.url(listener))
    logger.info("threads of a run: %s", processors.threads_of_a_run(settings.threads))
    return _run(_Server(app, settings), listener)


def work(settings: Settings, lifeline: Lifeline, number: int) -> int:
    """Serve as one of several workers, until told to end, and return the exit code.

    Args:
        settings: with the address that all of them share.
        lifeline: to the process that started it.
        number: which of the workers it is, from 0.

    Raises:
        ModelNotFoundError, UsageError: as `serve` does.
    """
    app = create_app(settings)
    logs.configure(settings.log_format)
    listener = address.listen(settings.host, settings.port, shared=True)
    if not lifeline.report_listening():
        return 0
    server = _Worker(app, settings)
    if folder := folder_of_all():
        server.join(Together(folder, number, settings.workers))
    lifeline.obey(server.drain, settings.shutdown_timeout_s)
    code = _run(server, listener)
    if lifeline.orphaned and folder:
        shutil.rmtree(folder, ignore_errors=True)
    return code


class _Server(uvicorn.Server):
    """Uvicorn, ending by itself: with the exit code 0 and, in time, with a refusal for what is left."""

    def __init__(self, app: Application, settings: Settings) -> None:
        super().__init__(_configuration(app, settings))
        self.catalog: Catalog = app.state.catalog
        self.metrics: Metrics = app.state.metrics
        self.catalog.alone = lambda: len(self.server_state.tasks) == 1
        self._shutdown_timeout_s = settings.shutdown_timeout_s
        self.refused_rows = 0

    def drain(self) -> None:
        """Begin to end: be not ready, listen no more, answer what was accepted. May be called from a thread."""
        self.catalog.drain()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        # Uvicorn's own raises the signal again at the end, and so the process would end as if it had been killed.
        if self.should_exit:
            logger.error("error: ending at once, after a second signal; what was not answered is lost")
            _leave()
        self.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._shutdown_timeout_s, self._refuse_rest)
        await super().shutdown(sockets)
        timer.cancel()

    def _refuse_rest(self) -> None:
        self.refused_rows = self.catalog.abort()
        if self.refused_rows:
            logger.error(
                "error: %d rows were refused %d s after the signal", self.refused_rows, self._shutdown_timeout_s
            )


class _Worker(_Server):
    """One of several, whose signals are another process's to count: Ctrl-C reaches all of them."""

    _together: Together | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        self.drain()

    def join(self, together: Together) -> None:
        """Be ready only with the others."""
        self.catalog.workers_ready = together.workers_ready
        self._together = together

    async def on_tick(self, counter: int) -> bool:
        self.metrics.refresh()
        if self._together:
            self._together.tell(ready=self.catalog.ready_by_itself)
        return await super().on_tick(counter)


def _run(server: _Server, listener: socket.socket) -> int:
    server.run(sockets=[listener])
    if server.catalog.threads_busy:
        # The interpreter would wait for a run that nobody waits for any more.
        _leave()
    code = FAILED if server.refused_rows else 0
    if server.catalog.background_busy:
        # A version is being loaded that nobody will ask: ONNX Runtime must not be cut off while the interpreter ends.
        _leave(code)
    return code


def _leave(code: int = FAILED) -> None:
    sys.stdout.flush()
    os._exit(code)


def _configuration(app: Application, settings: Settings) -> uvicorn.Config:
    connection: Any = partial(Connection, idle_timeout_s=settings.idle_timeout_s)
    return uvicorn.Config(
        app.entry,
        interface="asgi3",
        http=connection,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request comes from
        timeout_graceful_shutdown=settings.shutdown_timeout_s + _LAST_WORDS_S,
    )
