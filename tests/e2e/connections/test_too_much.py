"""Heads, framing and bodies beyond their limits: what they are answered, and what they cost."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.raw import RawClient
from support.raw_requests import BODY, GET, IDLE_S, MIB, PREDICT, post
from support.server import Server


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(7000)) + b"\r\n",
        b"GET /healthz?" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\r\n" * 40_000,
    ],
    ids=["long header", "many headers", "long path", "empty lines"],
)
def test_a_head_too_large_is_answered_with_431(client: RawClient, head: bytes) -> None:
    client.send_bytes(head)
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (431, "close")
    assert "at most 65536 bytes" in answer.error
    client.seconds_until_closed()


def test_a_head_of_nearly_the_limit_is_read(client: RawClient) -> None:
    client.send(*GET, "x-long: " + "a" * 64_000)
    assert client.answer().status == 200


@pytest.mark.parametrize(
    "endless",
    [b"1;" + b"a" * 400_000, b"0\r\n" + b"x-trailer: y\r\n" * 20_000, b"0\r\nx-trailer: " + b"a" * 400_000],
    ids=["chunk extension", "trailers", "long trailer"],
)
def test_what_frames_a_body_is_bounded_like_a_head(client: RawClient, endless: bytes) -> None:
    client.send(*post("transfer-encoding: chunked"), body=b"1\r\n{\r\n")
    time.sleep(0.2)  # so that the rest comes by itself
    client.send_bytes(endless)
    assert client.answer().status == 431
    client.seconds_until_closed()


def test_a_small_body_in_many_chunks_is_read(client: RawClient) -> None:
    """Its framing is larger than any head may be, and its bytes come in between."""
    body = BODY[:-1] + b" " * 20_000 + b"}"
    client.send(*post("transfer-encoding: chunked"))
    client.send_bytes(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert client.answer().status == 200


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_far_over_the_limit_costs_no_memory(
    start_server: Callable[..., Server], golden_artifacts: Path, announced: bool
) -> None:
    """96 MiB are sent to the end before anything is read, as simple clients do. Linux counts the most ever resident."""
    server = start_server(str(golden_artifacts / "digits_cnn"), "--threads", "1")
    server.until_ready()
    before = server.peak_resident_mib()
    part = b" " * MIB
    with RawClient(server.url) as client:
        if announced:
            client.send(*post(f"content-length: {96 * MIB}"))
        else:
            client.send(*post("transfer-encoding: chunked"))
            part = b"100000\r\n" + part + b"\r\n"
        for _ in range(96):
            client.send_bytes(part)
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert "Expected a body of at most 8388608 bytes" in answer.error
        client.seconds_until_closed()
    assert server.peak_resident_mib() - before < 16


@pytest.mark.parametrize("path", [PREDICT, "/models/nope/predict", "/healthz"])
def test_a_body_that_never_ends_is_not_read_for_ever(client: RawClient, path: str) -> None:
    """Answered before its end with 413, 404, and 405, by routes that read it and that do not."""
    client.send(*post("transfer-encoding: chunked", path=path))
    part = b"100000\r\n" + b" " * MIB + b"\r\n"
    began = time.monotonic()
    sent = 0
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 20:
            client.send_bytes(part)
            sent += 1
    assert time.monotonic() - began < 20, "the service ended it"
    assert sent < 200


@pytest.mark.parametrize("path", ["/models/nope/predict", "/healthz"])
def test_a_body_that_nobody_reads_does_not_end_its_connection(client: RawClient, path: str) -> None:
    client.send(*post(f"content-length: {2 * MIB}", path=path))
    assert client.answer().status in (404, 405)
    client.send_bytes(b" " * 2 * MIB)
    client.send(*GET)
    assert client.answer().status == 200
    assert client.seconds_until_closed() > IDLE_S / 2


def test_a_body_that_nobody_reads_must_come_all_the_same(client: RawClient) -> None:
    client.send(*post("content-length: 1000", path="/models/nope/predict"), body=b"abc")
    assert client.answer().status == 404
    assert client.seconds_until_closed() < 10
