"""A container that ends with its test, with the restrictions under which the service is promised to run."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from support.engine import Engine, wait_until

RESTRICTED = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "512m", "--cpus", "1", "--pids-limit", "256"),
)
READY_S = 60
NPY = {"content-type": "application/x-npy", "accept": "application/x-npy"}


@dataclass(frozen=True)
class Container:
    """A container of the service. `url` is the address of its published port on this machine."""

    engine: Engine
    id: str
    url: str

    def inspect(self) -> Any:
        return json.loads(self.engine.docker("inspect", self.id))[0]

    def health(self) -> str:
        """Return what the engine says of it: starting, healthy or unhealthy."""
        return str(self.inspect()["State"]["Health"]["Status"])

    def logs(self) -> str:
        result = self.engine.run("docker", "logs", self.id)
        return result.stdout + result.stderr

    def python(self, program: str) -> str:
        """Run a program with the image's Python, in the container, and return what it printed."""
        return self.engine.docker("exec", self.id, "python", "-c", program)

    def readyz(self) -> httpx.Response | None:
        """Return the answer, or None while nothing listens."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=READY_S)
        return None

    def wait_until_loaded(self) -> dict[str, Any]:
        """Wait until each model passed or failed, and return what /readyz says then."""

        def loaded() -> bool:
            answer = self.readyz()
            assert answer or self.inspect()["State"]["Running"], self.logs()
            return answer is not None and not answer.json()["loading"]

        wait_until(loaded, READY_S)
        answer = self.readyz()
        assert answer
        return dict(answer.json())

    def predict(self, model: str, x: np.ndarray, **query: int) -> np.ndarray:
        """Ask a model for x, (rows, ...), through the published port."""
        url = f"{self.url}/models/{model}/predict"
        answer = httpx.post(url, params=query, content=npy(x), headers=NPY, timeout=READY_S)
        assert answer.status_code == 200, answer.text
        return np.asarray(np.load(io.BytesIO(answer.content), allow_pickle=False))


@contextlib.contextmanager
def running_service(
    engine: Engine, image: str, models: Path, *arguments: str, options: tuple[str, ...] = RESTRICTED
) -> Iterator[Container]:
    """Run the service on a folder of models, under `options`, on a free port of 127.0.0.1."""
    mount = f"type=bind,source={models},target=/models,readonly"
    command = ("run", "--detach", "--publish", "127.0.0.1::8000", *options, "--mount", mount, image, *arguments)
    identity = engine.docker(*command)
    try:
        address = engine.docker("port", identity, "8000").splitlines()[0]
        yield Container(engine, identity, f"http://{address}")
    finally:
        engine.docker("rm", "--force", "--volumes", identity)


def npy(x: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()
