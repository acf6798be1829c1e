"""wrk, which makes the load: clients that send one request again and again, each when it has the answer to the last.

The processor of what is measured, and the one of the load, are set before a program starts: it inherits them, with all
of its threads.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
wrk.method = "POST"
wrk.body = io.open("{body}", "rb"):read("*a")
{headers}
function done(summary, latency)
  local failed = summary.errors
  io.stderr:write(string.format(
    '{{"requests": %d, "us": %d, "failed": %d, "median_us": %d, "p99_us": %d}}', summary.requests, summary.duration,
    failed.connect + failed.read + failed.write + failed.status + failed.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Load:
    """What the clients saw: requests answered, those of a second, and the times of the answers."""

    requests: int
    requests_per_s: float
    median_ms: float
    p99_ms: float


def two_processors() -> tuple[int, int]:
    """Return a processor for what is measured and one for the load.

    Raises:
        RuntimeError: there is one alone.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        raise RuntimeError("Expected two processors, one for the service and one for the load. Received: one.")
    return processors[0], processors[1]


@contextlib.contextmanager
def on(processor: int) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def wrk(url: str, body: bytes, headers: Mapping[str, str], clients: int, seconds: int) -> Load:
    """Load an address, from this thread's processors.

    Raises:
        RuntimeError: a request failed, or was answered with an error.
    """
    with tempfile.TemporaryDirectory(prefix="bln-load-") as folder:
        content, script = Path(folder) / "body", Path(folder) / "script.lua"
        content.write_bytes(body)
        lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items())
        script.write_text(_SCRIPT.format(body=content, headers=lines))
        # An answer that takes longer than the time-out counts as failed: 2 s, were none given.
        timing = ("-d", f"{seconds}s", "--timeout", "60s")
        command = ["wrk", "-t", "1", "-c", str(clients), *timing, "-s", str(script), url]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    said = json.loads(result.stderr)
    if said["failed"] or not said["requests"]:
        raise RuntimeError(f"Expected an answer to each request. Received:\n{result.stdout}")
    rate = said["requests"] / (said["us"] / 1e6)
    return Load(said["requests"], rate, said["median_us"] / 1e3, said["p99_us"] / 1e3)
