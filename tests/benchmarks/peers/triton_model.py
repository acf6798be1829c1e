"""What tritonserver's Python back end runs: the requests that it batched, in one run of ONNX Runtime."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, os.environ["PEER_PACKAGES"])  # the back end's interpreter heeds no PYTHONPATH

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The model, by the name that the back end looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model that the configuration names."""
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = config["parameters"]["onnx"]["string_value"]
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of one batch."""
        parts = [triton.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        (answers,) = self._session.run([self._output], {self._input: rows})
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [
            triton.InferenceResponse([triton.Tensor(self._output, np.ascontiguousarray(answer))])
            for answer in np.split(answers, ends)
        ]
