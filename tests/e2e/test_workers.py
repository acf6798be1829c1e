"""Several workers: one port, one /metrics, one readiness. Real processes, ended by their own process ids."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from support.held import Runs
from support.server import DEADLINE_S, Server
from support.workers import (
    MODEL,
    URL,
    children,
    ended_with_the_test,
    get,
    images,
    post,
    samples,
    settled,
    wait_for,
    wait_until_all_are_ready,
    written,
)

import bln_serve
from bln_serve.processors import Processors, available
from bln_serve.serving import address

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in Linux's /proc")


@pytest.fixture(scope="module")
def server(golden_artifacts: Path) -> Iterator[Server]:
    """One server with two workers for the tests that only ask it."""
    server = Server(str(golden_artifacts / MODEL), "--workers", "2")
    pids = children(server.process.pid)
    with ended_with_the_test(pids):
        wait_until_all_are_ready(server)
        yield server
        server.terminate()
        server.wait()
        server.end()


def test_it_says_once_where_it_listens_and_how_many_threads_a_run_has(server: Server) -> None:
    threads = max(1, available().count // 2)
    assert server.lines[0] == f"threads of a run: {threads} in each of 2 workers, for {available()}"
    assert len([line for line in server.lines if "listening" in line or "threads" in line]) == 1
    assert len(children(server.process.pid)) == 2


@pytest.mark.parametrize(
    ("processors", "workers", "threads"),
    [(Processors(8, None), 2, 4), (Processors(8, 3.5), 2, 1), (Processors(2, None), 4, 1), (Processors(7, None), 1, 7)],
)
def test_workers_share_the_processors(processors: Processors, workers: int, threads: int) -> None:
    assert processors.share(workers) == threads


def test_both_workers_answer_what_a_request_gets_alone(server: Server, golden_artifacts: Path) -> None:
    x = images(30)
    expected = bln_serve.load(golden_artifacts / MODEL / "1").predict(x)
    for _ in range(16):
        answer = post(server, x)
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["predictions"], expected, atol=1e-5 * np.abs(expected).max())


def test_every_worker_reports_the_metrics_of_all(start_workers: Callable[..., Server]) -> None:
    server = start_workers()
    statuses = [post(server, images(2, seed)).status_code for seed in range(40)]
    statuses += [post(server, images(1)).status_code for _ in range(24)]  # too few rows
    assert statuses == [200] * 40 + [422] * 24
    expected = {
        'bln_requests_total{status="200"}': 40,
        'bln_requests_total{status="422"}': 24,
        'bln_refusals_total{reason="MiniBatch"}': 24,
        "bln_request_seconds_count": 64,
        f'bln_run_rows_sum{{model="{MODEL}",version="1"}}': 80,
        "bln_requests_in_flight": 0,
    }
    for each in settled(server, expected):
        info = [value for name, value in each.items() if name.startswith("bln_model_info{")]
        assert info
        assert set(info) == {1}
    # Otherwise one worker may have done it all.
    assert _shares(server) == 2


@pytest.mark.parametrize("attempt", range(3))
def test_one_worker_is_not_ready_before_the_others(golden_artifacts: Path, attempt: int) -> None:
    server = Server(str(golden_artifacts / MODEL), "--workers", "2", "--threads", "1")
    try:
        while (answer := get(server, "/readyz")).status_code != httpx.codes.OK:
            time.sleep(0.005)
        assert answer.json()["workers"] == {"ready": 2, "count": 2}
        assert {post(server, images(2, seed)).status_code for seed in range(24)} == {200}
        assert {get(server, "/readyz").status_code for _ in range(24)} == {200}
    finally:
        server.end()


def _shares(server: Server) -> int:
    """How many workers have answered requests."""
    return sum(value > 0 for value in written(server, "counter_*.db", "bln_requests_total"))


def test_queued_rows_are_those_of_all_workers(start_workers: Callable[..., Server], runs: Runs) -> None:
    """A request keeps one worker busy; whichever is asked comes to know of it, and of its end."""
    server = start_workers(**runs.variables)
    name = f'bln_queued_rows{{model="{MODEL}",version="1"}}'

    async def body() -> None:
        async with server.client() as client:
            with runs.held():
                busy = asyncio.create_task(
                    client.post(URL, json={"instances": images(4000).tolist(), "mini_batch_rows": 2})
                )
                await asyncio.to_thread(settled, server, {name: 4000})
            seen = []
            while not busy.done():
                seen.append((await asyncio.to_thread(samples, server))[name])
            assert (await busy).status_code == 200
            assert set(seen) <= {0, 4000}, "and never a part of it"

    asyncio.run(body())
    # Without asking, which would have a worker tell of itself.
    wait_for(lambda: written(server, "gauge_livesum_*.db", "bln_queued_rows") == [0, 0])
    assert {samples(server)[name] for _ in range(8)} == {0}


def test_an_address_that_is_taken_is_refused_and_not_shared(server: Server, run_command: Callable[..., Any]) -> None:
    port = str(urlsplit(server.url).port)
    for workers in ("1", "2"):
        ended = run_command("tests/golden/artifacts", "--workers", workers, "--port", port)
        assert ended.returncode == 2
        assert ended.stderr.count("error: Expected an address to listen on") == 1
        assert "Address already in use" in ended.stderr


def test_a_reserved_address_belongs_to_those_who_share_it() -> None:
    with address.reserve("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        with (
            address.listen("127.0.0.1", port, shared=True),
            address.listen("127.0.0.1", port, shared=True),
            socket.create_connection(("127.0.0.1", port), timeout=5),
        ):
            pass


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere/at/all"], 1, "error: Expected a model repository"),
        (["tests/golden/artifacts", "--default-model", "nope"], 1, "error: Expected the default model"),
        (["tests/golden/artifacts", "--threads", "0"], 2, "error: Expected --threads"),
        (["tests/golden/artifacts", "--workers", "0"], 2, "error: Expected --workers"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_once(
    run_command: Callable[..., Any], arguments: list[str], code: int, sentence: str
) -> None:
    ended = run_command("--workers", "3", *arguments, "--port", "0")
    assert ended.returncode == code
    assert ended.stdout == ""
    assert ended.stderr.startswith(sentence)
    assert ended.stderr.count("\n") == 1


def test_without_a_place_for_the_metrics_it_says_what_to_do(run_command: Callable[..., Any]) -> None:
    code = (
        "import sys, tempfile\ntempfile._candidate_tempdir_list = lambda: ['/proc']\n"
        "from bln_serve.cli.serve import main\nsys.exit(main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "tests/golden/artifacts", "--workers", "2", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 2
    assert "error: Expected a folder for temporary files" in ended.stderr
    assert "or use --workers 1" in ended.stderr


def test_who_supervises_loads_nothing_that_serves(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "python" in maps
    assert not re.findall("onnxruntime|uvloop|numpy", maps)
    assert "onnxruntime" in Path(f"/proc/{children(server.process.pid)[0]}/maps").read_text()


def test_telemetry_is_off_in_workers() -> None:
    code = (
        "import os, sys\nfrom bln_serve.serving import server\n"
        "assert 'onnxruntime' in sys.modules\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    variables = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "1"
