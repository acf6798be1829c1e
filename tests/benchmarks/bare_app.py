"""The least that an HTTP service of a model can be: under uvicorn, an ASGI application that only runs the model.

It reads a request of the Open Inference Protocol's binary form, believes every word of it, runs the model on its event
loop, one request a run, and answers in the same form. What it leaves out is everything that a service is for. What it
does is done as fast as one plain application can: on uvloop and httptools, bodies that come whole are taken whole, rows
are not copied, all of an answer but its numbers is remembered, and the collector looks through nothing from before.

    python tests/benchmarks/bare_app.py MODEL.onnx [PORT]

It prints its URL once it listens, on a port that is free unless one is named.
"""

import gc
import json
import socket
import sys
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import uvicorn

HEADER_LENGTH = b"inference-header-content-length"


class BareApp:
    """The application.

    Args:
        model: path of the ONNX model, which has one input and one output.
    """

    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._row_shape = self._session.get_inputs()[0].shape[1:]
        self._output = self._session.get_outputs()[0].name
        self._outputs = [self._output]
        self._head = cache(self._new_head)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, which is taken to be one."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        event = await receive()
        body = event["body"]
        while event["more_body"]:
            event = await receive()
            body += event["body"]
        start = 0
        for name, value in scope["headers"]:
            if name == HEADER_LENGTH:
                start = int(value)
        rows = np.frombuffer(body, np.float32, offset=start).reshape(-1, *self._row_shape)
        (answer,) = self._session.run(self._outputs, {self._input: rows})
        opening, header = self._head(answer.shape)
        await send(opening)
        await send({"type": "http.response.body", "body": header + answer.tobytes()})

    def _new_head(self, shape: tuple[int, ...]) -> tuple[dict[str, Any], bytes]:
        """Return what stands in front of an answer's numbers: ASGI's message, and the JSON."""
        size = 4 * int(np.prod(shape))
        output = {"name": self._output, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
        header = json.dumps({"model_name": "model", "model_version": "1", "outputs": [output]}).encode()
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", b"%d" % (len(header) + size)),
            (HEADER_LENGTH, b"%d" % len(header)),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}, header


async def _live(receive: Any, send: Any) -> None:
    await receive()
    gc.collect()
    gc.freeze()  # all is imported now
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def main(model: str, port: int = 0) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        BareApp(model),
        lifespan="on",
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
    )
    with socket.create_server(("127.0.0.1", port), backlog=2048) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
