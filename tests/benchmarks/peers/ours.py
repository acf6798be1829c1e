"""The service itself, as it is by default."""

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import version

import bln_serve
from benchmarks import contestants, wire
from bln_serve.artifact import Artifact

from .peer import Peer
from .process import Running


def peer() -> Peer:
    """Return the service."""
    forms = (wire.V2_BINARY, wire.V2_JSON, wire.NESTED)
    return Peer("bln_serve", "defaults", forms, "v2-binary", _serve, _versions)


@contextlib.contextmanager
def _serve(artifact: Artifact, processor: int) -> Iterator[Running]:
    repository = contestants.repository_of(artifact)
    with contestants.service(repository, processor=processor) as server:
        yield Running(server.url, server.process.pid)


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("onnxruntime", "numpy", "uvicorn")}
    return {"bln_serve": bln_serve.__version__, **packages, "Python": platform.python_version()}
