"""Several processes that share a port: started, started again when they die, and ended together.

Each is a fresh interpreter that runs the same command line; the system spreads the connections over them. This process
serves nothing, holds the port, and knows neither FastAPI nor ONNX Runtime. The first worker starts by itself: what is
wrong with the settings is said once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Sequence

from prometheus_client.multiprocess import mark_process_dead

from bln_serve import processors
from bln_serve.errors import UsageError
from bln_serve.serving import address, logs
from bln_serve.serving.lifeline import DRAIN, GO, LAST_WORDS_S, LISTENING, METRICS_FOLDER
from bln_serve.serving.settings import Settings
from bln_serve.serving.together import ready_file

logger = logging.getLogger(__name__)

FAILED = 1
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30
# A worker that served so long did not die of how it was started.
_STABLE_S = 60


def supervise(settings: Settings, command: Sequence[str], arguments: Sequence[str]) -> int:
    """Serve with several workers until SIGTERM or SIGINT, and return the exit code.

    Args:
        settings: the address and the number of workers.
        command: starts one; its number, the host and the port are added, and then the arguments.
        arguments: the command line that the settings came from.

    Returns:
        0 if every worker ended with 0; that of a worker that cannot even start; otherwise 1.

    Raises:
        UsageError: the address cannot be listened on, or there is no place for the metrics.
    """
    logs.configure(settings.log_format)
    try:
        folder = tempfile.TemporaryDirectory(prefix="bln-serve-")
    except OSError as error:
        raise UsageError(
            "Expected a folder for temporary files, where workers keep the metrics they share. Received: "
            f"{error.strerror}. Let this user write to /tmp (in a container: --tmpfs /tmp), or use --workers 1."
        ) from error
    with folder as metrics, address.reserve(settings.host, settings.port) as reserved:
        return asyncio.run(_Workers(settings, command, arguments, reserved, metrics).run())


class _Worker:
    """One process, and this end of its lifeline.

    Attributes:
        process: the process.
        since: when it started, in the event loop's time.
        listens: whether it listened.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: socket.socket) -> None:
        self.process = process
        self.since = asyncio.get_running_loop().time()
        self.listens = False
        self._lifeline = lifeline

    async def wait_until_it_listens(self) -> None:
        """Wait until it listens, or has ended."""
        try:
            self.listens = await asyncio.get_running_loop().sock_recv(self._lifeline, 1) == LISTENING
        except OSError:
            self.listens = False
        if not self.listens:
            await self.process.wait()

    async def wait(self) -> int:
        """Wait until it has ended, and return its exit code."""
        code = await self.process.wait()
        self._lifeline.close()
        return code

    def order(self, what: bytes) -> None:
        """Tell it what to do, if it is still there."""
        with contextlib.suppress(OSError):
            self._lifeline.send(what)

    def kill(self) -> None:
        """End it at once."""
        if self.process.returncode is None:
            self.process.kill()


class _Workers:
    """All of them. Made and run within one event loop."""

    def __init__(
        self,
        settings: Settings,
        command: Sequence[str],
        arguments: Sequence[str],
        reserved: socket.socket,
        metrics: str,
    ) -> None:
        self._settings = settings
        self._url = address.url(reserved)
        host, port = reserved.getsockname()[:2]
        self._command = tuple(command)
        self._arguments = (host, str(port), *arguments)
        self._metrics = metrics
        self._workers: dict[int, _Worker] = {}
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Start them, keep them going, and return the exit code once they are told to end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._take_signal)
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        grace_s = self._settings.shutdown_timeout_s + LAST_WORDS_S
        await asyncio.wait({serving}, timeout=grace_s)
        stopping.cancel()
        if not serving.done():
            logger.error("error: workers that had not ended %d s after the signal are killed", grace_s)
            self._kill()
        return await serving

    def _take_signal(self) -> None:
        if self._stopping.is_set():
            logger.error("error: ending at once, after a second signal; what was not answered is lost")
            self._kill()
        self._drain()

    def _drain(self) -> None:
        self._stopping.set()
        for worker in self._workers.values():
            worker.order(DRAIN)

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.kill()

    async def _serve(self) -> int:
        await self._start(0)
        if self._workers[0].listens and not self._stopping.is_set():
            await asyncio.gather(*(self._start(number) for number in range(1, self._settings.workers)))
        failed = [worker for worker in self._workers.values() if not worker.listens]
        if failed:
            self._drain()
        elif not self._stopping.is_set():
            logger.info("bln-serve listening on %s", self._url)
            logger.info(
                "threads of a run: %s", processors.threads_of_a_run(self._settings.threads, self._settings.workers)
            )
        for worker in self._workers.values():
            worker.order(GO)
        codes = await asyncio.gather(*map(self._keep, self._workers))
        if failed:
            if (code := await failed[0].wait()) < 0:  # otherwise it has said why
                logger.error("error: a worker ended %s before it listened", _ending(code))
            return max(code, FAILED)
        return FAILED if any(codes) else 0

    async def _keep(self, number: int) -> int:
        """Start a worker again whenever it dies; return the exit code of the one that was told to end."""
        pause_s: float = FIRST_PAUSE_S
        while True:
            worker = self._workers[number]
            code = await worker.wait()
            mark_process_dead(number, self._metrics)  # type: ignore[no-untyped-call]
            ready_file(self._metrics, number).unlink(missing_ok=True)
            if self._stopping.is_set():
                return code
            if asyncio.get_running_loop().time() - worker.since > _STABLE_S:
                pause_s = FIRST_PAUSE_S
            logger.error(
                "error: worker %d ended %s; another one starts in %g s", worker.process.pid, _ending(code), pause_s
            )
            if await self._stops_within(pause_s):
                return 0
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            await self._start(number)
            self._workers[number].order(GO)

    async def _stops_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _start(self, number: int) -> None:
        """Start a worker, and wait until it listens or has ended."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(number),
                *self._arguments,
                stdin=theirs.fileno(),
                env={**os.environ, METRICS_FOLDER: self._metrics},
            )
        worker = self._workers[number] = _Worker(process, ours)
        if self._stopping.is_set():
            worker.order(DRAIN)
        await worker.wait_until_it_listens()


def _ending(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"
