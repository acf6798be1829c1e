import asyncio
import http.client
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.held import Runs
from support.workers import wait_for, wait_until_it_listens_no_more

import bln_serve
from bln_serve.verification import Tolerance, compare

ROOT = Path(__file__).parents[2]
NPY = {"content-type": "application/x-npy", "accept": "application/x-npy"}
RNN = "/models/digits_rnn/predict"

# In mini-batches of 2, some 5,000 runs: seconds.
LONG_ROWS = 10_000
BUSY_ROWS = 400


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def images(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (rows, 8, 8)).astype(np.float32)


async def ask(client: httpx.AsyncClient, x: np.ndarray, url: str = RNN) -> np.ndarray:
    answer = await client.post(url, content=npy(x), headers=NPY)
    assert answer.status_code == 200, answer.text
    return np.asarray(np.load(io.BytesIO(answer.content)))


async def ask_in_pairs(client: httpx.AsyncClient, rows: int = BUSY_ROWS) -> httpx.Response:
    """Ask what takes half as many runs as it has rows."""
    return await client.post(f"{RNN}?mini_batch_rows=2", content=npy(images(rows, 0)), headers=NPY)


def equal(expected: np.ndarray, actual: np.ndarray) -> bool:
    return compare("", expected, actual, Tolerance()).passed


@pytest.fixture(scope="module")
def rnn(golden_artifacts: Path) -> Any:
    return bln_serve.load(golden_artifacts / "digits_rnn" / "1")


def test_the_output_says_where_it_listens_and_what_may_be_sent(server: Any) -> None:
    async def body() -> None:
        async with server.client() as client:
            await server.wait_until_ready(client)
            assert (await client.get("/healthz")).json() == {"alive": True}

    asyncio.run(body())
    assert server.first_line == f"bln-serve listening on {server.url}"
    # The pipe is read by a thread.
    (line,) = wait_for(lambda: [line for line in server.lines if line.startswith("serving digits_rnn")])
    assert "version 1: statistics MMMM, row coupling mini-batch" in line
    assert "rows in mini-batches of 25, at least 2, to /models/digits_rnn/predict" in line
    (limit,) = wait_for(lambda: [line for line in server.lines if line.startswith("runs of digits_rnn")])
    assert limit == "runs of digits_rnn have at most 25 rows (measured; to keep it: --max-run-rows digits_rnn=25)"


def test_fifty_concurrent_clients_get_the_answers_they_get_alone(server: Any, rnn: Any) -> None:
    sizes = [size for size in range(2, 53) if size % 25 != 1]
    requests = [images(size, seed) for seed, size in enumerate([*sizes[:49], 80])]

    async def body() -> tuple[list[np.ndarray], list[np.ndarray]]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            alone = [await ask(client, x) for x in requests]
            together = await asyncio.gather(*(ask(client, x) for x in requests))
            return alone, list(together)

    alone, together = asyncio.run(body())
    assert len(requests) == 50
    for x, expected, actual in zip(requests, alone, together, strict=True):
        assert equal(expected, actual)
        assert equal(rnn.predict(x), actual)
    # The law is worth a test only where breaking it shows: two clients' rows in one mini-batch move the answers far.
    for first, second, expected in zip(requests, requests[1:], alone, strict=False):
        merged = rnn.predict(np.concatenate([first, second]), mini_batch_rows=0)[: len(first)]
        if len(first) <= 25:
            assert np.abs(merged - expected).max() > 100 * Tolerance().limit(expected)


def test_poisoned_requests_have_no_effect_on_others(server: Any, rnn: Any) -> None:
    good = [images(7, seed) for seed in range(30)]
    bad = np.full((7, 8, 8), np.nan, np.float32)

    async def poison(client: httpx.AsyncClient, number: int) -> int:
        kinds: list[dict[str, Any]] = [
            {"content": npy(bad), "headers": NPY},
            {"content": npy(images(1, 0)), "headers": NPY},
            {"content": npy(images(7, 0))[:-1], "headers": NPY},
            {"content": b'{"instances": [[NaN]]}', "headers": {"content-type": "application/json"}},
            {"json": {"instances": [[1, 2], [3]]}},
        ]
        return (await client.post(RNN, **kinds[number % len(kinds)])).status_code

    async def body() -> list[Any]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            mixed = [call for seed, x in enumerate(good) for call in (poison(client, seed), ask(client, x))]
            return await asyncio.gather(*mixed)

    outcomes = asyncio.run(body())
    assert set(outcomes[::2]) == {400, 422}
    for x, actual in zip(good, outcomes[1::2], strict=True):
        assert equal(rnn.predict(x), actual)


