"""Ten times as many requests as a slow model can answer, from clients that do not wait: who is let in, and how soon.

The model computes so much a row that a processor runs some 80 to 100 of them a second; runs hold one row, so that no
merging makes it faster. The queue may hold what takes about a second. A request that is let in then waits for those
before it, at most the queue's bound; the others should hear at once that there is no room. Refusing costs the service's
only processor time, too, and the runs are slower for it: the bound is in seconds of the capacity without that.
"""

import base64
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import keras
from keras import layers
from support.models import bln, with_random_statistics

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.export import export

from . import contestants, open_loop, wire
from .load import on, two_processors

ROW_S = 0.011
RUNS_PER_S = (80, 100)
BOUND_S = 1
TIMES_CAPACITY = 10
SECONDS, CAPACITY_S, CAPACITY_CLIENTS, TIMING_S = 10, 5, 4, 1.0
SHAPE = (32, 32, 1)
OF_BOUND, REFUSED_MS = 1.5, 5

_FIRST_BLOCKS, _ATTEMPTS = 6, 4


@dataclass(frozen=True)
class Overload:
    """What came of it.

    Attributes:
        capacity: requests a second that the service answers when it refuses none.
        bound_s: how long the queue is at most, in seconds of that.
        seen: what the clients saw, as `open_loop` says it.
    """

    capacity: float
    bound_s: float
    seen: dict[str, Any]


def rows(folder: Path) -> Iterator[str]:
    """Yield the lines of the table."""
    measured = _measure(_slow_model(folder))
    accepted, refused = measured.seen["answers"]["200"], measured.seen["answers"]["503"]
    waits, refusal_ms = accepted["p99"] / 1e3 / measured.bound_s, refused["p50"]
    yield f"| overload, open loop, {TIMES_CAPACITY} times the capacity | at most | measured | met |"
    yield "|---|---|---|---|"
    yield (
        f"| p99 of {accepted['count']} accepted requests, of the queue's bound | {OF_BOUND} | {waits:.2f} "
        f"({accepted['p99']:.0f} ms of {1e3 * measured.bound_s:.0f}) | {contestants.yes_or_no(waits <= OF_BOUND)} |"
    )
    yield (
        f"| median of {refused['count']} refusals, ms | {REFUSED_MS} | {refusal_ms:.2f} (p99 {refused['p99']:.1f}) | "
        f"{contestants.yes_or_no(refusal_ms < REFUSED_MS)} |"
    )
    late = measured.seen["late_ms"]
    yield ""
    yield (
        f"Capacity {measured.capacity:.1f} runs/s (wanted: {RUNS_PER_S[0]} to {RUNS_PER_S[1]}). {late['count']} "
        f"requests in {SECONDS} s left {late['p50']:.2f} ms after they were due, 99 in 100 within {late['p99']:.2f} ms."
    )


def _measure(artifact: Artifact) -> Overload:
    service_cpu, load_cpu = two_processors()
    x = wire.images(1, *SHAPE)
    message = wire.V2_BINARY.write(x)
    queued = round(BOUND_S / _row_s(artifact, service_cpu))
    options = ("--max-run-rows", "1", "--max-queued-rows", str(queued))
    with contestants.service(contestants.repository_of(artifact), *options, processor=service_cpu) as server:
        contestants.check(server.url, wire.V2_BINARY, x, bln_serve.load(artifact.path, threads=1))
        load = contestants.put_load(server.url, message, CAPACITY_CLIENTS, CAPACITY_S, load_cpu)
        capacity = load.requests_per_s
        seen = _send(server.url, message, TIMES_CAPACITY * capacity, load_cpu)
    if set(seen["answers"]) != {"200", "503"} or seen["errors"]:
        raise RuntimeError(f"Expected answers and refusals, and nothing else. Received: {seen}")
    return Overload(capacity, queued / capacity, seen)


def _send(url: str, message: wire.Message, rate: float, processor: int) -> dict[str, Any]:
    """Send at a rate from a process of its own."""
    address = urlsplit(url)
    plan = {
        "host": address.hostname,
        "port": address.port,
        "path": message.path,
        "headers": message.headers,
        "body": base64.b64encode(message.body).decode(),
        "rate": rate,
        "seconds": SECONDS,
    }
    with on(processor):
        command = [sys.executable, open_loop.__file__]
        result = subprocess.run(command, input=json.dumps(plan), check=True, stdout=subprocess.PIPE, text=True)
    seen: dict[str, Any] = json.loads(result.stdout)
    return seen


def _slow_model(folder: Path) -> Artifact:
    """Export models with more or fewer blocks until one has the speed that is wanted; of several, take the nearest."""
    processor, _ = two_processors()
    tried: dict[int, tuple[float, Artifact]] = {}
    blocks = _FIRST_BLOCKS
    while len(tried) < _ATTEMPTS and blocks not in tried:
        artifact = export(_blocks(blocks), folder / f"slow-{blocks}", name=wire.MODEL)
        tried[blocks] = _row_s(artifact, processor), artifact
        if RUNS_PER_S[0] <= 1 / tried[blocks][0] <= RUNS_PER_S[1]:
            return artifact
        blocks = max(1, round(blocks * ROW_S / tried[blocks][0]))
    return min(tried.values(), key=lambda one: abs(math.log(one[0] / ROW_S)))[1]


def _row_s(artifact: Artifact, processor: int) -> float:
    return statistics.median(contestants.Alone(artifact.onnx_path, processor).runs_s(wire.images(1, *SHAPE), TIMING_S))


def _blocks(count: int) -> Any:
    """Return a model whose every block is 75 million operations a row, with hardly a weight."""
    keras.utils.set_random_seed(count)
    image = keras.Input(SHAPE, name=wire.INPUT)
    y = bln(25, "PPMM")(layers.Conv2D(64, 3, padding="same", activation="tanh")(image))
    for _ in range(count):
        y = layers.Conv2D(64, 3, padding="same", activation="relu", kernel_initializer="he_normal")(y)
    y = layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(y))
    return with_random_statistics(keras.Model(image, y, name="slow"))
