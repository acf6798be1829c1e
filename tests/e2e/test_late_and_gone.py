"""Bodies that stop, answers that would be too late, clients that leave: what becomes of them, and of their mates."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.held import Runs
from support.messages import answered, images, read_binary, v2_binary, v2_json
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.runtime import Model
from bln_serve.verification import compare

BUSY_ROWS = 400


@pytest.fixture(scope="module")
def rnn(golden_artifacts: Path) -> Model:
    return bln_serve.load(golden_artifacts / "digits_rnn" / "1")


@contextlib.contextmanager
def connection_to(server: Server) -> Any:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        yield connection


@pytest.mark.parametrize("path", ["/predict", "/v1/models/digits_cnn:predict", "/v2/models/digits_cnn/infer"])
@pytest.mark.parametrize("length", [b"content-length: 1000", b"transfer-encoding: chunked"])
def test_a_body_that_stops_midway_ends_in_408_and_the_connection_is_closed(
    path: str, length: bytes, start_server: Callable[..., Server], golden_artifacts: Path
) -> None:
    server = start_server(str(golden_artifacts / "digits_cnn"), "--request-timeout-s", "0.5")
    server.until_ready()
    half = b"1f4\r\n" + b" " * 500 + b"\r\n" if b"chunked" in length else b" " * 500
    with connection_to(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
        connection.sendall(head + length + b"\r\n\r\n" + half)
        # Nothing more is sent. That `recv` ends with nothing is that the service closed; else it would time out.
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close" in top.lower()
    assert "500 bytes of it" in json.loads(body)["error"]


@pytest.fixture
def server(start_server: Callable[..., Server], golden_artifacts: Path, runs: Runs) -> Server:
    return start_server(str(golden_artifacts), **runs.variables)


async def ask_in_pairs(client: httpx.AsyncClient) -> httpx.Response:
    """Keep digits_rnn busy."""
    body, headers = v2_binary({"image": images(BUSY_ROWS)}, bln_mini_batch_rows=2)
    return await client.post("/v2/models/digits_rnn/infer", content=body, headers=headers)


def test_a_request_without_time_ends_in_504_while_its_mates_are_answered(
    server: Server, runs: Runs, rnn: Model
) -> None:
    url, x = "/v2/models/digits_rnn/infer", images(30, 1)

    async def body() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                busy = asyncio.create_task(ask_in_pairs(client))
                await server.wait_for_queued_rows(client, BUSY_ROWS)
                mate = asyncio.create_task(client.post(url, json=v2_json({"image": x})))
                await server.wait_for_queued_rows(client, BUSY_ROWS + 30)
                hurry = {"bln-timeout-ms": "1"}
                late = [
                    await client.post(url, json=v2_json({"image": images(4)}), headers=hurry),
                    await client.post(
                        "/v1/models/digits_rnn:predict", json={"instances": images(4).tolist()}, headers=hurry
                    ),
                ]
                assert await server.queued_rows(client) == BUSY_ROWS + 30, "their rows are given back, others' are not"
            return late, await mate, await busy

    late, mate, busy = asyncio.run(body())
    for answer in late:
        assert answer.status_code == 504
        assert answer.json().keys() == {"error"}
    expected = np.asarray(rnn.predict(x))
    actual = np.float32(answered(mate)["outputs"][0]["data"]).reshape(-1, 10)
    assert compare("", expected, actual, rnn.manifest.tolerance).passed
    every = np.asarray(rnn.predict(images(BUSY_ROWS), 2))
    assert compare("", every, read_binary(busy)[1]["logits"], rnn.manifest.tolerance).passed


@pytest.mark.parametrize("path", ["/v1/models/digits_rnn:predict", "/v2/models/digits_rnn/infer"])
def test_a_client_that_leaves_while_queued_gives_its_rows_back(path: str, server: Server, runs: Runs) -> None:
    x = images(100, 2)
    document = {"instances": x.tolist()} if "v1" in path else v2_json({"image": x})
    content = json.dumps(document).encode()

    async def body() -> httpx.Response:
        async with server.client() as client:
            await server.wait_until_ready(client)
            with runs.held():
                busy = asyncio.create_task(ask_in_pairs(client))
                await server.wait_for_queued_rows(client, BUSY_ROWS)
                with connection_to(server) as connection:
                    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
                    connection.sendall(head.encode() + content)
                    await server.wait_for_queued_rows(client, BUSY_ROWS + 100)
                await server.wait_for_queued_rows(client, BUSY_ROWS)
            return await busy

    assert asyncio.run(body()).status_code == 200