def test_a_client_that_leaves_takes_its_rows_along_and_its_mates_are_answered(
    start_server: Callable[..., Any], golden_artifacts: Path, runs: Runs, rnn: Any
) -> None:
    server = start_server(str(golden_artifacts / "digits_rnn"), **runs.variables)
    x = images(30, 5)

    async def body() -> np.ndarray:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                busy = asyncio.create_task(ask_in_pairs(client))
                await server.wait_for_queued_rows(client, BUSY_ROWS)
                leaving = asyncio.create_task(ask(client, images(100, 4)))
                await server.wait_for_queued_rows(client, BUSY_ROWS + 100)
                mate = asyncio.create_task(ask(client, x))
                await server.wait_for_queued_rows(client, BUSY_ROWS + 130)
                leaving.cancel()
                await server.wait_for_queued_rows(client, BUSY_ROWS + 30)
            assert (await busy).status_code == 200
            return await mate

    assert equal(rnn.predict(x), asyncio.run(body()))


def test_a_full_queue_answers_503_at_once_and_loses_nothing(
    start_server: Callable[..., Any], golden_artifacts: Path, runs: Runs, rnn: Any
) -> None:
    limit = {"BLN_SERVE_MAX_QUEUED_ROWS": str(BUSY_ROWS + 5)}
    server = start_server(str(golden_artifacts / "digits_rnn"), **limit, **runs.variables)

    async def body() -> tuple[httpx.Response, list[httpx.Response], np.ndarray, np.ndarray]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                busy = asyncio.create_task(ask_in_pairs(client))
                await server.wait_for_queued_rows(client, BUSY_ROWS)
                fits = asyncio.create_task(ask(client, images(5, 1)))
                await server.wait_for_queued_rows(client, BUSY_ROWS + 5)
                # Not after the queue has emptied, which it does not meanwhile.
                refused = await asyncio.gather(
                    *(client.post(RNN, content=npy(images(2, 2)), headers=NPY) for _ in range(20))
                )
            kept = await busy, refused, await fits
            return *kept, await ask(client, images(2, 2))

    busy, refused, fits, later = asyncio.run(body())
    assert busy.status_code == 200
    assert equal(rnn.predict(images(BUSY_ROWS, 0), 2), np.load(io.BytesIO(busy.content)))
    assert equal(rnn.predict(images(5, 1)), fits)
    assert equal(rnn.predict(images(2, 2)), later)
    for answer in refused:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert f"room for 2 rows in the queue. Received: {BUSY_ROWS + 5} of {BUSY_ROWS + 5}" in answer.json()["error"]


def test_sigterm_answers_what_is_in_flight(
    start_server: Callable[..., Any], golden_artifacts: Path, runs: Runs, rnn: Any
) -> None:
    server = start_server(str(golden_artifacts / "digits_rnn"), **runs.variables)
    requests = [images(10 + seed, seed) for seed in range(15)]

    async def body() -> tuple[httpx.Response, list[np.ndarray]]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                busy = asyncio.create_task(ask_in_pairs(client))
                await server.wait_for_queued_rows(client, BUSY_ROWS)
                mates = [asyncio.create_task(ask(client, x)) for x in requests]
                await server.wait_for_queued_rows(client, BUSY_ROWS + sum(map(len, requests)))
                server.terminate()
                await asyncio.to_thread(wait_until_it_listens_no_more, server)
            return await busy, list(await asyncio.gather(*mates))

    busy, answers = asyncio.run(body())
    assert busy.status_code == 200
    for x, answer in zip(requests, answers, strict=True):
        assert equal(rnn.predict(x), answer)
    assert server.wait() == 0
    assert [line for line in server.lines if "rror" in line] == []


