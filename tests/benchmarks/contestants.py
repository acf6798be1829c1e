"""Who is measured: the service, the bare application, and ONNX Runtime called in a loop with nothing around it."""

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
from support import paper
from support.engine import wait_until
from support.server import Server

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.export import export
from bln_serve.verification import compare

from . import bare_app, wire
from .load import Load, on, wrk

READY_S, END_S = 60, 30
TURNS = 7
SHAPE = (32, 32, 3)


def paper_cnn(folder: Path, policy: str) -> Artifact:
    """Export the paper's CNN under a policy, with random statistics, into a repository of its own."""
    return export(paper.under(paper.cnn, policy), folder / policy, name=wire.MODEL)


def repository_of(artifact: Artifact) -> Path:
    """Return the repository in which an artifact lies."""
    return artifact.path.parents[1]


@contextlib.contextmanager
def service(repository: Path, *options: str, processor: int | None = None) -> Iterator[Server]:
    """Serve the models of a repository with one thread a run, all else as it is by default; begin when that is ready.

    Args:
        repository: whose models are served.
        options: more of the command line.
        processor: the only one of all the service's threads; None for whichever are free.
    """
    with on(processor) if processor is not None else contextlib.nullcontext():
        server = Server(str(repository), "--threads", "1", *options)
    try:
        wait_until(lambda: is_ready(server), READY_S, every_s=0.02)
        yield server
    finally:
        _end(server)


def is_ready(server: Server) -> bool:
    """Ask whether a service is ready.

    Raises:
        RuntimeError: it has ended.
    """
    if server.process.poll() is not None:
        raise RuntimeError("Expected a running service. Received:\n" + "\n".join([server.first_line, *server.lines]))
    return httpx.get(f"{server.url}/readyz", trust_env=False).status_code == httpx.codes.OK


def _end(server: Server) -> None:
    """Have a service end by itself, and with it the workers it started; or else kill it."""
    try:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(END_S)
    finally:
        server.end()


@contextlib.contextmanager
def bare_application(model: Path, processor: int) -> Iterator[tuple[str, int]]:
    """Serve an ONNX model with the bare application, on one processor.

    Yields:
        Its URL and its process id.
    """
    with on(processor):
        command = [sys.executable, bare_app.__file__, str(model)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        if not (url := process.stdout.readline().strip()):
            raise RuntimeError(
                f"Expected the bare application to say where it listens. Received: exit {process.wait()}."
            )
        yield url, process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Alone:
    """ONNX Runtime with one thread, in this process.

    Args:
        model: path of the ONNX model.
        processor: where it runs.
    """

    def __init__(self, model: Path, processor: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._processor = processor

    def run_s(self, x: np.ndarray, seconds: float) -> float:
        """Run these rows again and again for so long; return the seconds of a run."""
        return statistics.fmean(self.runs_s(x, seconds))

    def runs_s(self, x: np.ndarray, seconds: float) -> list[float]:
        """Run these rows again and again for so long; return the seconds of each run, the loop around it included."""
        inputs, ends = {wire.INPUT: x}, []
        with on(self._processor):
            ends.append(time.perf_counter())
            while ends[-1] - ends[0] < seconds:
                self._session.run(self._outputs, inputs)
                ends.append(time.perf_counter())
        return [end - before for before, end in pairwise(ends)]


def check(url: str, form: wire.Form, x: np.ndarray, model: bln_serve.runtime.Model) -> None:
    """Ask once, and compare with the model itself.

    Raises:
        RuntimeError: the answer is another one, by more than the model's tolerance.
    """
    what = f"{url}, {len(x)} rows, {form.title}"
    compared = compare(what, np.asarray(model.predict(x)), form.ask(url, x), model.manifest.tolerance)
    if not compared.passed:
        raise RuntimeError(f"Expected the answer of the model itself. Received: {compared.line()}")


def put_load(url: str, message: wire.Message, clients: int, seconds: int, processor: int | None) -> Load:
    """Have clients on one processor, or on whichever are free, send a message again and again."""
    with on(processor) if processor is not None else contextlib.nullcontext():
        return wrk(url + message.path, message.body, message.headers, clients, seconds)


def yes_or_no(met: bool) -> str:
    """Say whether a target was met."""
    return "yes" if met else "**no**"
