"""Where each microsecond goes: the service's processor time for one request in the v2 binary form, by stage.

A request goes through the whole application in this process, without a socket, and again with one stage more replaced
by what it returned before, until nothing is left: what each replacement spares is what that stage takes. So the stages
add up to the whole, nothing is measured from inside, and no clock's own cost has to be guessed. All these variants take
turns; a figure is the median of the turns' differences, in time of this process (CLOCK_PROCESS_CPUTIME_ID). What an
application that answers at once takes here, the driving itself, is taken off.

HTTP is what remains: the time that a real server's process takes for a request, by the system's count, while wrk loads
it, without what the application took here. For the service it holds what its connections do beside uvicorn's; with 32
clients, also what it costs that they do not come all at once, as they do here. Beside it is the bare application.
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import uvloop
from support.engine import install

from bln_serve.artifact import Artifact
from bln_serve.serving import answering, open_inference
from bln_serve.serving.app import create_app
from bln_serve.serving.prediction import Encoded, PredictRequest, Work
from bln_serve.serving.routes import Protocol, Target
from bln_serve.serving.served_model import ServedModel
from bln_serve.serving.settings import make

from . import contestants, wire
from .bare_app import BareApp
from .contestants import SHAPE
from .load import on, two_processors

CLIENTS = (1, 32)
LOAD_TURNS, LOAD_S, WARM_UP_S = 7, 2, 1
TURNS, REQUESTS = 11, 1920
LOADING_S = 60

App = Callable[[Any, Any, Any], Awaitable[None]]
Replace = Callable[[], "contextlib.AbstractContextManager[Any]"]


@dataclass(frozen=True)
class Server:
    """A server's process time for a request, in microseconds, and how many requests its runs held."""

    request_us: float
    requests_of_a_run: float


@dataclass(frozen=True)
class Bill:
    """Microseconds of one request: in the process of the service and of the bare app, and by stage here."""

    service: Server
    bare: Server
    stages: Mapping[str, float]
    bare_app: float


def rows() -> Iterator[str]:
    """Yield the lines of the table.

    Raises:
        RuntimeError: there is no wrk or no second processor, and none can be had.
    """
    install("wrk")
    service_cpu, _ = two_processors()
    with tempfile.TemporaryDirectory(prefix="bln-bench-") as folder:
        artifact = contestants.paper_cnn(Path(folder), "PPMM")
        bills = {}
        for clients in CLIENTS:
            service, bare = _served(artifact, clients)
            with on(service_cpu):
                stages, bare_app = uvloop.run(_in_process(artifact, clients))
            bills[clients] = Bill(service, bare, stages, bare_app)
    yield f"| microseconds of a request | {' | '.join(f'1 x {n} | the bare app' for n in CLIENTS)} |"
    yield f"|---|{'---|---|' * len(CLIENTS)}"
    lines: list[tuple[str, Callable[[Bill], tuple[float, float | None]]]] = [
        (
            "HTTP",
            lambda bill: (bill.service.request_us - sum(bill.stages.values()), bill.bare.request_us - bill.bare_app),
        ),
        *((name, lambda bill, name=name: (bill.stages[name], None)) for name in bills[1].stages),  # type: ignore[misc]
        ("application", lambda bill: (sum(bill.stages.values()), bill.bare_app)),
        ("process", lambda bill: (bill.service.request_us, bill.bare.request_us)),
    ]
    for name, figures in lines:
        cells = [f"{figure:.1f}" if figure is not None else "" for bill in bills.values() for figure in figures(bill)]
        yield f"| {name} | {' | '.join(cells)} |"
    held = ", ".join(f"{bill.service.requests_of_a_run:.1f} at 1 x {clients}" for clients, bill in bills.items())
    yield ""
    yield f"Requests that shared a run under wrk: {held}. Here all of the clients' do; the bare app's are never shared."


def _served(artifact: Artifact, clients: int) -> tuple[Server, Server]:
    """Load the service and the bare application in turns."""
    service_cpu, load_cpu = two_processors()
    message = wire.V2_BINARY.write(wire.images(1, *SHAPE))
    with (
        contestants.service(contestants.repository_of(artifact), processor=service_cpu) as service,
        contestants.bare_application(artifact.onnx_path, service_cpu) as (bare_url, bare_pid),
    ):
        servers = {service.url: service.process.pid, bare_url: bare_pid}
        taken: dict[str, list[float]] = {url: [] for url in servers}
        for url in servers:
            contestants.put_load(url, message, clients, WARM_UP_S, load_cpu)
        runs_before = _runs(service.url)
        for _ in range(LOAD_TURNS):
            for url, pid in servers.items():
                before = _process_s(pid)
                load = contestants.put_load(url, message, clients, LOAD_S, load_cpu)
                taken[url].append(1e6 * (_process_s(pid) - before) / load.requests)
        requests, runs = (after - before for after, before in zip(_runs(service.url), runs_before, strict=True))
    ours, bare = (statistics.median(figures) for figures in taken.values())
    return Server(ours, requests / runs), Server(bare, 1)


def _process_s(pid: int) -> float:
    """Return the processor seconds of another process so far."""
    return time.clock_gettime((~pid << 3) | 2)  # its CLOCK_PROCESS_CPUTIME_ID, as clock_getcpuclockid(3) makes it


