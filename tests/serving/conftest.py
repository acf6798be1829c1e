"""The application in this process, without a socket: requests go straight into it."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.repositories import Repository

from bln_serve.serving.app import create_app
from bln_serve.serving.settings import make

DEADLINE_S = 30


class Service:
    """An application with its lifespan entered and a client. Any exception that leaves the application is raised."""

    def __init__(self, **values: Any) -> None:
        self._runner = asyncio.Runner()
        self.app = create_app(make(**values))
        self.catalog = self.app.state.catalog
        self._lifespan = self.app.router.lifespan_context(self.app)
        self._runner.run(self._lifespan.__aenter__())
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    def request(self, method: str, url: str, **more: Any) -> httpx.Response:
        return self.run(self._client.request(method, url, **more))

    def get(self, url: str) -> httpx.Response:
        return self.request("GET", url)

    def post(self, url: str, **more: Any) -> httpx.Response:
        return self.request("POST", url, **more)

    def wait_until_loaded(self) -> "Service":
        async def loaded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while self.catalog.readiness().loading:
                    await asyncio.sleep(0.005)

        self.run(loaded())
        return self

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the service go on until something is so."""

        async def wait() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():
                    await asyncio.sleep(0.005)

        self.run(wait())

    def serves(self, name: str = "digits") -> int | None:
        """Return the version of a model that is served."""
        return next((each.version for each in self.catalog.readiness().served if each.name == name), None)

    def close(self) -> None:
        self.run(self._client.aclose())
        self.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Service]]:
    """Start a service with these settings and wait until it has loaded; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start_service(*, loaded: bool = True, **values: Any) -> Service:
            service = Service(**values)
            stack.callback(service.close)
            return service.wait_until_loaded() if loaded else service

        yield start_service


@pytest.fixture(scope="module")
def service(golden_artifacts: Path) -> Iterator[Service]:
    """One service with every golden model."""
    service = Service(paths=[golden_artifacts]).wait_until_loaded()
    yield service
    service.close()


@pytest.fixture
def repository(golden_artifacts: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy golden versions into an empty repository: repository("digits_cnn", "digits_rnn/3")."""

    def copy(*targets: str) -> Path:
        for target in targets:
            name, _, version = target.partition("/")
            shutil.copytree(golden_artifacts / name / "1", tmp_path / name / (version or "1"))
        return tmp_path

    return copy


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("BLN_SERVE_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def models(golden_artifacts: Path, tmp_path: Path) -> Repository:
    """An empty repository."""
    return Repository(golden_artifacts, tmp_path / "models")
