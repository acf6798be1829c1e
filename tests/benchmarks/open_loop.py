"""Clients that do not wait: requests at times set beforehand, whether or not the earlier ones have been answered.

A program of its own, which a benchmark gives a processor of its own. It reads a plan as JSON from its input and writes
what it saw as JSON. There are as many connections as requests are unanswered at once; each is kept. An answer's time
runs from when its request was due, so that a service that stalls cannot hide what it makes wait.
"""

import asyncio
import base64
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import uvloop

LAST_ANSWER_S = 20


class Tally:
    """What became of the requests: milliseconds by status, the connections that broke, and how late requests left."""

    def __init__(self) -> None:
        self.answers: dict[int, list[float]] = {}
        self.errors: Counter[str] = Counter()
        self.late_ms: list[float] = []
        self.open = 0

    def answered(self, status: int, due: float) -> None:
        self.open -= 1
        self.answers.setdefault(status, []).append(1e3 * (time.perf_counter() - due))

    def lost(self, error: Exception | None) -> None:
        self.open -= 1
        self.errors[type(error).__name__ if error else "connection closed"] += 1


class Connection(asyncio.Protocol):
    """One connection, with at most one request at a time."""

    def __init__(self, request: bytes, idle: list["Connection"], tally: Tally) -> None:
        self._request = request
        self._idle = idle
        self._tally = tally
        self._due: float | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def ask(self, due: float) -> None:
        self._due = due
        self._tally.late_ms.append(1e3 * (time.perf_counter() - due))
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end].lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(self._received) < end + 4 + length or self._due is None:
            return
        self._tally.answered(int(head[9:12]), self._due)
        self._received, self._due = b"", None
        if b"connection: close" in head:
            self._transport.close()
        else:
            self._idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        if self._due is not None:
            self._due = None
            self._tally.lost(exc)


async def send_all(host: str, port: int, request: bytes, rate: float, seconds: float) -> Tally:
    """Send requests at an even rate for so long, and wait for the last answers."""
    loop, tally = asyncio.get_running_loop(), Tally()
    idle: list[Connection] = []
    opening: set[asyncio.Task[None]] = set()

    async def ask_anew(due: float) -> None:
        try:
            _, connection = await loop.create_connection(lambda: Connection(request, idle, tally), host, port)
        except OSError as error:
            tally.lost(error)
        else:
            connection.ask(due)

    began = time.perf_counter() + 0.1
    for number in range(int(rate * seconds)):
        due = began + number / rate
        while time.perf_counter() < due:  # in turns with the answers; the processor has nothing else to do
            await asyncio.sleep(0)
        tally.open += 1
        if idle:
            idle.pop().ask(due)
        else:
            task = loop.create_task(ask_anew(due))
            opening.add(task)
            task.add_done_callback(opening.discard)
    deadline = time.perf_counter() + LAST_ANSWER_S
    while tally.open and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    return tally


def described(values: Sequence[float]) -> dict[str, float]:
    """Return how many there are, and the smallest that half of them, and 99 in 100, do not exceed."""
    ordered = sorted(values)
    return {"count": len(ordered)} | {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        for name, share in (("p50", 0.5), ("p99", 0.99))
        if ordered
    }


def main() -> None:
    """Do what the plan says."""
    plan = json.load(sys.stdin)
    body = base64.b64decode(plan["body"])
    headers = {"host": f"{plan['host']}:{plan['port']}", "content-length": str(len(body)), **plan["headers"]}
    lines = [f"POST {plan['path']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    tally = uvloop.run(send_all(plan["host"], plan["port"], request, plan["rate"], plan["seconds"]))
    seen = {
        "answers": {status: described(times) for status, times in tally.answers.items()},
        "errors": {**tally.errors, **({"no answer": tally.open} if tally.open else {})},
        "late_ms": described(tally.late_ms),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
