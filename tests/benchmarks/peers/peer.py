"""What is compared: a server, the wire formats that it is asked in, and how it is started."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from e2e.composition import ProtocolName

from benchmarks import wire
from bln_serve.artifact import Artifact

from .process import Running


@dataclass(frozen=True)
class Peer:
    """A server.

    Attributes:
        title: its name in the tables.
        settings: what is set that bears on the figures, in its own words.
        forms: in which it is asked under load; none for the composition test alone.
        protocol: in which the composition test asks it.
        serve: serves an artifact on one processor with one thread a run.
        versions: of it and of what it runs on, by name.
    """

    title: str
    settings: str
    forms: tuple[wire.Form, ...]
    protocol: ProtocolName
    serve: Callable[[Artifact, int], AbstractContextManager[Running]]
    versions: Callable[[], dict[str, str]]