def _runs(url: str) -> tuple[float, float]:
    """Return how many requests all runs have held, and how many runs there were."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("bln_run_requests"))
    total, count = (
        sum(float(value) for name, value in values.items() if name.startswith(f"bln_run_requests_{what}"))
        for what in ("sum", "count")
    )
    return total, count


async def _in_process(artifact: Artifact, clients: int) -> tuple[dict[str, float], float]:
    """Return the microseconds of the service's stages, in order, and of the bare application."""
    app = create_app(make(paths=[contestants.repository_of(artifact)], threads=1))
    app.state.catalog.alone = lambda: clients == 1  # what the server knows from its sockets
    message = wire.V2_BINARY.write(wire.images(1, *SHAPE))
    async with app.router.lifespan_context(app):
        async with asyncio.timeout(LOADING_S):
            while not app.state.catalog.readiness().ready:
                await asyncio.sleep(0.02)
        replacements = _replacements(app, message)
        contestants_here = {"": (_answers_at_once, []), "bare": (BareApp(str(artifact.onnx_path)), [])}
        for number in range(len(replacements) + 1):
            names = list(replacements)[:number]
            contestants_here[names[-1] if names else "whole"] = (app, [replacements[name] for name in names])
        turns: dict[str, list[float]] = {name: [] for name in contestants_here}
        for number in range(TURNS + 1):
            for name, (called, replaced) in contestants_here.items():
                with contextlib.ExitStack() as stack:
                    for replace in replaced:
                        stack.enter_context(replace())
                    request_us = await _drive(called, message, clients)
                if number:  # the first turn warms up
                    turns[name].append(request_us)
    order = ["whole", *replacements]
    spared = {after: statistics.median(_differences(turns[before], turns[after])) for before, after in pairwise(order)}
    rest = statistics.median(_differences(turns[order[-1]], turns[""]))
    stages = {"gate, routing, message, visit, deadline": rest, **dict(reversed(spared.items()))}
    return stages, statistics.median(_differences(turns["bare"], turns[""]))


def _differences(longer: Sequence[float], shorter: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(longer, shorter, strict=True)]


def _replacements(app: Any, message: wire.Message) -> dict[str, Replace]:
    """Return what puts nothing in the place of each stage, the last stage first.

    A replaced stage returns what the stage returned for this very message, made beforehand.
    """
    served: ServedModel = app.state.catalog.get(wire.MODEL)
    manifest, queue = served.manifest, served.queue
    rows = wire.images(1, *SHAPE)
    work = Work({wire.INPUT: rows}, None)
    row: dict[str, np.ndarray] = {
        spec.name: np.zeros((1, *spec.shape[1:]), spec.dtype) for spec in manifest.signature.outputs
    }
    encoded = Encoded(b"x" * 200, "application/octet-stream", {"inference-header-content-length": "160"})
    request = PredictRequest(work.inputs, lambda _: encoded, None, answers_text=False)
    protocol = Protocol(lambda *_: request, lambda _: 0)
    many = {count: [np.repeat(array, count, axis=0) for array in row.values()] for count in range(1, max(CLIENTS) + 1)}

    class Session:
        def run(self, _: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            return many[len(inputs[wire.INPUT])]

    async def answer(*_: Any) -> dict[str, np.ndarray]:
        return row

    def no_counting() -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(app.state.metrics, "answered", _nothing))
        stack.enter_context(mock.patch.object(queue, "_report", None))
        return stack

    patch = mock.patch.object
    return {
        "counting": no_counting,
        "writing": lambda: patch(open_inference, "_write", lambda *_: encoded),
        "running (ONNX Runtime)": lambda: patch(queue._run._model._session, "_session", Session()),
        "joining and dividing rows": lambda: patch(queue, "_run", lambda portions: [row] * len(portions)),
        "queueing": lambda: patch(ServedModel, "answer", answer),
        "checking": lambda: patch(answering, "prepare", lambda *_: work),
        "reading": lambda: patch(answering, "target_of", lambda _: Target(protocol, wire.MODEL)),
    }


def _nothing(*_: Any) -> None: ...


async def _drive(app: App, message: wire.Message, clients: int) -> float:
    """Have clients ask one after the other, each in a task for each request as uvicorn does; return microseconds."""
    loop = asyncio.get_running_loop()
    headers = [(b"host", b"127.0.0.1:8000"), (b"content-length", b"%d" % len(message.body))]
    headers += [(name.encode(), value.encode()) for name, value in message.headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 40000),
        "scheme": "http",
        "method": "POST",
        "root_path": "",
        "path": message.path,
        "raw_path": message.path.encode(),
        "query_string": b"",
        "headers": headers,
    }
    event = {"type": "http.request", "body": message.body, "more_body": False}
    gone: asyncio.Future[Any] = loop.create_future()

    async def ask() -> int:
        asked, status = False, 0

        async def receive() -> Any:
            nonlocal asked
            if asked:
                return await gone
            asked = True
            return event

        async def send(message: Mapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)

        await loop.create_task(app({**scope, "state": {}}, receive, send))  # type: ignore[arg-type]
        return status

    async def client() -> None:
        for _ in range(REQUESTS // clients):
            if (status := await ask()) != httpx.codes.OK:
                raise RuntimeError(f"Expected the answer's status to be 200. Received: {status}.")

    began = time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    return 1e6 * (time.process_time() - began) / (REQUESTS // clients * clients)


async def _answers_at_once(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})
