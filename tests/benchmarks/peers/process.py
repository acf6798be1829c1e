"""A peer's process on one processor, which ends with all that it started."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from support.engine import wait_until
from support.sockets import family_of

from benchmarks.load import on

READY_S, END_S = 120, 20


@dataclass(frozen=True)
class Running:
    """A server that is ready: where, and the process that was started."""

    url: str
    process_id: int


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], port: int, ready: str, processor: int, variables: Mapping[str, str]
) -> Iterator[Running]:
    """Start a server on one processor; begin when it is ready, and end it with its whole family.

    Args:
        command: what to start.
        port: where it will listen on 127.0.0.1.
        ready: the path that answers 200 when it is ready.
        processor: the only one of all its processes.
        variables: its environment, beside this process's own.

    Raises:
        RuntimeError: it ended before it was ready.
        TimeoutError: it was not ready in time.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", prefix="bln-peer-") as log:
        with on(processor):
            process = subprocess.Popen(
                command,
                env={**os.environ, "ORT_DISABLE_TELEMETRY": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        try:
            wait_until(lambda: process.poll() is not None or _answers(url + ready), READY_S, every_s=0.05)
            if process.poll() is not None:
                said = Path(log.name).read_text()[-2000:]
                raise RuntimeError(f"Expected a server that stays. Received: exit {process.returncode}\n{said}")
            yield Running(url, process.pid)
        finally:
            _end(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and kill what is left: some servers leave processes behind that go on listening."""
    family = family_of(process.pid) if process.poll() is None else [process.pid]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(_in_group(member, process.pid) for member in family), END_S)


def _in_group(process_id: int, group: int) -> bool:
    try:
        return os.getpgid(process_id) == group
    except ProcessLookupError:
        return False
