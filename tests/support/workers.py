"""Services of several workers, as tests watch them: their processes, and what they tell together."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from support.server import DEADLINE_S, Server

MODEL = "digits_rnn"
URL = f"/models/{MODEL}/predict"


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (rows, 8, 8)).astype(np.float32)


def children(pid: int) -> list[int]:
    """The workers of a server, from the lowest process id."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def is_there(pid: int) -> bool:
    """Whether a process exists that has not ended. A zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], Any]) -> Any:
    began = time.monotonic()
    while not (outcome := condition()):
        assert time.monotonic() - began < DEADLINE_S
        time.sleep(0.05)
    return outcome


def get(server: Server, path: str) -> httpx.Response:
    """Ask on a connection of its own, and so whichever worker the system takes."""
    return httpx.get(f"{server.url}{path}", timeout=DEADLINE_S, trust_env=False)


def post(server: Server, x: np.ndarray, **parameters: Any) -> httpx.Response:
    body = {"instances": x.tolist(), **parameters}
    return httpx.post(f"{server.url}{URL}", json=body, timeout=DEADLINE_S, trust_env=False)


def samples(server: Server) -> dict[str, float]:
    lines = get(server, "/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def settled(server: Server, expected: dict[str, float]) -> list[dict[str, float]]:
    """Return the metrics as 24 connections see them, each of which has this in it.

    What a worker has done it tells the others ten times a second, and later on a busy machine: so the first to say
    what is expected is waited for. From then on all must, whichever worker they ask.
    """

    def seen() -> dict[str, float]:
        now = samples(server)
        return {name: now.get(name, 0) for name in expected}

    began = time.monotonic()
    while (now := seen()) != expected:
        assert time.monotonic() - began < DEADLINE_S, f"expected {expected}, last seen {now}"
        time.sleep(0.05)
    all_seen = [samples(server) for _ in range(24)]
    assert all(each.items() >= expected.items() for each in all_seen)
    return all_seen


def wait_until_all_are_ready(server: Server, workers: int = 2) -> None:
    began = time.monotonic()
    while sum(line.startswith(f"runs of {MODEL}") for line in server.lines) < workers:
        assert time.monotonic() - began < DEADLINE_S, server.lines
        time.sleep(0.05)


def wait_until_it_listens_no_more(server: Server) -> None:
    """Wait until no process takes connections any more, as after a signal."""
    address = urlsplit(server.url)

    def refused() -> bool:
        try:
            socket.create_connection((address.hostname, address.port), timeout=DEADLINE_S).close()
        except ConnectionError:
            return True
        return False

    wait_for(refused)


@contextlib.contextmanager
def ended_with_the_test(pids: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in pids:
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)


def written(server: Server, files: str, name: str) -> list[float]:
    """What each worker has in a file of its own under this name, of all labels."""
    from prometheus_client.mmap_dict import MmapedDict

    return [
        sum(value for key, value, *_ in MmapedDict.read_all_values_from_file(file) if name in key)
        for file in metrics_folder(server).glob(files)
    ]


def metrics_folder(server: Server) -> Path:
    variables = Path(f"/proc/{children(server.process.pid)[0]}/environ").read_bytes().split(b"\0")
    (folder,) = [line.partition(b"=")[2] for line in variables if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(os.fsdecode(folder))
