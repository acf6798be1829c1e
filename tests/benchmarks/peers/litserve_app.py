"""What LitServe runs: python litserve_app.py MODEL.onnx PORT PATH MAX_BATCH_SIZE BATCH_TIMEOUT_S.

A request has one or several rows; a batch is the rows of all its requests in one run of ONNX Runtime.
"""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Api(litserve.LitAPI):
    """The model behind LitServe.

    Args:
        model: path of the ONNX model, which has one input and one output.
        options: LitServe's own.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self._model = model

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        """Read a request's rows."""
        rows = request["instances"] if "instances" in request else request["inputs"][self._input]
        return np.asarray(rows, np.float32)

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Leave the requests apart, for how many rows each has is still wanted."""
        return inputs

    def predict(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Answer the rows of all requests in one run."""
        (answers,) = self._session.run(None, {self._input: np.concatenate(inputs)})
        return np.split(answers, np.cumsum([len(each) for each in inputs])[:-1])

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        """Return an answer a request."""
        return output

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """Write an answer."""
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    path, port, address, size, timeout_s = sys.argv[1:]
    api = Api(path, api_path=address, max_batch_size=int(size), batch_timeout=float(timeout_s))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(port),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        # As long as its answers may take: by default a connection closes under a client that waited its turn for 5 s.
        timeout_keep_alive=60,
    )
