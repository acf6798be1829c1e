"""The composition test: how far a client's answers move while others ask, where batch statistics are live."""

import asyncio
import re
from dataclasses import dataclass

import httpx
import numpy as np
from e2e.composition import Answered, Arrays, Composition, Question, RefusedError, compose, stuttering

import bln_serve
from benchmarks.contestants import SHAPE
from benchmarks.load import on
from benchmarks.wire import INPUT
from bln_serve.artifact import Artifact
from bln_serve.runtime import Model
from bln_serve.verification import Tolerance, compare

from .peer import Peer
from .process import Running

ROWS = (2, 25)
EACH = 16
CLIENTS = 32
ROUNDS = 4


@dataclass(frozen=True)
class Mixing:
    """How far the worst answer moved.

    Attributes:
        peer: who gave it.
        rows: of its request.
        difference: max |among others - alone|.
        largest: max |alone|.
        tolerance: what rounding may do to it.
        requests_a_run: how many shared a run on average, where the server says so.
    """

    peer: Peer
    rows: int
    difference: float
    largest: float
    tolerance: Tolerance
    requests_a_run: float | None

    @property
    def tolerances(self) -> float:
        """The difference as a multiple of what is allowed."""
        return self.difference / (self.tolerance.rtol * self.largest)

    @property
    def kept_apart(self) -> bool:
        return self.tolerances <= 1


def mix(peer: Peer, artifact: Artifact, processors: tuple[int, int]) -> Mixing:
    """Serve the model, ask each question alone and then all at the same time.

    Raises:
        RuntimeError: a request failed, or an answer was wrong although nobody else asked.
    """
    server_processor, load_processor = processors
    model = bln_serve.load(artifact.path, threads=1)
    with peer.serve(artifact, server_processor) as running, on(load_processor):
        try:
            composition = asyncio.run(_compose(running, peer))
        except (RefusedError, httpx.TransportError) as error:
            raise RuntimeError(f"Expected an answer of {peer.title} to each request. Received: {error!r}") from error
        shared = _requests_a_run(running.url)
    for each in composition.answered:
        _check(peer, model, each)
    worst = composition.worst
    (alone,) = worst.alone.values()
    return Mixing(
        peer,
        worst.question.rows,
        max(_difference(worst.alone, together) for together in worst.together),
        float(np.abs(alone).max()),
        model.manifest.tolerance,
        shared,
    )


async def _compose(running: Running, peer: Peer) -> Composition:
    async with stuttering(running.process_id):
        load = {"clients": CLIENTS, "rounds": ROUNDS, "cancelled": 0}
        return await compose(running.url, peer.protocol, "model", questions(), **load)


def questions() -> list[Question]:
    """Draw requests, each of images with a brightness of their own, as those of different clients have."""
    rng = np.random.default_rng(0)

    def images(rows: int) -> np.ndarray:
        darkest = rng.uniform(0, 0.9)
        return rng.uniform(darkest, rng.uniform(darkest, 1), (rows, *SHAPE)).round(4).astype(np.float32)

    return [Question({INPUT: images(rows)}) for rows in ROWS for _ in range(EACH)]


def _check(peer: Peer, model: Model, answered: Answered) -> None:
    (alone,) = answered.alone.values()
    expected = np.asarray(model.predict(answered.question.inputs))
    check = compare(f"{peer.title}, {answered.question.rows} rows", expected, alone, model.manifest.tolerance)
    if not check.passed:
        raise RuntimeError(f"Expected the answer of the model itself while nobody else asks. Received: {check.line()}")


def _difference(alone: Arrays, together: Arrays) -> float:
    ((one,), (other,)) = alone.values(), together.values()
    return float(np.abs(one.astype(np.float64) - other).max())


def _requests_a_run(url: str) -> float | None:
    """Return what our own metrics say; None of another server."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    sums = dict(re.findall(r"^bln_run_requests_(sum|count)\{[^}]*\} (\S+)$", text, re.MULTILINE))
    return float(sums["sum"]) / float(sums["count"]) if sums else None
