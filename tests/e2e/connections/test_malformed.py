"""What is no HTTP, or contradicts itself, is refused and its connection closed."""

import pytest
from support.raw import RawClient
from support.raw_requests import BODY, MANY, ask_for_much, post


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
    ask_for_much(client, MANY + 1)
    client.send(*post("content-length: 1000", path="/models/nope/predict"), body=b"abc")
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    client.seconds_until_closed()
