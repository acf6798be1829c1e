"""Requests of the Open Inference Protocol v2 built by hand: nothing of the service's own codecs vouches for itself."""

import json
import struct
from typing import Any

import httpx
import numpy as np

LENGTH = "inference-header-content-length"
FP32, INT32 = "FP32", "INT32"

Arrays = dict[str, np.ndarray]


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 8, 8)).astype(np.float32)


def datatype(array: np.ndarray) -> str:
    return {"float32": FP32, "int32": INT32}[array.dtype.name]


def v2_json(inputs: Arrays, **more: Any) -> dict[str, Any]:
    tensors = [
        {"name": name, "shape": list(array.shape), "datatype": datatype(array), "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    return {"inputs": tensors, **more}


def v2_binary(inputs: Arrays, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """Write tensors number by number with struct, as the extension's text says."""
    tensors, tail = [], b""
    for name, array in inputs.items():
        code = {FP32: "f", INT32: "i"}[datatype(array)]
        data = struct.pack(f"<{array.size}{code}", *array.ravel().tolist())
        size = {"binary_data_size": len(data)}
        tensors.append({"name": name, "shape": list(array.shape), "datatype": datatype(array), "parameters": size})
        tail += data
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True, **parameters}}).encode()
    return head + tail, {"content-type": "application/octet-stream", LENGTH: str(len(head))}


def read_binary(answer: httpx.Response) -> tuple[dict[str, Any], Arrays]:
    head = int(answer.headers[LENGTH])
    document, at, outputs = json.loads(answer.content[:head]), head, {}
    for output in document["outputs"]:
        size = output["parameters"]["binary_data_size"]
        assert output["datatype"] == FP32
        values = struct.unpack(f"<{size // 4}f", answer.content[at : at + size])
        outputs[output["name"]] = np.array(values, np.float32).reshape(output["shape"])
        at += size
    assert at == len(answer.content)
    return document, outputs


def answered(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()
