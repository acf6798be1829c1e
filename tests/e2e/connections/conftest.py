"""One service with short limits, which must go on serving whatever a client does to its connection."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.raw import RawClient
from support.raw_requests import BODY, IDLE_S, MANY, post
from support.server import Server


@pytest.fixture(scope="module")
def server(golden_artifacts: Path) -> Iterator[Server]:
    settings = ["--threads", "1", "--idle-timeout-s", str(IDLE_S), "--max-queued-rows", str(MANY)]
    server = Server(str(golden_artifacts / "digits_cnn"), *settings)
    server.until_ready()
    yield server
    server.end()


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    with RawClient(server.url) as client:
        yield client


@pytest.fixture(autouse=True)
def _still_serves(server: Server) -> Iterator[None]:
    """Whatever one client did, others are answered, and the log has no traceback."""
    yield
    with RawClient(server.url) as other:
        other.send(*post(f"content-length: {len(BODY)}"), body=BODY)
        assert other.answer().status == 200
    assert not [line for line in server.lines if "Traceback" in line or "Exception" in line], server.lines
