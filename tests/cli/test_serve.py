import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.server import Server

from bln_serve.cli import _command, serve
from bln_serve.processors import available


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("BLN_SERVE_")]:
        monkeypatch.delenv(variable)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("bln_serve.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("bln_serve.serving", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic_settings", None)
    assert serve.main([]) == 2
    assert "bln-serve needs packages that are not installed. Install them with: pip install 'bln-serve[serve]'" in (
        capsys.readouterr().err
    )


def test_a_wrong_value_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--port", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected --port (BLN_SERVE_PORT) to be a valid integer")


def test_a_missing_path_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["nowhere/at/all"]) == 1
    assert "Received: no such folder" in capsys.readouterr().err


def test_a_missing_permission_ends_with_1_and_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "models/digits")

    assert _command.run(refused) == 1
    assert capsys.readouterr().err == (
        "error: Expected permission for models/digits. Received: Permission denied. Let this user in, or run as its "
        "owner (in a container: --user).\n"
    )


def test_a_fault_of_our_own_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bln_serve.serving.server", None)
    monkeypatch.delattr("bln_serve.serving.server", raising=False)
    with pytest.raises(ImportError, match=r"bln_serve\.serving"):
        serve.main([])


@pytest.fixture
def line_at_start(golden_artifacts: Path) -> Iterator[Callable[..., str]]:
    """Start a real server with these arguments, end it, and return what it says after where it listens."""
    servers: list[Server] = []

    def start(*arguments: str) -> str:
        servers.append(Server(str(golden_artifacts / "tiny_mpmm"), *arguments))
        # Before it answers, it has said what it says.
        assert httpx.get(f"{servers[-1].url}/healthz", timeout=60, trust_env=False).status_code == 200
        servers[-1].terminate()
        assert servers[-1].wait() == 0
        return servers[-1].lines[0]

    yield start
    for server in servers:
        server.end()


def test_it_says_at_start_how_many_threads_were_set(line_at_start: Callable[..., str]) -> None:
    assert line_at_start("--threads", "3") == "threads of a run: 3, as set"


def test_it_says_at_start_how_many_threads_there_are_and_why(line_at_start: Callable[..., str]) -> None:
    assert line_at_start() == f"threads of a run: {available().count}, for {available()}"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity to set")
def test_on_one_processor_it_says_one_thread(line_at_start: Callable[..., str]) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # the server inherits it
    try:
        assert line_at_start().startswith("threads of a run: 1, for 1 processor")
    finally:
        os.sched_setaffinity(0, before)
