"""While a body of the largest allowed size is read, the service answers whoever asks whether it is alive."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server import Server

MAX_BODY = 8 * 1024 * 1024
DELAY_S = 0.1
ATTEMPTS = 20  # what else the machine does can only make an answer later

BODIES = {
    "pixels": (b'{"instances": [[[', b"0.5176,", b"0.5176]]]}"),
    "digits": (b'{"instances": [[[', b"0,", b"0]]]}"),
    "lists": (b'{"instances": [', b"[],", b"[]]}"),
    "booleans": (b'{"instances": [', b"true,", b"true]}"),
    "text": (b'{"instances": ["', b"a", b'"]}'),
    "half a list": (b'{"instances": [', b"[1],", b""),
    "depth": (b'{"instances": ', b"[", b""),
}


@pytest.fixture(scope="module")
def server(golden_artifacts: Path) -> Iterator[Server]:
    server = Server(str(golden_artifacts / "digits_cnn"), "--threads", "1")
    with httpx.Client(timeout=60) as client:
        while client.get(f"{server.url}/readyz").status_code != httpx.codes.OK:
            time.sleep(0.02)
    yield server
    server.end()


def longest_wait_for_life(url: str, until: threading.Event) -> float:
    longest = 0.0
    with httpx.Client(timeout=60) as client:
        client.get(f"{url}/healthz")
        while not until.is_set():
            began = time.perf_counter()
            assert client.get(f"{url}/healthz").json() == {"alive": True}
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.001)
    return longest


@pytest.mark.parametrize("route", ["/predict", "/v1/models/digits_cnn:predict", "/v2/models/digits_cnn/infer"])
@pytest.mark.parametrize("kind", BODIES)
def test_reading_it_does_not_hold_up_the_rest(server: Server, kind: str, route: str) -> None:
    start, item, end = BODIES[kind]
    if route.startswith("/v2"):
        start = start.replace(
            b'{"instances": ',
            b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": ',
        )
        end = end.replace(b"}", b"}]}")
    body = start + item * ((MAX_BODY - len(start) - len(end)) // len(item)) + end
    waits = []
    for _ in range(ATTEMPTS):
        waits.append(longest_wait_while_asking(server.url, route, body))
        if waits[-1] < DELAY_S:
            return
    pytest.fail(f"/healthz waited {', '.join(f'{wait:.3f}' for wait in waits)} s")


def longest_wait_while_asking(url: str, route: str, body: bytes) -> float:
    answered, statuses = threading.Event(), list[int]()

    def ask() -> None:
        headers = {"content-type": "application/json"}
        try:
            statuses.append(httpx.post(f"{url}{route}", content=body, headers=headers, timeout=60).status_code)
        finally:
            answered.set()

    asking = threading.Thread(target=ask)
    asking.start()
    longest = longest_wait_for_life(url, answered)
    asking.join()
    assert statuses[0] in (400, 413, 422)
    return longest
