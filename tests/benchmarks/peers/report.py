"""What came out, as tables and as JSON."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .contest import Contest, Entry, Timing
from .mixing import Mixing
from .peer import Peer


def loads(contest: Contest) -> Iterator[str]:
    """Yield the lines of the table of all loads."""
    yield (
        "| rows x clients | server | body | requests/s | lowest to highest turn | p50, ms | p99, ms | "
        "of bln_serve, v2 binary |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    reference = {entry.burden: entry for entry in reversed(contest.entries) if entry.peer is contest.peers[0]}
    for entry in contest.entries:
        rates = [load.requests_per_s for load in entry.loads]
        yield (
            f"| {entry.burden} | {entry.peer.title} | {entry.form.title} | {entry.requests_per_s:.0f} | "
            f"{min(rates):.0f} to {max(rates):.0f} | {entry.median_ms:.2f} | {entry.p99_ms:.2f} | "
            f"{entry.times(reference[entry.burden]):.3f}x |"
        )


def mixings(each: Sequence[Mixing]) -> Iterator[str]:
    """Yield the lines of the table of the composition test."""
    yield "| server | a client's answer moves by at most | of max abs(y) | times the tolerance | kept apart |"
    yield "|---|---|---|---|---|"
    for mixing in each:
        kept = "yes" if mixing.kept_apart else "**no**"
        yield (
            f"| {mixing.peer.title} | {mixing.difference:.2g} | {mixing.largest:.2g} | {mixing.tolerances:.2g} | "
            f"{kept} |"
        )


def settings(peers: Sequence[Peer]) -> Iterator[str]:
    """Yield a line a server: what is set, and the versions."""
    for peer in peers:
        versions = ", ".join(f"{name} {version}" for name, version in peer.versions().items())
        yield f"- {peer.title}: {peer.settings}; {versions}"


def document(contest: Contest, mixed: Sequence[Mixing], peers: Sequence[Peer], timing: Timing) -> dict[str, Any]:
    """Return all of it for `results.json`."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processors": os.cpu_count(), "processor": _processor(), "system": platform.platform()},
        "timing": asdict(timing),
        "servers": {peer.title: {"settings": peer.settings, "versions": peer.versions()} for peer in peers},
        "loads": [_load(entry) for entry in contest.entries],
        "composition": [
            {
                "server": mixing.peer.title,
                "rows": mixing.rows,
                "largest_move": mixing.difference,
                "largest_answer": mixing.largest,
                "tolerance": mixing.tolerance.rtol,
                "tolerances": mixing.tolerances,
                "requests_a_run": mixing.requests_a_run,
            }
            for mixing in mixed
        ],
    }


def _load(entry: Entry) -> dict[str, Any]:
    return {
        "server": entry.peer.title,
        "body": entry.form.title,
        "rows": entry.burden.rows,
        "clients": entry.burden.clients,
        "requests_per_s": entry.requests_per_s,
        "median_ms": entry.median_ms,
        "p99_ms": entry.p99_ms,
        "turns": [asdict(load) for load in entry.loads],
    }


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()
