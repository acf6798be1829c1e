"""curl and Triton's own client ask the service, as people do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.messages import images, v2_binary, v2_json
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.verification import compare


@pytest.fixture(autouse=True)
def _ready(server: Server) -> None:
    server.until_ready()


def curl(server: Server, path: str, body: bytes, *headers: str) -> bytes:
    if not (program := shutil.which("curl")):
        pytest.skip("curl is not installed")
    options = [option for header in headers for option in ("-H", header)]
    command = [program, "-sS", "--fail-with-body", "--noproxy", "*", "--data-binary", "@-", *options]
    ended = subprocess.run(
        [*command, server.url + path], input=body, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert ended.returncode == 0, (ended.stderr, ended.stdout)
    return ended.stdout


@pytest.mark.parametrize("protocol", ["predict", "v1", "v2", "v2 binary"])
def test_curl_is_a_client(protocol: str, server: Server, golden_artifacts: Path) -> None:
    x = images(3, 8)
    rows = json.dumps({"instances": x.tolist()}).encode()
    content_type = "content-type: application/json"
    if protocol == "predict":
        actual = json.loads(curl(server, "/models/digits_cnn/predict", rows, content_type))["predictions"]
    elif protocol == "v1":
        # As TensorFlow Serving's own documentation asks it: curl -d, whose content type is a form's.
        actual = json.loads(curl(server, "/v1/models/digits_cnn:predict", rows))["predictions"]
    elif protocol == "v2":
        body = json.dumps(v2_json({"image": x})).encode()
        (output,) = json.loads(curl(server, "/v2/models/digits_cnn/infer", body, content_type))["outputs"]
        actual = np.reshape(output["data"], output["shape"])
    else:
        body, headers = v2_binary({"image": x})
        out = curl(server, "/v2/models/digits_cnn/infer", body, *(f"{name}: {text}" for name, text in headers.items()))
        actual = np.frombuffer(out[-3 * 10 * 4 :], "<f4").reshape(3, 10)
    model = bln_serve.load(golden_artifacts / "digits_cnn" / "1")
    expected = np.asarray(model.predict(x))
    assert compare("", expected, np.asarray(actual, np.float32), model.manifest.tolerance).passed


# In a process of its own: gevent, on which that client rests, is nothing for this one.
_TRITON = """
import sys
import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

client = InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("together_mpmm", "1")
assert client.get_server_metadata()["name"] == "bln_serve"
(spec,) = client.get_model_metadata("together_mpmm")["inputs"]
x = np.load(sys.argv[2])
for binary in (True, False):
    tensor = InferInput(spec["name"], list(x.shape), spec["datatype"])
    tensor.set_data_from_numpy(x, binary_data=binary)
    wanted = [InferRequestedOutput("score", binary_data=binary)]
    parameters = {"bln_mini_batch_rows": 3}
    answer = client.infer("together_mpmm", [tensor], outputs=wanted, request_id="7", parameters=parameters)
    assert answer.get_response()["id"] == "7"
    np.save(f"{sys.argv[2]}.{binary}.npy", answer.as_numpy("score"))
"""


def test_tritons_client_is_a_client(server: Server, golden_artifacts: Path, tmp_path: Path) -> None:
    try:
        import geventhttpclient  # noqa: F401
        import tritonclient  # noqa: F401
    except ImportError as error:
        pytest.skip(f"Triton's HTTP client cannot be imported here: {error}")
    x = np.random.default_rng(9).normal(size=(9, 6, 4)).astype(np.float32)
    np.save(path := tmp_path / "x.npy", x)
    address = server.url.removeprefix("http://")
    ended = subprocess.run(
        [sys.executable, "-c", _TRITON, address, str(path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    model = bln_serve.load(golden_artifacts / "together_mpmm" / "1")
    for binary in (True, False):
        actual = np.load(f"{path}.{binary}.npy")
        assert compare("", np.asarray(model.predict(x, 3)), actual, model.manifest.tolerance).passed
