"""SIGTERM and SIGINT: what was accepted is answered, readiness falls first, and a second one ends at once."""

import asyncio
import io
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.held import Runs
from support.raw import RawClient

RNN = "/models/digits_rnn/predict"
READY = ("GET /readyz HTTP/1.1", "host: x")
BUSY_ROWS = 400


def npy(rows: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(rows).uniform(0, 1, (rows, 8, 8)).astype(np.float32))
    return stream.getvalue()


def predict(rows: int) -> bytes:
    body = npy(rows)
    head = (f"POST {RNN}?mini_batch_rows=2 HTTP/1.1", "host: x", "content-type: application/x-npy")
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


@pytest.fixture
def server(start_server: Callable[..., Any], golden_artifacts: Path, runs: Runs) -> Any:
    options = ["--shutdown-timeout-s", "60", "--idle-timeout-s", "60", "--threads", "1"]
    server = start_server(str(golden_artifacts / "digits_rnn"), *options, **runs.variables)
    server.until_ready()
    return server


def make_busy(server: Any, client: RawClient, runs: Runs) -> None:
    """Have a request under way on this connection, until the runs are let go."""
    runs.hold()
    client.send_bytes(predict(BUSY_ROWS))

    async def busy() -> None:
        async with server.client() as other:
            await server.wait_for_queued_rows(other, BUSY_ROWS)

    asyncio.run(busy())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_readiness_falls_first_and_open_connections_are_answered(server: Any, runs: Runs, number: int) -> None:
    with RawClient(server.url) as long, RawClient(server.url) as probe, RawClient(server.url) as late:
        for idle in (probe, late):
            idle.send(*READY)
            assert idle.answer().status == 200
        make_busy(server, long, runs)
        request = predict(4)
        # At once: connections with nothing under way end a moment later.
        server.process.send_signal(number)
        probe.send(*READY)
        late.send_bytes(request)
        answer = probe.answer()
        assert answer.status == 503
        assert json.loads(answer.body)["ready"] is False
        runs.let_go()
        answer = late.answer()
        assert answer.status == 200, "an open connection's request is answered like one that was under way"
        answer = long.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert len(json.loads(answer.body)["predictions"]) == BUSY_ROWS
        for client in (long, probe, late):
            client.seconds_until_closed()
    assert server.wait() == 0
    assert not [line for line in server.lines if "rror" in line]


def test_connections_are_told_that_they_end(server: Any, runs: Runs) -> None:
    """A request that comes when no connection is taken any more, on one that was open before."""
    with RawClient(server.url) as long, RawClient(server.url) as probe:
        probe.send(*READY)
        assert probe.answer().status == 200
        make_busy(server, long, runs)
        server.terminate()
        while True:  # readiness falls at once, and connections end from the next moment on
            probe.send(*READY)
            answer = probe.answer()
            assert answer.status == 503
            if answer.headers.get("connection") == "close":
                break
        runs.let_go()
        assert long.answer().status == 200
    assert server.wait() == 0


def test_garbage_behind_a_last_request_takes_nothing_from_its_answer(server: Any, runs: Runs) -> None:
    with RawClient(server.url) as long, RawClient(server.url) as probe:
        probe.send(*READY)
        assert probe.answer().status == 200
        make_busy(server, long, runs)
        long.send_bytes(b"nonsense\r\n\r\n")
        server.terminate()
        probe.seconds_until_closed()
        runs.let_go()
        answer = long.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        long.seconds_until_closed()
    assert server.wait() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_idle_connections_do_not_keep_the_service(server: Any) -> None:
    with RawClient(server.url) as fresh, RawClient(server.url) as idle, RawClient(server.url) as half:
        idle.send(*READY)
        assert idle.answer().status == 200
        half.send_bytes(b"GET /readyz HTTP/1.1\r\nhost")
        server.terminate()
        for client in (fresh, idle, half):
            assert client.seconds_until_closed() < 10
    assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(server: Any, runs: Runs, number: int) -> None:
    with RawClient(server.url) as long, RawClient(server.url) as probe:
        probe.send(*READY)
        assert probe.answer().status == 200
        make_busy(server, long, runs)
        server.terminate()
        probe.seconds_until_closed()
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(number)
        began = time.monotonic()
        assert server.wait() == 1
        assert time.monotonic() - began < 30
    assert server.lines[-1] == "error: ending at once, after a second signal; what was not answered is lost"
