"""The peers under the same loads, in turns: each is started anew in each turn and has its processor for itself.

A server that waits also works (LitServe's workers poll), so that no two run at the same time.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx

import bln_serve
from benchmarks import contestants, wire
from benchmarks.contestants import SHAPE
from benchmarks.load import Load
from bln_serve.artifact import Artifact

from .peer import Peer


@dataclass(frozen=True)
class Burden:
    """What is asked of a server: rows a request, and how many clients ask at the same time."""

    rows: int
    clients: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.clients}"


_ANSWERS_A_CLIENT, _LONGEST_S = 10, 30
"""A slow server is loaded for longer: its answers come in bursts, a whole batch at a time."""
_PATIENCE_S = 60

BURDENS = (Burden(1, 1), Burden(1, 8), Burden(1, 32), Burden(25, 8))


@dataclass(frozen=True)
class Entry:
    """A server asked in one format under one load, and what the clients saw in each turn."""

    peer: Peer
    form: wire.Form
    burden: Burden
    loads: list[Load] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return statistics.median(load.requests_per_s for load in self.loads)

    @property
    def median_ms(self) -> float:
        return statistics.median(load.median_ms for load in self.loads)

    @property
    def p99_ms(self) -> float:
        return statistics.median(load.p99_ms for load in self.loads)

    def times(self, other: "Entry") -> float:
        """Return how many times the other's requests a second: the median over the turns, pair by pair."""
        pairs = zip(self.loads, other.loads, strict=True)
        return statistics.median(one.requests_per_s / two.requests_per_s for one, two in pairs)


@dataclass(frozen=True)
class Timing:
    """How often each server has its turn, and the seconds of one load, after a shorter one that does not count."""

    turns: int
    load_s: int
    warm_up_s: int = 1


class Contest:
    """All entries.

    Args:
        peers: whoever has a format to be asked in.
        artifact: the model, the same for all.
        processors: the servers', and the load's.
    """

    def __init__(self, peers: Sequence[Peer], artifact: Artifact, processors: tuple[int, int]) -> None:
        self._artifact = artifact
        self._processor, self._load_processor = processors
        self._model = bln_serve.load(artifact.path, threads=1)
        self.peers = [peer for peer in peers if peer.forms]
        self.entries = [Entry(peer, form, burden) for burden in BURDENS for peer in self.peers for form in peer.forms]

    def run(self, timing: Timing) -> Iterator[Peer]:
        """Measure; yield whose turn is over.

        Raises:
            RuntimeError: a server did not start, gave another answer than the model's, or failed a request.
        """
        for _ in range(timing.turns):
            for peer in self.peers:
                with peer.serve(self._artifact, self._processor) as running:
                    for entry in self.entries:
                        if entry.peer is peer:
                            self._load(running.url, entry, timing)
                yield peer

    def _load(self, url: str, entry: Entry, timing: Timing) -> None:
        x = wire.images(entry.burden.rows, *SHAPE)
        if not entry.loads:
            contestants.check(url, entry.form, x, self._model)
        message = entry.form.write(x)
        answer_s = self._answer_s(url, message)
        warm_up_s = max(timing.warm_up_s, 2 * entry.burden.clients * answer_s)
        self._put(url, message, entry.burden, warm_up_s)
        self._answer_s(url, message)  # waits for what the warm-up has left behind
        load_s = max(timing.load_s, _ANSWERS_A_CLIENT * entry.burden.clients * answer_s)
        entry.loads.append(self._put(url, message, entry.burden, load_s))

    def _answer_s(self, url: str, message: wire.Message) -> float:
        """Return the seconds of the second of two answers."""
        with httpx.Client(base_url=url, timeout=_PATIENCE_S, trust_env=False) as client:
            for _ in range(2):
                began = time.perf_counter()
                client.post(message.path, content=message.body, headers=message.headers).raise_for_status()
            return time.perf_counter() - began

    def _put(self, url: str, message: wire.Message, burden: Burden, seconds: float) -> Load:
        whole_s = min(math.ceil(seconds), _LONGEST_S)
        return contestants.put_load(url, message, burden.clients, whole_s, self._load_processor)
