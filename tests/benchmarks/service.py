"""Requests a second of the service against ONNX Runtime called in a loop in this process: what serving costs."""

import io
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from support.server import Server

import bln_serve

ARTIFACT = Path(__file__).parents[1] / "golden" / "artifacts" / "digits_cnn"
SECONDS = 1.5
TURNS = 5


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| rows a request | clients | ONNX Runtime alone, requests/s | the service reaches |"
    yield "|---|---|---|---|"
    model = bln_serve.load(ARTIFACT / "1", threads=1)
    server = Server(str(ARTIFACT), "--threads", "1")
    try:
        while httpx.get(f"{server.url}/readyz").status_code != httpx.codes.OK:
            time.sleep(0.05)
        for size, clients in ((1, 1), (1, 8), (25, 1)):
            x = np.random.default_rng(size).uniform(0, 16, (size, 8, 8)).astype(np.float32)
            turns = [(_alone(model, x), _served(server.url, x, clients)) for _ in range(TURNS)]
            alone = statistics.median(turn[0] for turn in turns)
            ratio = statistics.median(served / floor for floor, served in turns)
            yield f"| {size} | {clients} | {alone:.0f} | {ratio:.3f} of it |"
    finally:
        server.end()


def _alone(model: bln_serve.runtime.Model, x: np.ndarray) -> float:
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        model.run({"image": x}, None)
        count += 1
    return count / (time.perf_counter() - began)


def _served(url: str, x: np.ndarray, clients: int) -> float:
    body = io.BytesIO()
    np.save(body, x)
    counts = [0] * clients
    deadline = time.perf_counter() + SECONDS

    def keep_asking(index: int) -> None:
        headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
        with httpx.Client() as client:
            while time.perf_counter() < deadline:
                client.post(f"{url}/predict", content=body.getvalue(), headers=headers).raise_for_status()
                counts[index] += 1

    threads = [threading.Thread(target=keep_asking, args=[index]) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS
