"""What a machine for the serving container is sized by: rows a second on one core, answer times, memory, start.

The container has one core beside its other restrictions, and the load generator, wrk, another. A client of the load
sends its next request when it has the answer to the last, so that the service's core is never idle. In turns with that,
ONNX Runtime is called in a loop on the service's core, with nothing around it.

Memory is that of the service's process: resident (VmRSS), of it the process's own (RssAnon; the rest are libraries'
pages, which the containers of one image share), and the most that was resident (VmHWM). A cgroup's working set leaves
out the files that another container has read before, and so differs from start to start.
"""

import contextlib
import io
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from support import paper
from support.base_image import provide_base_image
from support.container import NPY, RESTRICTED, Container, npy, running_service
from support.engine import ROOT, Engine, install, running_engine, wait_until
from support.images import trusted_certificates

import bln_serve
from bln_serve.export import export
from bln_serve.runtime import Model
from bln_serve.verification import compare

from .load import on, two_processors, wrk

IMAGE = "bln-serve:benchmark"
MODELS = ROOT / "models"
LOAD_S, WARM_UP_S, ALONE_S = 3, 1, 1
TURNS = 7
STARTS = 3
READY_S = 60


def _digits(rows: int) -> np.ndarray:
    return np.load(MODELS / "digits_samples.npz")["images"][:rows].astype(np.float32)


def _photographs(rows: int) -> np.ndarray:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3))
    return (pixels / 255).astype(np.float32)


@dataclass(frozen=True)
class Request:
    """What each client sends again and again. `form` is npy or JSON."""

    rows: int
    clients: int
    form: str = "npy"

    @property
    def headers(self) -> dict[str, str]:
        return NPY if self.form == "npy" else {"content-type": "application/json"}

    def body(self, x: np.ndarray) -> bytes:
        return npy(x) if self.form == "npy" else json.dumps({"instances": x.tolist()}).encode()

    def read(self, body: bytes) -> np.ndarray:
        if self.form == "npy":
            return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))
        return np.asarray(json.loads(body)["predictions"], np.float32)


@dataclass(frozen=True)
class Subject:
    """A model to serve: its name in the repository and in the table, what is exported, and what it is sent."""

    name: str
    title: str
    policy: str
    source: Callable[[], Any]
    draw: Callable[[int], np.ndarray]
    requests: tuple[Request, ...]


ANY_ROWS = (Request(1, 8), Request(1, 8, "JSON"), Request(25, 4), Request(256, 2))
MINI_BATCHES = (Request(2, 8), Request(2, 8, "JSON"), Request(25, 4), Request(250, 2))
SUBJECTS = (
    Subject("digits_cnn", "digits_cnn", "PPMM", lambda: MODELS / "digits_cnn.keras", _digits, ANY_ROWS),
    Subject("digits_rnn", "digits_rnn", "MMMM", lambda: MODELS / "digits_rnn.keras", _digits, MINI_BATCHES),
    Subject("paper_cnn", "paper's CNN", "PPMM", lambda: paper.under(paper.cnn, "PPMM"), _photographs, ANY_ROWS),
)


@dataclass(frozen=True)
class Turn:
    """Rows a second of ONNX Runtime alone and of the service right after it, and the answers' times in ms."""

    alone_rows_per_s: float
    rows_per_s: float
    median_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Idle:
    """A service that is ready and was not asked yet: seconds since its container started, and MiB."""

    ready_s: float
    resident: float
    own: float


class Bench:
    """The image, the exported models, a core for the service and a core for the load."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.service_cpu, self.load_cpu = two_processors()
        self._engine = engine
        self._folder = folder
        self._image = engine.build("serve", IMAGE, trusted_certificates())
        # The container's user reads what this one writes.
        folder.chmod(0o755)
        self._models: dict[str, Model] = {}
        for each in SUBJECTS:
            artifact = export(each.source(), folder, name=each.name, statistics=each.policy)
            self._models[each.name] = bln_serve.load(artifact.path, threads=1)

    @contextlib.contextmanager
    def service(self, subjects: Sequence[Subject]) -> Iterator[Container]:
        """Run the service on these models alone; begin when it is ready.

        Yields:
            The container, by its own address: the engine's proxy of a published port would want a core of its own.
        """
        options = (*RESTRICTED, "--cpuset-cpus", str(self.service_cpu))
        paths = [f"/models/{each.name}" for each in subjects]
        with running_service(self._engine, self._image, self._folder, *paths, options=options) as published:
            (network,) = published.inspect()["NetworkSettings"]["Networks"].values()
            container = replace(published, url=f"http://{network['IPAddress']}:8000")
            with on(self.load_cpu):
                wait_until(lambda: _is_ready(container), READY_S, every_s=0.01)
            yield container

    def idle(self, subjects: Sequence[Subject]) -> Idle:
        """Start the service a few times; return the medians."""
        starts = [astuple(self._start(subjects)) for _ in range(STARTS)]
        return Idle(*(statistics.median(values) for values in zip(*starts, strict=True)))

    def _start(self, subjects: Sequence[Subject]) -> Idle:
        with self.service(subjects) as container:
            ready = datetime.now(UTC)
            started = datetime.fromisoformat(container.inspect()["State"]["StartedAt"])
            memory = memory_mib(container)
            return Idle((ready - started).total_seconds(), memory["VmRSS"], memory["RssAnon"])

    def turns(self, container: Container, subject: Subject) -> dict[Request, list[Turn]]:
        """Check the answers, then put each load on the service and on ONNX Runtime, in turns."""
        turns: dict[Request, list[Turn]] = {request: [] for request in subject.requests}
        for request in subject.requests:
            self._check_answer(container, subject, request)
            self.load(container, subject, request, WARM_UP_S)
        for _ in range(TURNS):
            for request, taken in turns.items():
                alone = self._alone(subject, request.rows)
                taken.append(Turn(alone, *self.load(container, subject, request, LOAD_S)))
        return turns

    def load(
        self, container: Container, subject: Subject, request: Request, seconds: int
    ) -> tuple[float, float, float]:
        """Return rows a second, and the median and 99th percentile of the answers' times in ms.

        Raises:
            RuntimeError: a request failed, or was refused.
        """
        url = f"{container.url}/models/{subject.name}/predict"
        with on(self.load_cpu):
            load = wrk(url, request.body(subject.draw(request.rows)), request.headers, request.clients, seconds)
        return load.requests_per_s * request.rows, load.median_ms, load.p99_ms

    def _alone(self, subject: Subject, rows: int) -> float:
        model = self._models[subject.name]
        inputs, sizes = dict(model.manifest.signature.named(subject.draw(rows))), model.cut(rows)
        with on(self.service_cpu):
            began, runs = time.perf_counter(), 0
            while time.perf_counter() - began < ALONE_S:
                model.run(inputs, sizes)
                runs += 1
            return runs * rows / (time.perf_counter() - began)

    def _check_answer(self, container: Container, subject: Subject, request: Request) -> None:
        model, x = self._models[subject.name], subject.draw(request.rows)
        url = f"{container.url}/models/{subject.name}/predict"
        answer = httpx.post(url, content=request.body(x), headers=request.headers).raise_for_status()
        what = f"{subject.name}, {request.rows} rows, {request.form}"
        check = compare(what, np.asarray(model.predict(x)), request.read(answer.content), model.manifest.tolerance)
        if not check.passed:
            raise RuntimeError(f"Expected the answer of the model itself. Received: {check.line()}")


def rows() -> Iterator[str]:
    """Yield the lines of both tables.

    Raises:
        RuntimeError: there is no wrk, no Docker engine, or no second processor, and none can be had.
    """
    install("wrk")
    with running_engine() as engine, tempfile.TemporaryDirectory(prefix="bln-bench-") as folder:
        provide_base_image(engine)
        bench = Bench(engine, Path(folder))
        peaks: dict[str, float] = {}
        yield (
            "| model | policy | rows a request | body | clients | rows/s | lowest to highest turn | median, ms | "
            "p99, ms | ONNX Runtime alone, rows/s | the service reaches |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|---|"
        for subject in SUBJECTS:
            with bench.service([subject]) as container:
                for request, turns in bench.turns(container, subject).items():
                    yield _loaded(subject, request, turns)
                peaks[subject.name] = memory_mib(container)["VmHWM"]
        yield ""
        yield "| models served | ready after, s | resident, MiB | of it its own, MiB | most under load, MiB |"
        yield "|---|---|---|---|---|"
        for subject in SUBJECTS:
            yield _idle([subject], bench.idle([subject]), peaks[subject.name])
        yield _idle(SUBJECTS[:2], bench.idle(SUBJECTS[:2]), None)
        yield _idle(SUBJECTS, bench.idle(SUBJECTS), _peak(bench))


def _loaded(subject: Subject, request: Request, turns: Sequence[Turn]) -> str:
    alone, rate, median_ms, p99_ms = (statistics.median(values) for values in zip(*map(astuple, turns), strict=True))
    rates = [turn.rows_per_s for turn in turns]
    reached = statistics.median(turn.rows_per_s / turn.alone_rows_per_s for turn in turns)
    return (
        f"| {subject.title} | {subject.policy} | {request.rows} | {request.form} | {request.clients} | {rate:.0f} | "
        f"{min(rates):.0f} to {max(rates):.0f} | {median_ms:.1f} | {p99_ms:.1f} | {alone:.0f} | {reached:.3f} of it |"
    )


def _idle(subjects: Sequence[Subject], idle: Idle, peak: float | None) -> str:
    titles = ", ".join(each.title for each in subjects)
    most = "" if peak is None else f"{peak:.0f}"
    return f"| {titles} | {idle.ready_s:.2f} | {idle.resident:.1f} | {idle.own:.1f} | {most} |"


def _peak(bench: Bench) -> float:
    """Return the most MiB of the service with every model, each under each of its loads."""
    with bench.service(SUBJECTS) as container:
        for subject in SUBJECTS:
            for request in subject.requests:
                bench.load(container, subject, request, WARM_UP_S)
        return memory_mib(container)["VmHWM"]


def memory_mib(container: Container) -> dict[str, float]:
    """Return what the kernel says of the service's process, such as VmRSS, in MiB."""
    status = container.engine.docker("exec", container.id, "cat", "/proc/1/status")
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}


def _is_ready(container: Container) -> bool:
    answer = container.readyz()
    assert answer or container.inspect()["State"]["Running"], container.logs()
    return answer is not None and answer.status_code == httpx.codes.OK
