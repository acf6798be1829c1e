"""Real servers, which end with their tests."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.held import Runs
from support.server import COMMAND, DEADLINE_S, ROOT, Server, environment
from support.workers import MODEL, children, ended_with_the_test, wait_until_all_are_ready


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Start a server with these arguments and variables; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **variables: Any) -> Server:
            server = Server(*arguments, **variables)
            stack.callback(server.end)
            return server

        yield start


@pytest.fixture(scope="module")
def server(golden_artifacts: Path) -> Iterator[Server]:
    """One server with every golden model."""
    server = Server(str(golden_artifacts))
    yield server
    server.end()


@pytest.fixture
def start_workers(start_server: Callable[..., Server], golden_artifacts: Path) -> Iterator[Callable[..., Server]]:
    """Start a server with two workers; none of them outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **more: Any) -> Server:
            server = start_server(str(golden_artifacts / MODEL), "--workers", "2", "--threads", "1", *arguments, **more)
            stack.enter_context(ended_with_the_test(children(server.process.pid)))
            wait_until_all_are_ready(server)
            return server

        yield start


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs that can be held, of the services started with its `variables`."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.let_go()


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run bln-serve to its end."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    return run
