"""What HTTP/1.1 offers and older clients ask for."""

import pytest
from support.raw import RawClient
from support.raw_requests import BODY, GET, MIB, PREDICT, post
from support.server import Server


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
