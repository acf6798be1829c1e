"""The service against itself: what it gains by letting requests share runs, and by a second process."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import bln_serve
from bln_serve.artifact import Artifact

from . import contestants, wire
from .contestants import SHAPE, TURNS
from .load import Load, two_processors

LOAD_S, WARM_UP_S = 2, 1


@dataclass(frozen=True)
class Pair:
    """Two services that differ in one option, and what the first should reach of the second at least.

    With `pinned`, each has one processor and the load the other; otherwise all share all of them.
    """

    title: str
    rows: int
    clients: int
    form: wire.Form
    options: tuple[tuple[str, ...], tuple[str, ...]]
    target: float
    pinned: bool


MERGING = Pair("MMMM, sharing runs or not", 2, 32, wire.V2_BINARY, ((), ("--max-run-rows", "1")), 1.3, True)
WORKERS = Pair("PPMM, two workers or one", 1, 32, wire.NESTED, (("--workers", "2"), ("--workers", "1")), 1.7, False)


def rows(independent: Artifact, coupled: Artifact) -> Iterator[str]:
    """Yield the lines of the table."""
    yield (
        "| the service against itself | rows x clients | started with | against | at least | rows/s | against | ratio "
        "| p50, ms | p99, ms | met |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for pair, artifact in ((MERGING, coupled), (WORKERS, independent)):
        yield _line(pair, *_loads(pair, artifact))


def _loads(pair: Pair, artifact: Artifact) -> list[list[Load]]:
    service_cpu, load_cpu = two_processors() if pair.pinned else (None, None)
    model, x = bln_serve.load(artifact.path, threads=1), wire.images(pair.rows, *SHAPE)
    message = pair.form.write(x)
    loads: dict[str, list[Load]] = {}
    with contextlib.ExitStack() as stack:
        for options in pair.options:
            service = contestants.service(contestants.repository_of(artifact), *options, processor=service_cpu)
            url = stack.enter_context(service).url
            contestants.check(url, pair.form, x, model)
            contestants.put_load(url, message, pair.clients, WARM_UP_S, load_cpu)
            loads[url] = []
        for number in range(TURNS):
            for url in reversed(loads) if number % 2 else loads:
                loads[url].append(contestants.put_load(url, message, pair.clients, LOAD_S, load_cpu))
    return list(loads.values())


def _line(pair: Pair, first: Sequence[Load], second: Sequence[Load]) -> str:
    ratio = statistics.median(
        one.requests_per_s / other.requests_per_s for one, other in zip(first, second, strict=True)
    )
    rates = (pair.rows * statistics.median(load.requests_per_s for load in loads) for loads in (first, second))
    started = " | ".join(f"`{' '.join(options)}`" if options else "" for options in pair.options)
    p50, p99 = (statistics.median(getattr(load, name) for load in first) for name in ("median_ms", "p99_ms"))
    return (
        f"| {pair.title} | {pair.rows} x {pair.clients}, {pair.form.title} | {started} | {pair.target} | "
        f"{' | '.join(f'{rate:.0f}' for rate in rates)} | {ratio:.2f} | {p50:.2f} | {p99:.2f} | "
        f"{contestants.yes_or_no(ratio >= pair.target)} |"
    )