def test_what_cannot_be_answered_in_time_is_refused_in_time(
    start_server: Callable[..., Any], golden_artifacts: Path, runs: Runs
) -> None:
    limits = ["--shutdown-timeout-s", "1", "--max-queued-rows", "1000000"]
    server = start_server(str(golden_artifacts / "digits_rnn"), *limits, **runs.variables)

    async def body() -> tuple[list[httpx.Response], float]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                tasks = [asyncio.create_task(ask_in_pairs(client, LONG_ROWS)) for _ in range(4)]
                await server.wait_for_queued_rows(client, 4 * LONG_ROWS)
                server.terminate()
            begin = time.monotonic()
            return list(await asyncio.gather(*tasks)), time.monotonic() - begin

    answers, seconds = asyncio.run(body())
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert all("going down" in answer.json()["error"] for answer in refused)
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert seconds < 10
    assert server.wait() == 1
    assert any("rows were refused" in line for line in server.lines)


def test_a_request_that_never_ends_does_not_keep_the_service_from_ending(
    start_server: Callable[..., Any], golden_artifacts: Path
) -> None:
    server = start_server(str(golden_artifacts / "digits_cnn"), "--shutdown-timeout-s", "1")
    server.until_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert _read_until(connection, b'{"alive":true}').startswith(b"HTTP/1.1 200 ")
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
            b"expect: 100-continue\r\n\r\n"
        )
        # The service has begun to read the body.
        assert _read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        server.terminate()
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"before the service goes down. Received: a part of it" in answer
    assert server.wait() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def _read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read from a socket, which may hand over a message in any number of pieces."""
    received = b""
    while not received.endswith(end):
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


def test_a_connection_outlives_the_errors_on_it(server: Any) -> None:
    server.until_ready()
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.connect()
    local = connection.sock.getsockname()
    nowhere = "/models/nope/predict"
    for url, content, status in ((RNN, b"{", 400), (nowhere, b" " * 1024 * 1024, 404), (RNN, b"{}", 400)):
        connection.request("POST", url, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == status
        assert json.loads(answer.read()).keys() == {"error"}
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    assert connection.sock.getsockname() == local, "one connection served all"
    connection.close()


def test_a_chunked_body_is_refused_as_soon_as_the_limit_is_passed(server: Any) -> None:
    """The body never ends; the answer comes all the same."""
    host, port = server.url.removeprefix("http://").split(":")
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /models/digits_cnn/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(9):
            connection.sendall(chunk)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_in_the_middle_of_its_body(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /models/digits_cnn/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: 1000\r\n\r\nabc"
            )

    async def body() -> None:
        async with server.client() as client:
            assert (await client.get("/healthz")).status_code == 200

    asyncio.run(body())
    assert not [line for line in server.lines if "Traceback" in line or "rror" in line]


def test_a_missing_repository_ends_with_1_before_listening(run_command: Callable[..., Any]) -> None:
    ended = run_command("nowhere/at/all", "--port", "0")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: Expected a model repository")
    assert "bln-export MODEL.keras" in ended.stderr


def test_wrong_use_ends_with_2(run_command: Callable[..., Any], golden_artifacts: Path) -> None:
    misspelt = run_command(str(golden_artifacts), BLN_SERVE_PROT="1")
    assert misspelt.returncode == 2
    assert "Did you mean BLN_SERVE_PORT?" in misspelt.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        occupied = run_command(str(golden_artifacts), "--port", port)
    assert occupied.returncode == 2
    assert (
        f"Expected an address to listen on. Received: 127.0.0.1 port {port}: Address already in use" in occupied.stderr
    )


def test_nothing_that_can_be_served_is_said_clearly(
    start_server: Callable[..., Any], golden_artifacts: Path, tmp_path: Path
) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    server = start_server(str(tmp_path))

    async def body() -> httpx.Response:
        async with server.client() as client:
            await server.wait_until_loaded(client)
            return await client.get("/readyz")

    ready = asyncio.run(body())
    assert ready.status_code == 503
    assert "Expected an exported version with a manifest.json" in ready.json()["broken"][0]["reason"]
    server.terminate()
    assert server.wait() == 0
    assert any("the service is not ready" in line for line in server.lines)


def test_the_service_imports_no_training_framework() -> None:
    code = (
        "import sys, bln_serve.serving.server\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'tensorflow', 'keras', 'onnx', 'tf2onnx'}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
