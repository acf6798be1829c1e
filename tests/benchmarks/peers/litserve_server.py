"""LitServe with one worker and its batching on."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import wire
from bln_serve.artifact import Artifact

from . import environments
from .peer import Peer
from .process import Running, free_port, running

MAX_BATCH_SIZE = 32
BATCH_TIMEOUT_S = 0.002
APP = Path(__file__).with_name("litserve_app.py")
PATH = f"/models/{wire.MODEL}/predict"
"""Where the composition test asks a server for `predict`."""


def _write(x: np.ndarray) -> wire.Message:
    return replace(wire.NESTED.write(x), path=PATH)


NESTED = wire.Form("nested JSON", _write, wire.NESTED.read)


def peer() -> Peer:
    """Return LitServe."""
    settings = f"max_batch_size={MAX_BATCH_SIZE}, batch_timeout={BATCH_TIMEOUT_S}, one worker"
    return Peer("LitServe", settings, (NESTED,), "predict", _serve, _versions)


def _versions() -> dict[str, str]:
    folder = environments.provide("litserve")
    return {package: environments.version(folder, package) for package in ("litserve", "onnxruntime", "numpy")}


@contextlib.contextmanager
def _serve(artifact: Artifact, processor: int) -> Iterator[Running]:
    python = environments.provide("litserve") / "bin" / "python"
    port = free_port()
    # -P: not the modules beside the application, which are of this environment.
    command = [python, "-P", APP, artifact.path / "model.onnx", str(port), PATH]
    with running([*command, str(MAX_BATCH_SIZE), str(BATCH_TIMEOUT_S)], port, "/health", processor, {}) as ready:
        yield ready
