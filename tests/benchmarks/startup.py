"""From the start of the process to the first 200 of /readyz, and the memory that is then resident (VmRSS)."""

import http.client
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from support.engine import ROOT
from support.server import Server

from . import contestants
from .load import on, two_processors

ARTIFACT = ROOT / "tests" / "golden" / "artifacts" / "digits_cnn"
STARTS = 5
READY_S, RESIDENT_MB = 1.5, 130
LONGEST_S, EVERY_S = 60, 0.005


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    _start()  # from the disk; the ones that count find the files in memory
    starts = [_start() for _ in range(STARTS)]
    ready_s, resident_mb = (statistics.median(values) for values in zip(*starts, strict=True))
    slowest = max(ready_s for ready_s, _ in starts)
    yield f"| digits_cnn, one processor, medians of {STARTS} starts | at most | measured | met |"
    yield "|---|---|---|---|"
    yield (
        f"| start to ready, s | {READY_S} | {ready_s:.2f} (slowest {slowest:.2f}) | "
        f"{contestants.yes_or_no(ready_s <= READY_S)} |"
    )
    yield (
        f"| resident, MB | {RESIDENT_MB} | {resident_mb:.1f} | {contestants.yes_or_no(resident_mb <= RESIDENT_MB)} |"
    )


def _start() -> tuple[float, float]:
    """Start the service; return seconds and MB."""
    service_cpu, load_cpu = two_processors()
    began = time.perf_counter()
    with on(service_cpu):
        server = Server(str(ARTIFACT), "--threads", "1")
    try:
        with on(load_cpu):
            _wait(server)
        return time.perf_counter() - began, _resident_mb(server.process.pid)
    finally:
        server.end()


def _wait(server: Server) -> None:
    """Ask until it is ready; httpx would need longer to begin than it takes."""
    deadline = time.monotonic() + LONGEST_S
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=LONGEST_S)
    while time.monotonic() < deadline:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        answer.read()
        if answer.status == http.client.OK:
            connection.close()
            return
        time.sleep(EVERY_S)
    raise TimeoutError(f"Expected {server.url} to be ready within {LONGEST_S} s. Received: {server.lines}")


def _resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return int(found[1]) * 1024 / 1e6
