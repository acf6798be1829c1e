"""How long a client may send nothing, or too little, and how slowly it may take its answer."""

import json
import time

import pytest
from support.raw import RawClient
from support.raw_requests import BODY, GET, IDLE_S, MANY, ask_for_much, post
from support.server import Server


def test_a_connection_without_a_byte_is_closed(client: RawClient) -> None:
    assert IDLE_S / 2 < client.seconds_until_closed() < IDLE_S + 5


def test_an_idle_connection_is_closed_after_its_answer(client: RawClient) -> None:
    client.send(*GET)
    assert client.answer().status == 200
    assert IDLE_S / 2 < client.seconds_until_closed() < IDLE_S + 5


def test_half_a_head_is_answered_with_408(client: RawClient) -> None:
    client.send_bytes(b"GET /healthz HTTP/1.1\r\nhost:")
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert answer.error == f"Expected a request's whole head within {IDLE_S} s. Received: a part of it. Send it faster."
    client.seconds_until_closed()


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"])
@pytest.mark.parametrize("trickle", [b"x", b"\r\n"])
def test_a_head_that_trickles_gains_no_time(client: RawClient, first: bytes, trickle: bytes) -> None:
    """The slow loris: on a new connection and on one that was answered; as a head, and as lines before it."""
    if first:
        client.send_bytes(first)
        assert client.answer().status == 200
    client.socket.settimeout(IDLE_S / 10)
    began = time.monotonic()
    client.send_bytes(b"GET /" if trickle == b"x" else b"\r\n")
    while time.monotonic() - began < 20:
        client.send_bytes(trickle)
        try:
            if part := client.socket.recv(65536):
                assert b"HTTP/1.1 408 " in part
            break
        except TimeoutError:
            continue
    assert IDLE_S / 2 < time.monotonic() - began < IDLE_S + 5


def test_half_a_body_is_answered_with_408(client: RawClient) -> None:
    client.send(*post("content-length: 1000"), body=b"abc")
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert "Received: 3 bytes of it" in answer.error
    client.seconds_until_closed()


def test_a_slow_request_is_no_idle_one(client: RawClient) -> None:
    """Each part comes in time, and all of them later than one may take."""
    client.send_bytes("\r\n".join([*post(f"content-length: {len(BODY)}"), "", ""]).encode())
    for start in range(0, len(BODY), 60):
        time.sleep(IDLE_S / 5)
        client.send_bytes(BODY[start : start + 60])
    assert len(BODY) / 60 * IDLE_S / 5 > IDLE_S
    assert client.answer().status == 200


def test_a_connection_lives_as_long_as_it_is_used(client: RawClient) -> None:
    for _ in range(6):
        client.send(*GET)
        assert client.answer().status == 200
        time.sleep(IDLE_S / 3)


def test_an_answer_that_is_taken_slowly_is_given_whole(server: Server) -> None:
    with RawClient(server.url, receive_buffer=4096) as client:
        ask_for_much(client)
        began = time.monotonic()
        received = b""
        while time.monotonic() - began < 4 * IDLE_S:
            received += client.socket.recv(4096)
            time.sleep(IDLE_S / 20)
        while not received.endswith(b"}"):
            part = client.socket.recv(1 << 20)
            assert part, "it was cut off"
            received += part
    body = received.partition(b"\r\n\r\n")[2]
    assert len(json.loads(body)["predictions"]) == MANY
