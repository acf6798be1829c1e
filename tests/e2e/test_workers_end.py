"""How several workers end: together, in time, and never without whoever started them."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from support.held import Runs
from support.raw import RawClient
from support.server import DEADLINE_S, Server
from support.workers import (
    MODEL,
    URL,
    children,
    ended_with_the_test,
    images,
    is_there,
    metrics_folder,
    post,
    samples,
    settled,
    wait_for,
    wait_until_all_are_ready,
    wait_until_it_listens_no_more,
)

QUEUED_ROWS = f'bln_queued_rows{{model="{MODEL}",version="1"}}'

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in Linux's /proc")


@pytest.mark.parametrize("by", ["to the supervisor", "to all, as Ctrl-C does"])
def test_a_signal_drains_all_workers(start_workers: Callable[..., Server], runs: Runs, by: str) -> None:
    server = start_workers(own_group=by != "to the supervisor", **runs.variables)
    pids = children(server.process.pid)
    folder = metrics_folder(server)

    async def body() -> list[httpx.Response]:
        async with server.client() as client:
            with runs.held():
                # Each on a connection of its own.
                tasks = [
                    asyncio.create_task(
                        client.post(URL, json={"instances": images(500, seed).tolist(), "mini_batch_rows": 2})
                    )
                    for seed in range(16)
                ]
                await asyncio.to_thread(settled, server, {QUEUED_ROWS: 16 * 500})
                if by == "to the supervisor":
                    server.terminate()
                else:
                    os.killpg(server.process.pid, signal.SIGINT)
                await asyncio.to_thread(wait_until_it_listens_no_more, server)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(body())
    assert [answer.status_code for answer in answers] == [200] * 16
    assert server.wait() == 0
    assert not any(map(is_there, pids))
    assert not [line for line in server.lines if "rror" in line]
    assert not folder.exists()


def test_workers_that_cannot_end_in_time_refuse_the_rest(start_workers: Callable[..., Server], runs: Runs) -> None:
    limits = ("--shutdown-timeout-s", "1", "--max-queued-rows", "1000000")
    server = start_workers(*limits, **runs.variables)

    async def body() -> list[httpx.Response]:
        async with server.client() as client:
            body = {"instances": images(6000).tolist(), "mini_batch_rows": 2}
            with runs.held():
                tasks = [asyncio.create_task(client.post(URL, json=body)) for _ in range(6)]
                await asyncio.to_thread(settled, server, {QUEUED_ROWS: 6 * 6000})
                server.terminate()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(body())
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert 503 in {answer.status_code for answer in answers}
    assert server.wait() == 1


def test_a_stopped_worker_is_killed_when_the_time_is_over(start_workers: Callable[..., Server]) -> None:
    server = start_workers("--shutdown-timeout-s", "1")
    pids = children(server.process.pid)
    os.kill(pids[0], signal.SIGSTOP)
    began = time.monotonic()
    server.terminate()
    assert server.wait() == 1
    assert 2 < time.monotonic() - began < 20
    assert not any(map(is_there, pids))
    assert "error: workers that had not ended 3 s after the signal are killed" in server.lines


def test_a_second_signal_ends_at_once(start_workers: Callable[..., Server]) -> None:
    server = start_workers("--shutdown-timeout-s", "60")
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


def test_a_worker_that_dies_is_replaced_and_nothing_counted_is_lost(start_workers: Callable[..., Server]) -> None:
    server = start_workers()
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


def test_no_worker_outlives_a_supervisor_that_is_killed(start_workers: Callable[..., Server]) -> None:
    server = start_workers("--shutdown-timeout-s", "2")
    pids = children(server.process.pid)
    folder = metrics_folder(server)
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
