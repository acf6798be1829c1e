"""Several workers: one port, one /metrics, one end. Real processes, ended by their own process ids."""

import asyncio
import contextlib
import os
import re
import signal
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
from support.raw import RawClient
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.processors import Processors, available
from bln_serve.serving import address

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in Linux's /proc")

MODEL = "digits_rnn"
URL = f"/models/{MODEL}/predict"


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (rows, 8, 8)).astype(np.float32)


def children(pid: int) -> list[int]:
    """The workers of a server, from the lowest process id."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def is_there(pid: int) -> bool:
    """Whether a process exists that has not ended. A zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], Any]) -> Any:
    began = time.monotonic()
    while not (outcome := condition()):
        assert time.monotonic() - began < DEADLINE_S
        time.sleep(0.05)
    return outcome


def get(server: Server, path: str) -> httpx.Response:
    """Ask on a connection of its own, and so whichever worker the system takes."""
    return httpx.get(f"{server.url}{path}", timeout=DEADLINE_S, trust_env=False)


def post(server: Server, x: np.ndarray, **parameters: Any) -> httpx.Response:
    body = {"instances": x.tolist(), **parameters}
    return httpx.post(f"{server.url}{URL}", json=body, timeout=DEADLINE_S, trust_env=False)


def samples(server: Server) -> dict[str, float]:
    lines = get(server, "/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def settled(server: Server, expected: dict[str, float]) -> list[dict[str, float]]:
    """Return the metrics as 24 connections see them, each of which has this in it.

    What a worker has done it tells the others ten times a second, and later on a busy machine: so the first to say
    what is expected is waited for. From then on all must, whichever worker they ask.
    """

    def seen() -> dict[str, float]:
        now = samples(server)
        return {name: now.get(name, 0) for name in expected}

    began = time.monotonic()
    while (now := seen()) != expected:
        assert time.monotonic() - began < DEADLINE_S, f"expected {expected}, last seen {now}"
        time.sleep(0.05)
    all_seen = [samples(server) for _ in range(24)]
    assert all(each.items() >= expected.items() for each in all_seen)
    return all_seen


def wait_until_all_are_ready(server: Server, workers: int = 2) -> None:
    began = time.monotonic()
    while sum(line.startswith(f"runs of {MODEL}") for line in server.lines) < workers:
        assert time.monotonic() - began < DEADLINE_S, server.lines
        time.sleep(0.05)


@contextlib.contextmanager
def ended_with_the_test(pids: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in pids:
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(start_server: Callable[..., Server], golden_artifacts: Path) -> Iterator[Callable[..., Server]]:
    """Start a server with two workers; none of them outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **more: Any) -> Server:
            server = start_server(str(golden_artifacts / MODEL), "--workers", "2", "--threads", "1", *arguments, **more)
            stack.enter_context(ended_with_the_test(children(server.process.pid)))
            wait_until_all_are_ready(server)
            return server

        yield start


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


def test_every_worker_reports_the_metrics_of_all(start: Callable[..., Server]) -> None:
    server = start()
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
        while get(server, "/readyz").status_code != httpx.codes.OK:
            time.sleep(0.005)
        assert {post(server, images(2, seed)).status_code for seed in range(24)} == {200}
        assert {get(server, "/readyz").status_code for _ in range(24)} == {200}
    finally:
        server.end()


def _shares(server: Server) -> int:
    """How many workers have answered requests."""
    return sum(value > 0 for value in _written(server, "counter_*.db", "bln_requests_total"))


def _written(server: Server, files: str, name: str) -> list[float]:
    """What each worker has in a file of its own under this name, of all labels."""
    from prometheus_client.mmap_dict import MmapedDict

    return [
        sum(value for key, value, *_ in MmapedDict.read_all_values_from_file(file) if name in key)
        for file in _metrics_folder(server).glob(files)
    ]


def _metrics_folder(server: Server) -> Path:
    variables = Path(f"/proc/{children(server.process.pid)[0]}/environ").read_bytes().split(b"\0")
    (folder,) = [line.partition(b"=")[2] for line in variables if line.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    return Path(os.fsdecode(folder))


def test_queued_rows_are_those_of_all_workers(server: Server) -> None:
    """A long request keeps one worker busy; whichever is asked comes to know of it, and of its end."""
    name = f'bln_queued_rows{{model="{MODEL}",version="1"}}'

    async def body() -> None:
        async with server.client() as client:
            long = asyncio.create_task(
                client.post(URL, json={"instances": images(4000).tolist(), "mini_batch_rows": 2})
            )
            most = []
            while not long.done():
                most.append((await asyncio.to_thread(samples, server))[name])
            assert (await long).status_code == 200
            assert 4000 in most
            assert set(most) <= {0, 4000}, "and never a part of it"

    asyncio.run(body())
    # Without asking, which would have a worker tell of itself.
    wait_for(lambda: _written(server, "gauge_livesum_*.db", "bln_queued_rows") == [0, 0])
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


@pytest.mark.parametrize("by", ["to the supervisor", "to all, as Ctrl-C does"])
def test_a_signal_drains_all_workers(start: Callable[..., Server], by: str) -> None:
    server = start(own_group=by != "to the supervisor")
    pids = children(server.process.pid)
    folder = _metrics_folder(server)

    async def body() -> list[httpx.Response]:
        async with server.client() as client:
            # Each on a connection of its own.
            tasks = [
                asyncio.create_task(
                    client.post(URL, json={"instances": images(500, seed).tolist(), "mini_batch_rows": 2})
                )
                for seed in range(16)
            ]
            while sum(task.done() for task in tasks) < 1:
                await asyncio.sleep(0.005)
            if by == "to the supervisor":
                server.terminate()
            else:
                os.killpg(server.process.pid, signal.SIGINT)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(body())
    assert [answer.status_code for answer in answers] == [200] * 16
    assert server.wait() == 0
    assert not any(map(is_there, pids))
    assert not [line for line in server.lines if "rror" in line]
    assert not folder.exists()


def test_workers_that_cannot_end_in_time_refuse_the_rest(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout-s", "1", "--max-queued-rows", "1000000")

    async def body() -> list[httpx.Response]:
        async with server.client() as client:
            body = {"instances": images(6000).tolist(), "mini_batch_rows": 2}
            tasks = [asyncio.create_task(client.post(URL, json=body)) for _ in range(6)]
            while not samples(server)[f'bln_queued_rows{{model="{MODEL}",version="1"}}'] >= 4 * 6000:
                await asyncio.sleep(0.05)
            server.terminate()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(body())
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert 503 in {answer.status_code for answer in answers}
    assert server.wait() == 1


def test_a_stopped_worker_is_killed_when_the_time_is_over(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout-s", "1")
    pids = children(server.process.pid)
    os.kill(pids[0], signal.SIGSTOP)
    began = time.monotonic()
    server.terminate()
    assert server.wait() == 1
    assert 2 < time.monotonic() - began < 20
    assert not any(map(is_there, pids))
    assert "error: workers that had not ended 3 s after the signal are killed" in server.lines


def test_a_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout-s", "60")
    pids = children(server.process.pid)
    with RawClient(server.url) as client:
        client.send(f"POST {URL} HTTP/1.1", "host: x", "content-length: 100")  # and never a body
        wait_for(lambda: samples(server)["bln_requests_in_flight"] == 1)
        server.terminate()
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert server.wait() == 1
        assert time.monotonic() - began < 5
    assert not any(map(is_there, pids))
    assert [line for line in server.lines if "rror" in line] == [
        "error: ending at once, after a second signal; what was not answered is lost"
    ]


def test_a_worker_that_dies_is_replaced_and_nothing_counted_is_lost(start: Callable[..., Server]) -> None:
    server = start()
    pids = children(server.process.pid)
    assert [post(server, images(2)).status_code for _ in range(20)] == [200] * 20
    with RawClient(server.url) as client:
        client.send(f"POST {URL} HTTP/1.1", "host: x", "content-length: 100")
        # Told, not merely counted: what a worker had no time to tell of dies with it.
        told = ("bln_requests_in_flight", 'bln_requests_total{status="200"}')
        wait_for(lambda: [samples(server).get(name) for name in told] == [1, 20])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    successors = wait_for(lambda: len(now := children(server.process.pid)) == 2 and not set(now) & set(pids) and now)
    with ended_with_the_test(successors):
        wait_until_all_are_ready(server, 4)
        said = [line for line in server.lines if line.startswith("error: worker ")]
        assert sorted(said) == sorted(
            f"error: worker {pid} ended by signal 9; another one starts in 0.5 s" for pid in pids
        )
        assert [post(server, images(2)).status_code for _ in range(8)] == [200] * 8
        seen = settled(server, {'bln_requests_total{status="200"}': 28})
        assert {each["bln_requests_in_flight"] for each in seen} == {0}, "what the dead had in flight is gone with them"
        os.kill(successors[0], signal.SIGKILL)
        wait_for(lambda: any(line.endswith("another one starts in 1 s") for line in server.lines))
        server.terminate()
        assert server.wait() == 0


def test_no_worker_outlives_a_supervisor_that_is_killed(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout-s", "2")
    pids = children(server.process.pid)
    folder = _metrics_folder(server)
    port = urlsplit(server.url).port
    with RawClient(server.url) as client:
        client.send(f"POST {URL} HTTP/1.1", "host: x", "content-length: 100")  # one of them has something to wait for
        wait_for(lambda: samples(server)["bln_requests_in_flight"] == 1)
        server.process.kill()
        server.process.wait()
        assert client.answer().status == 503
    wait_for(lambda: not any(map(is_there, pids)))
    wait_for(lambda: not folder.exists())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_signal_during_the_start_ends_it(golden_artifacts: Path) -> None:
    """Whatever the moment: no process is left, and no traceback."""
    from support.server import COMMAND, ROOT, environment

    for wait_s in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen(
            [*COMMAND, str(golden_artifacts / MODEL), "--workers", "2", "--port", "0"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        time.sleep(wait_s)
        pids = children(process.pid) if process.poll() is None else []
        with ended_with_the_test(pids):
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode in (0, -signal.SIGTERM)
            assert "Traceback" not in said
            wait_for(lambda pids=pids: not any(map(is_there, pids)))
