"""What the clients of the service's benchmarks send, in three forms, and how its answer is read.

The rows are images, uniform from 0 to 1 and rounded to 4 decimals, which is how JSON then writes them. A client sends
the same rows again and again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import numpy as np
import orjson

MODEL = "model"
INPUT = "image"

_HEADER_LENGTH = "inference-header-content-length"
_INFER = f"/v2/models/{MODEL}/infer"


@dataclass(frozen=True)
class Message:
    """A request: the path it is posted to, its body and its headers."""

    path: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Form:
    """A wire format."""

    title: str
    write: Callable[[np.ndarray], Message]
    read: Callable[[httpx.Response], np.ndarray]

    def ask(self, url: str, x: np.ndarray) -> np.ndarray:
        """Ask once, and return the answer's only output."""
        message = self.write(x)
        answer = httpx.post(url + message.path, content=message.body, headers=message.headers, trust_env=False)
        return self.read(answer.raise_for_status())


def images(rows: int, *shape: int) -> np.ndarray:
    """Return rows to send."""
    return np.random.default_rng(rows).uniform(0, 1, (rows, *shape)).round(4).astype(np.float32)


def _write_binary(x: np.ndarray) -> Message:
    tensor = {"name": INPUT, "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", _HEADER_LENGTH: str(len(header))}
    return Message(_INFER, header + x.tobytes(), headers)


def _read_binary(answer: httpx.Response) -> np.ndarray:
    length = int(answer.headers[_HEADER_LENGTH])
    (output,) = json.loads(answer.content[:length])["outputs"]
    return np.frombuffer(answer.content, np.float32, offset=length).reshape(output["shape"])


def _write_v2_json(x: np.ndarray) -> Message:
    tensor = {"name": INPUT, "shape": x.shape, "datatype": "FP32", "data": x.ravel()}
    return Message(_INFER, _json({"inputs": [tensor]}), {"content-type": "application/json"})


def _read_v2_json(answer: httpx.Response) -> np.ndarray:
    (output,) = answer.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _write_nested(x: np.ndarray) -> Message:
    return Message("/predict", _json({"instances": x}), {"content-type": "application/json"})


def _read_nested(answer: httpx.Response) -> np.ndarray:
    return np.array(answer.json()["predictions"], np.float32)


def _json(document: object) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


V2_BINARY = Form("v2 binary", _write_binary, _read_binary)
V2_JSON = Form("v2 JSON", _write_v2_json, _read_v2_json)
NESTED = Form("nested JSON on /predict", _write_nested, _read_nested)
