"""What a connection is closed for, what it survives, and what it costs: byte by byte against a real server."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.raw import RawClient
from support.server import Server

IDLE_S = 1
PREDICT = "/models/digits_cnn/predict"
GET = ("GET /healthz HTTP/1.1", "host: x")
BODY = json.dumps({"instances": [[[0.5] * 8] * 8]}).encode()
MIB = 1024 * 1024
MANY = 30_000  # the most rows that the service takes here, and whose answers no buffer of the system holds


def post(*headers: str, path: str = PREDICT) -> tuple[str, ...]:
    return (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers)


@pytest.fixture(scope="module")
def server(golden_artifacts: Path) -> Iterator[Server]:
    settings = ["--threads", "1", "--idle-timeout-s", str(IDLE_S), "--max-queued-rows", str(MANY)]
    server = Server(str(golden_artifacts / "digits_cnn"), *settings)
    asyncio.run(_until_ready(server))
    yield server
    server.end()


async def _until_ready(server: Server) -> None:
    async with server.client() as client:
        await server.wait_until_ready(client)


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


# Nothing comes


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
    assert answer.error == "Expected a request's whole head within 1 s. Received: a part of it. Send it faster."
    client.seconds_until_closed()


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"])
@pytest.mark.parametrize("trickle", [b"x", b"\r\n"])
def test_a_head_that_trickles_gains_no_time(client: RawClient, first: bytes, trickle: bytes) -> None:
    """The slow loris: on a new connection and on one that was answered; as a head, and as lines before it."""
    if first:
        client.send_bytes(first)
        assert client.answer().status == 200
    client.send_bytes(b"GET /" if trickle == b"x" else b"\r\n")
    client.socket.settimeout(IDLE_S / 10)
    began = time.monotonic()
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
        _ask_for_much(client)
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


def _ask_for_much(client: RawClient, rows: int = MANY) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((rows, 8, 8), np.float32))
    head = (f"POST {PREDICT} HTTP/1.1", "host: x", "content-type: application/x-npy", "accept: application/json")
    client.send(*head, f"content-length: {len(stream.getvalue())}", body=stream.getvalue())


# What is no HTTP


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (b"nonsense\r\n\r\n", "Invalid method"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "Invalid method"),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
        (b"GET /healthz HTTP/9.9\r\n\r\n", "Invalid HTTP version"),
        (b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n", ""),
        (b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n", "Invalid header"),
        (b"GET /healthz HTTP/1.1\r\nhost: a\x00b\r\n\r\n", "Invalid header value"),
        ("GET /h\u00e9 HTTP/1.1\r\nhost: x\r\n\r\n".encode(), ""),
    ],
)
def test_what_is_no_http_is_answered_with_400(client: RawClient, sent: bytes, received: str) -> None:
    client.send_bytes(sent)
    answer = client.answer()
    assert answer.status in (400, 404)
    if answer.status == 400:
        assert (answer.headers["content-type"], answer.headers["connection"]) == ("application/json", "close")
        assert answer.error.startswith("Expected a request in HTTP/1.1. Received: ")
        client.seconds_until_closed()
    assert received in answer.error


@pytest.mark.parametrize(
    "headers",
    [
        ("content-length: -1",),
        ("content-length: ten",),
        ("content-length: 1e3",),
        ("content-length: 99999999999999999999999",),
        ("content-length:",),
        ("content-length: 3", "content-length: 4"),
        ("content-length: 3", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked", "content-length: 3"),
        ("transfer-encoding: chunked, identity",),
    ],
)
def test_a_length_that_is_none_is_answered_with_4xx_and_closed(client: RawClient, headers: tuple[str, ...]) -> None:
    client.send(*post(*headers), body=b"abc")
    answer = client.answer()
    assert answer.status == 400
    assert answer.error.startswith("Expected a request in HTTP/1.1. Received: ")
    client.seconds_until_closed()


def test_a_length_shorter_than_the_body(client: RawClient) -> None:
    """The request is answered; what follows it is taken for the next, and is none."""
    client.send(*post(f"content-length: {len(BODY)}"), body=BODY + b"0.5, 0.5]]]}")
    assert client.answer().status == 200
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert "Invalid method" in answer.error
    client.seconds_until_closed()


def test_a_length_longer_than_the_body(client: RawClient) -> None:
    client.send(*post(f"content-length: {len(BODY) + 1}"), body=BODY)
    assert client.answer().status == 408
    client.seconds_until_closed()


@pytest.mark.parametrize("chunk", [b"x\r\n", b"-1\r\nabc\r\n", b"3\r\nabcd\r\n", b"fffffffffffffffffff\r\n"])
def test_chunks_that_are_none(client: RawClient, chunk: bytes) -> None:
    """Whoever reads the body waits for no more of it."""
    client.send(*post("transfer-encoding: chunked"), body=b"1\r\n{\r\n" + chunk)
    answer = client.answer()
    assert answer.status == 400
    assert answer.error.startswith("Expected a request in HTTP/1.1. Received: ")
    client.seconds_until_closed()


def test_requests_sent_at_once_are_answered_in_order_before_the_refusal(client: RawClient) -> None:
    request = "\r\n".join([*post(f"content-length: {len(BODY)}"), "", ""]).encode() + BODY
    client.send_bytes(request + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" + request + b"nonsense\r\n\r\n")
    answers = [client.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 400]
    assert answers[1].body == b'{"alive":true}'
    client.seconds_until_closed()


def test_what_was_sent_after_a_request_that_ends_the_connection(client: RawClient) -> None:
    """Its answer says so, and nothing is answered after it; least of all what has not come whole."""
    _ask_for_much(client, MANY + 1)
    client.send(*post("content-length: 1000", path="/models/nope/predict"), body=b"abc")
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    client.seconds_until_closed()


# Too much


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
    asyncio.run(_until_ready(server))
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


# What HTTP offers


def test_expect_100_continue(client: RawClient) -> None:
    client.send(*post(f"content-length: {len(BODY)}", "expect: 100-continue"))
    assert client.answer().status == 100
    client.send_bytes(BODY)
    assert client.answer().status == 200
    client.send(*GET)
    assert client.answer().status == 200


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [(PREDICT, 9 * MIB, 413), ("/models/nope/predict", 1000, 404), ("/healthz", 1000, 405)],
)
def test_expect_100_continue_for_a_body_that_is_not_wanted(
    client: RawClient, path: str, length: int, status: int
) -> None:
    """It is never asked for; and since it may come all the same, nothing else is read on this connection."""
    client.send(*post(f"content-length: {length}", "expect: 100-continue", path=path))
    assert client.answer().status == status
    client.seconds_until_closed()


@pytest.mark.parametrize("path", [PREDICT, "/healthz", "/v2/models/digits_cnn/infer", "/metrics", "/nothing"])
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "TRACE", "DELETE"])
def test_other_methods_get_4xx_or_2xx(client: RawClient, method: str, path: str) -> None:
    client.send(f"{method} {path} HTTP/1.1", "host: x")
    answer = client.answer(to_head=method == "HEAD")
    assert answer.status in (200, 404, 405)
    client.send(*GET)
    assert client.answer().body == b'{"alive":true}'


def test_a_client_that_would_rather_speak_http_2(server: Server, client: RawClient) -> None:
    """As Java's client asks by default: answered in HTTP/1.1, where no body is lost by that."""
    upgrade = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAA")
    for _ in range(2):
        client.send(*GET, *upgrade)
        assert client.answer().body == b'{"alive":true}'
    client.send(*post(f"content-length: {len(BODY)}", *upgrade), body=BODY)
    answer = client.answer()
    assert answer.status == 400
    assert "Received: one with a body and the header Upgrade. Leave that header out" in answer.error
    client.seconds_until_closed()
    assert not [line for line in server.lines if "pgrade" in line]


def test_an_old_client_is_answered_and_closed(client: RawClient) -> None:
    client.send(f"POST {PREDICT} HTTP/1.0", f"content-length: {len(BODY)}", "content-type: application/json", body=BODY)
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    client.seconds_until_closed()


def test_answers_say_nothing_of_the_server(client: RawClient) -> None:
    client.send(*GET)
    assert "server" not in client.answer().headers


def test_requests_are_not_logged(server: Server) -> None:
    assert not [line for line in server.lines if PREDICT in line and "serving" not in line]
