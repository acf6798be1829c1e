"""What the tests of connections send, byte by byte, and the limits of the service that they ask."""

import io
import json

import numpy as np

from support.raw import RawClient

IDLE_S = 2
PREDICT = "/models/digits_cnn/predict"
GET = ("GET /healthz HTTP/1.1", "host: x")
BODY = json.dumps({"instances": [[[0.5] * 8] * 8]}).encode()
MIB = 1024 * 1024
MANY = 30_000  # the most rows that the service takes here, and whose answers no buffer of the system holds


def post(*headers: str, path: str = PREDICT) -> tuple[str, ...]:
    return (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers)


def ask_for_much(client: RawClient, rows: int = MANY) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((rows, 8, 8), np.float32))
    head = (f"POST {PREDICT} HTTP/1.1", "host: x", "content-type: application/x-npy", "accept: application/json")
    client.send(*head, f"content-length: {len(stream.getvalue())}", body=stream.getvalue())
