"""What the service reaches of two floors, in one run: ONNX Runtime called in a loop, and a bare application around it.

The service, every check of its input on, has one processor; the load, wrk, another. ONNX Runtime alone runs on the
service's processor while nobody else does. All take turns, so that a machine that slows down slows all of them; a ratio
is the median of the turns' ratios. Where there is one client, rows a second are 1 / the median of its answers' times.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.engine import install
from support.server import Server

import bln_serve
from bln_serve.artifact import Artifact

from . import contestants, overload, startup, twins, wire
from .contestants import SHAPE, TURNS
from .load import Load, two_processors

LOAD_S, WARM_UP_S, ALONE_S = 2, 1, 0.5


@dataclass(frozen=True)
class Target:
    """What a case should reach at least: of ONNX Runtime alone, of the bare app; and p99 / p50 at most."""

    of_alone: float
    of_bare: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Case:
    """A load: rows of a request, clients, their form, the rows of the runs that it is compared with, and its target."""

    rows: int
    clients: int
    form: wire.Form
    alone_rows: int
    target: Target

    @property
    def title(self) -> str:
        return f"{self.rows} x {self.clients}, {self.form.title}"

    def rows_per_s(self, load: Load) -> float:
        return 1e3 * self.rows / load.median_ms if self.clients == 1 else load.requests_per_s * self.rows


CASES = (
    Case(1, 32, wire.V2_BINARY, 32, Target(0.40, 1.0, 2.5)),
    Case(1, 1, wire.V2_BINARY, 1, Target(0.19, 0.90)),
    Case(25, 8, wire.V2_BINARY, 25, Target(0.72, 0.93)),
    Case(1, 32, wire.V2_JSON, 32, Target(0.20)),
    Case(1, 32, wire.NESTED, 32, Target(0.18)),
)


@dataclass(frozen=True)
class Turn:
    """Rows a second of ONNX Runtime alone, and what the clients of the service and of the bare application saw."""

    alone_rows_per_s: float
    ours: Load
    bare: Load | None


def rows() -> Iterator[str]:
    """Yield the lines of the tables.

    Raises:
        RuntimeError: there is no wrk or no second processor, and none can be had; or an answer is wrong.
    """
    install("wrk")
    two_processors()
    with tempfile.TemporaryDirectory(prefix="bln-bench-") as folder:
        independent, coupled = (contestants.paper_cnn(Path(folder), policy) for policy in ("PPMM", "MMMM"))
        yield from _floors(independent)
        yield ""
        yield from twins.rows(independent, coupled)
        yield ""
        yield from overload.rows(Path(folder))
        yield ""
        yield from startup.rows()


def _floors(artifact: Artifact) -> Iterator[str]:
    ours_cpu, load_cpu = two_processors()
    alone, model = contestants.Alone(artifact.onnx_path, ours_cpu), bln_serve.load(artifact.path, threads=1)
    turns: dict[Case, list[Turn]] = {case: [] for case in CASES}
    with (
        contestants.service(contestants.repository_of(artifact), processor=ours_cpu) as server,
        contestants.bare_application(artifact.onnx_path, ours_cpu) as (bare_url, _),
    ):
        for case in CASES:
            for url in (server.url, bare_url) if case.target.of_bare else (server.url,):
                x = wire.images(case.rows, *SHAPE)
                contestants.check(url, case.form, x, model)
                contestants.put_load(url, case.form.write(x), case.clients, WARM_UP_S, load_cpu)
        for number in range(TURNS):
            for case, taken in turns.items():
                taken.append(_turn(case, alone, server, bare_url, load_cpu, bare_first=bool(number % 2)))
    yield (
        "| rows x clients | at least | ONNX Runtime alone, rows/s | the service, rows/s | of it | the bare app, rows/s "
        "| of it | p50, ms | p99, ms | p99 / p50 | met |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for case, taken in turns.items():
        yield _line(case, taken)
    sizes = ", ".join(f"{len(case.form.write(wire.images(case.rows, *SHAPE)).body)} ({case.title})" for case in CASES)
    yield ""
    yield f"Images of uniform random numbers with 4 decimals. Bytes of a request's body: {sizes}."
    yield f"The service said: {_said_of_runs(server)}. Medians of {TURNS} turns of {LOAD_S} s."


def _turn(
    case: Case, alone: contestants.Alone, server: Server, bare_url: str, load_cpu: int, *, bare_first: bool
) -> Turn:
    message = case.form.write(wire.images(case.rows, *SHAPE))
    alone_s = alone.run_s(wire.images(case.alone_rows, *SHAPE), ALONE_S)
    urls = [server.url, bare_url] if case.target.of_bare else [server.url]
    loads = {
        url: contestants.put_load(url, message, case.clients, LOAD_S, load_cpu)
        for url in (reversed(urls) if bare_first else urls)
    }
    return Turn(case.alone_rows / alone_s, loads[server.url], loads.get(bare_url))


def _line(case: Case, turns: Sequence[Turn]) -> str:
    ours = [case.rows_per_s(turn.ours) for turn in turns]
    of_alone = statistics.median(rate / turn.alone_rows_per_s for rate, turn in zip(ours, turns, strict=True))
    spread = statistics.median(turn.ours.p99_ms / turn.ours.median_ms for turn in turns)
    met = of_alone >= case.target.of_alone
    wanted, bare_cells = f"{case.target.of_alone:.2f} of ONNX Runtime", " | "
    bare = [case.rows_per_s(turn.bare) for turn in turns if turn.bare]
    if case.target.of_bare:
        of_bare = statistics.median(rate / other for rate, other in zip(ours, bare, strict=True))
        met = met and of_bare >= case.target.of_bare
        wanted += f", {case.target.of_bare:.2f} of the bare app"
        bare_cells = f"{statistics.median(bare):.0f} | {of_bare:.3f}"
    if case.target.spread:
        met = met and spread <= case.target.spread
        wanted += f"; p99 / p50 at most {case.target.spread}"
    p50, p99 = (statistics.median(getattr(turn.ours, name) for turn in turns) for name in ("median_ms", "p99_ms"))
    return (
        f"| {case.title} | {wanted} | {statistics.median(turn.alone_rows_per_s for turn in turns):.0f} | "
        f"{statistics.median(ours):.0f} | {of_alone:.3f} | {bare_cells} | {p50:.2f} | {p99:.2f} | {spread:.2f} | "
        f"{contestants.yes_or_no(met)} |"
    )


def _said_of_runs(server: Server) -> str:
    return next((line for line in server.lines if line.startswith("runs of ")), "nothing of its runs")
