"""TensorFlow Serving's v1 and the Open Inference Protocol v2 over real connections, as their clients speak them.

Messages are built here by hand, so that nothing of the service's own codecs vouches for itself.
"""

import asyncio
import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.artifacts import NAMES, TOGETHER
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.manifest import Manifest
from bln_serve.runtime import Model
from bln_serve.verification import compare

MODELS = (*NAMES, *TOGETHER)
JSON = {"content-type": "application/json"}
LENGTH = "inference-header-content-length"
FP32, INT32 = "FP32", "INT32"
LONG_ROWS = 10_000
"""In mini-batches of 2 some 5,000 runs of digits_rnn: long enough to do something meanwhile, on any machine."""

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def manifests(golden_artifacts: Path) -> dict[str, Manifest]:
    return {name: Artifact.open(golden_artifacts / name / "1").manifest for name in MODELS}


@pytest.fixture(scope="module")
def rnn(golden_artifacts: Path) -> Model:
    return bln_serve.load(golden_artifacts / "digits_rnn" / "1")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    async def ready() -> None:
        async with server.client() as waiting:
            await server.wait_until_ready(waiting)

    asyncio.run(ready())
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S, trust_env=False) as client:
        yield client


def drawn(manifest: Manifest, rows: int) -> Arrays:
    rng = np.random.default_rng(rows)
    arrays: Arrays = {}
    for spec in manifest.signature.inputs:
        shape = (rows, *spec.shape[1:])
        arrays[spec.name] = (
            rng.normal(size=shape).astype(np.float32)
            if spec.dtype == "float32"
            else rng.integers(0, 20, shape).astype(np.int32)
        )
    return arrays


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


def predictions(client: httpx.Client, name: str, inputs: Arrays, query: str = "") -> Arrays:
    body = {"inputs": {each: array.tolist() for each, array in inputs.items()}}
    outputs = answered(client.post(f"/models/{name}/predict{query}", json=body))["predictions"]
    if not isinstance(outputs, dict):
        (output,) = answered(client.get(f"/models/{name}"))["outputs"]
        outputs = {output["name"]: outputs}
    return {each: np.array(rows, np.float32) for each, rows in outputs.items()}


def assert_same(expected: Arrays, actual: dict[str, Any]) -> None:
    assert expected.keys() == actual.keys()
    for name, rows in expected.items():
        # Asked one after the other, both are the same run: to the bit.
        np.testing.assert_array_equal(np.asarray(actual[name], np.float32), rows, strict=True)


@pytest.mark.parametrize("path", ["", "/versions/1"])
@pytest.mark.parametrize("name", MODELS)
def test_every_protocol_predicts_the_same(
    name: str, path: str, client: httpx.Client, manifests: dict[str, Manifest]
) -> None:
    inputs = drawn(manifests[name], 12)
    expected = predictions(client, name, inputs)
    lists = {each: array.tolist() for each, array in inputs.items()}
    one = len(expected) == 1
    rows = lists[next(iter(lists))] if len(lists) == 1 else [dict(zip(lists, row)) for row in zip(*lists.values())]  # noqa: B905

    v1 = f"/v1/models/{name}{path}:predict"
    by_row = answered(client.post(v1, json={"instances": rows, "signature_name": "serving_default"}))["predictions"]
    by_row = [{next(iter(expected)): row} for row in by_row] if one else by_row
    assert_same(expected, {each: [row[each] for row in by_row] for each in expected})
    by_column = answered(client.post(v1, json={"inputs": lists}))["outputs"]
    assert_same(expected, {next(iter(expected)): by_column} if one else by_column)

    v2 = f"/v2/models/{name}{path}/infer"
    document = answered(client.post(v2, json=v2_json(inputs)))
    assert (document["model_name"], document["model_version"]) == (name, "1")
    assert [(each["name"], each["datatype"]) for each in document["outputs"]] == [(each, FP32) for each in expected]
    assert_same(
        expected, {each["name"]: np.reshape(np.float32(each["data"]), each["shape"]) for each in document["outputs"]}
    )
    body, headers = v2_binary(inputs)
    answer = client.post(v2, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert_same(expected, read_binary(answer)[1])


def test_answers_differ_from_model_to_model_so_that_a_mix_up_would_show(
    client: httpx.Client, manifests: dict[str, Manifest]
) -> None:
    for first, second in (("digits_cnn", "digits_rnn"), ("tiny_mpmm", "tiny_pppp")):
        inputs = drawn(manifests[first], 12)
        one, other = (next(iter(predictions(client, name, inputs).values())) for name in (first, second))
        assert np.abs(one - other).max() > 1e-2 * np.abs(one).max()


@pytest.mark.parametrize("name", MODELS)
def test_each_protocol_says_what_a_model_takes(name: str, client: httpx.Client, manifests: dict[str, Manifest]) -> None:
    signature = manifests[name].signature
    v1 = answered(client.get(f"/v1/models/{name}/metadata"))
    assert v1["model_spec"] == {"name": name, "signature_name": "", "version": "1"}
    tensors = v1["metadata"]["signature_def"]["signature_def"]["serving_default"]
    v2 = answered(client.get(f"/v2/models/{name}"))
    assert (v2["name"], v2["versions"]) == (name, ["1"])
    names = {"float32": ("DT_FLOAT", FP32), "int32": ("DT_INT32", INT32)}
    for role, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        shapes = {spec.name: [-1, *spec.shape[1:]] for spec in specs}
        assert v2[role] == [
            {"name": spec.name, "datatype": names[spec.dtype][1], "shape": shapes[spec.name]} for spec in specs
        ]
        assert tensors[role].keys() == shapes.keys()
        for spec in specs:
            tensor = tensors[role][spec.name]
            assert tensor["dtype"] == names[spec.dtype][0]
            assert [int(size["size"]) for size in tensor["tensor_shape"]["dim"]] == shapes[spec.name]
    assert v2["parameters"]["bln_row_coupling"] == manifests[name].row_coupling
    for path in ("/v1/models/{}/versions/1/metadata", "/v2/models/{}/versions/1"):
        without = path.replace("/versions/1", "").format(name)
        assert client.get(path.format(name)).json() == client.get(without).json()


def test_each_protocol_says_how_the_service_is(client: httpx.Client) -> None:
    assert answered(client.get("/v2"))["extensions"] == ["binary_tensor_data"]
    assert answered(client.get("/v2"))["version"] == bln_serve.__version__
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/digits_cnn/ready"):
        answered(client.get(path))
    answered(client.get("/v2/models/digits_cnn/versions/1/ready"))
    (status,) = answered(client.get("/v1/models/digits_cnn"))["model_version_status"]
    assert (status["version"], status["state"], status["status"]["error_code"]) == ("1", "AVAILABLE", "OK")
    assert client.get("/v1/models/digits_cnn/versions/1").json() == client.get("/v1/models/digits_cnn").json()


def test_a_service_without_a_model_is_alive_and_not_ready(start_server: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    server = start_server(str(tmp_path))

    async def body() -> dict[str, int]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            paths = ("/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready", "/v1/models/digits")
            statuses = {path: (await client.get(path)).status_code for path in paths}
            infer = await client.post("/v2/models/digits/infer", json=v2_json({"image": images(2)}))
            return {**statuses, "infer": infer.status_code}

    assert asyncio.run(body()) == {
        "/v2/health/live": 200,
        "/v2/health/ready": 400,
        "/v2/models/digits/ready": 400,
        "/v1/models/digits": 200,
        "infer": 503,
    }


def test_the_id_of_a_v2_request_comes_back(client: httpx.Client) -> None:
    inputs = {"image": images(2)}
    url = "/v2/models/digits_cnn/infer"
    assert answered(client.post(url, json=v2_json(inputs, id="request \u2116 7")))["id"] == "request \u2116 7"
    assert "id" not in answered(client.post(url, json=v2_json(inputs)))


def test_mini_batch_rows_stand_in_parameters_or_in_the_url(client: httpx.Client, rnn: Model) -> None:
    x = images(30)
    answers = {rows: np.asarray(rnn.predict(x, rows)) for rows in (0, 3, 25)}
    assert not compare("", answers[3], answers[0], rnn.manifest.tolerance).passed
    v1, v2 = "/v1/models/digits_rnn:predict", "/v2/models/digits_rnn/infer"

    def right(rows: int, actual: Any) -> bool:
        return compare("", answers[rows], np.float32(actual).reshape(-1, 10), rnn.manifest.tolerance).passed

    for rows, stated in ((0, "30"), (3, "3x10"), (25, "25,5")):
        in_body = v2_json({"image": x}, parameters={"bln_mini_batch_rows": rows})
        for url, document in ((v2, in_body), (f"{v2}?mini_batch_rows={rows}", v2_json({"image": x}))):
            answer = answered(client.post(url, json=document))
            assert right(rows, answer["outputs"][0]["data"])
            assert answer["parameters"] == {"bln_statistics": "MMMM", "bln_mini_batches": stated}
        body, headers = v2_binary({"image": x}, bln_mini_batch_rows=rows)
        assert right(rows, read_binary(client.post(v2, content=body, headers=headers))[1]["logits"])
        row_form = client.post(f"{v1}?mini_batch_rows={rows}", json={"instances": x.tolist()})
        assert right(rows, answered(row_form)["predictions"])
        assert row_form.headers["bln-mini-batches"] == stated
    both = client.post(f"{v2}?mini_batch_rows=3", json=v2_json({"image": x}, parameters={"bln_mini_batch_rows": 4}))
    assert both.status_code == 400
    assert "3 in the URL and 4 in the body" in both.json()["error"]


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/models/digits_cnn:predict", {"content": b"{"}, 400, "JSON object"),
    ("/v1/models/digits_cnn:predict", {"json": {"instances": [[1.0]]}}, 422, "image"),
    ("/v1/models/digits_cnn:predict", {"json": {"instances": [], "inputs": []}}, 400, "both"),
    ("/v1/models/digits_cnn:predict", {"json": {"inputs": 1, "signature_name": "x"}}, 400, "serving_default"),
    ("/v1/models/digits_cnn/versions/2:predict", {"json": {}}, 404, "version 1"),
    ("/v1/models/nothing:predict", {"json": {}}, 404, "nothing"),
    ("/v1/models/digits_rnn:predict", {"json": {"instances": images(1).tolist()}}, 422, "mini-batch"),
    ("/v2/models/digits_cnn/infer", {"content": b"\xff"}, 400, "JSON"),
    ("/v2/models/digits_cnn/infer", {"json": {"inputs": []}}, 422, "image"),
    ("/v2/models/digits_cnn/infer", {"json": v2_json({"wrong": images(2)})}, 422, "image"),
    ("/v2/models/digits_cnn/infer", {"json": v2_json({"image": images(2)[:, :7]})}, 422, "image"),
    ("/v2/models/digits_cnn/infer", {"json": {"inputs": [{"name": "image"}]}}, 400, "datatype"),
    ("/v2/models/digits_cnn/infer", {"content": b"{}", "headers": {LENGTH: "3"}}, 400, "Content-Length"),
    ("/v2/models/digits_cnn/versions/2/infer", {"json": {}}, 404, "version 1"),
    ("/v2/models/nothing/infer", {"json": {}}, 404, "nothing"),
    ("/v2/models/digits_rnn/infer", {"json": v2_json({"image": images(1)})}, 422, "mini-batch"),
    ("/v2/models/digits_rnn/infer?rows=2", {"json": v2_json({"image": images(2)})}, 400, "mini_batch_rows"),
]


@pytest.mark.parametrize(("url", "message", "status", "said"), WRONG)
def test_a_wrong_request_gets_4xx_and_a_sentence(
    url: str, message: dict[str, Any], status: int, said: str, client: httpx.Client
) -> None:
    answer = client.post(url, **message)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    assert said in answer.json()["error"]
    assert "Received" in answer.json()["error"]


def test_a_binary_tensor_cut_short_gets_400(client: httpx.Client) -> None:
    body, headers = v2_binary({"image": images(2)})
    for wrong in (body[:-1], body + b"\0"):
        answer = client.post("/v2/models/digits_cnn/infer", content=wrong, headers=headers)
        assert answer.status_code == 400, answer.text
        assert answer.json().keys() == {"error"}


@pytest.mark.parametrize("path", ["/predict", "/v1/models/digits_cnn:predict", "/v2/models/digits_cnn/infer"])
def test_reading_where_one_asks_gets_405_and_the_right_method(path: str, client: httpx.Client) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == "POST"
        assert answer.json() == {"error": f"Expected POST. Received: {method} {path}."}


@pytest.mark.parametrize("path", ["/v2/health/live", "/v1/models/digits_cnn", "/v2/models/digits_cnn"])
def test_asking_where_one_reads_gets_405_and_the_right_method(path: str, client: httpx.Client) -> None:
    answer = client.post(path, json={})
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
    assert answer.json().keys() == {"error"}


@contextlib.contextmanager
def connection_to(server: Server) -> Any:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        yield connection


@pytest.mark.parametrize("path", ["/predict", "/v1/models/digits_cnn:predict", "/v2/models/digits_cnn/infer"])
@pytest.mark.parametrize("length", [b"content-length: 1000", b"transfer-encoding: chunked"])
def test_a_body_that_stops_midway_ends_in_408_and_the_connection_is_closed(
    path: str, length: bytes, start_server: Callable[..., Server], golden_artifacts: Path
) -> None:
    server = start_server(str(golden_artifacts / "digits_cnn"), "--request-timeout-s", "0.5")

    async def ready() -> None:
        async with server.client() as client:
            await server.wait_until_ready(client)

    asyncio.run(ready())
    half = b"1f4\r\n" + b" " * 500 + b"\r\n" if b"chunked" in length else b" " * 500
    with connection_to(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
        connection.sendall(head + length + b"\r\n\r\n" + half)
        # Nothing more is sent. That `recv` ends with nothing is that the service closed; else it would time out.
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close" in top.lower()
    assert "500 bytes of it" in json.loads(body)["error"]


async def ask_long(client: httpx.AsyncClient) -> httpx.Response:
    """Keep digits_rnn busy."""
    body, headers = v2_binary({"image": images(LONG_ROWS)}, bln_mini_batch_rows=2)
    return await client.post("/v2/models/digits_rnn/infer", content=body, headers=headers)


def test_a_request_without_time_ends_in_504_while_its_mates_are_answered(server: Server, rnn: Model) -> None:
    url, x = "/v2/models/digits_rnn/infer", images(30, 1)

    async def body() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            long = asyncio.create_task(ask_long(client))
            await server.wait_for_queued_rows(client, LONG_ROWS)
            mate = asyncio.create_task(client.post(url, json=v2_json({"image": x})))
            await server.wait_for_queued_rows(client, LONG_ROWS + 30)
            hurry = {"bln-timeout-ms": "1"}
            late = [
                await client.post(url, json=v2_json({"image": images(4)}), headers=hurry),
                await client.post(
                    "/v1/models/digits_rnn:predict", json={"instances": images(4).tolist()}, headers=hurry
                ),
            ]
            assert await server.queued_rows(client) == LONG_ROWS + 30, "their rows are given back, others' are not"
            return late, await mate, await long

    late, mate, long = asyncio.run(body())
    for answer in late:
        assert answer.status_code == 504
        assert answer.json().keys() == {"error"}
    expected = np.asarray(rnn.predict(x))
    actual = np.float32(answered(mate)["outputs"][0]["data"]).reshape(-1, 10)
    assert compare("", expected, actual, rnn.manifest.tolerance).passed
    every = np.asarray(rnn.predict(images(LONG_ROWS), 2))
    assert compare("", every, read_binary(long)[1]["logits"], rnn.manifest.tolerance).passed


@pytest.mark.parametrize("path", ["/v1/models/digits_rnn:predict", "/v2/models/digits_rnn/infer"])
def test_a_client_that_leaves_while_queued_gives_its_rows_back(path: str, server: Server) -> None:
    x = images(100, 2)
    document = {"instances": x.tolist()} if "v1" in path else v2_json({"image": x})
    content = json.dumps(document).encode()

    async def body() -> httpx.Response:
        async with server.client() as client:
            await server.wait_until_ready(client)
            long = asyncio.create_task(ask_long(client))
            await server.wait_for_queued_rows(client, LONG_ROWS)
            with connection_to(server) as connection:
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
                connection.sendall(head.encode() + content)
                await server.wait_for_queued_rows(client, LONG_ROWS + 100)
            await server.wait_for_queued_rows(client, LONG_ROWS)
            assert not long.done()
            return await long

    assert asyncio.run(body()).status_code == 200


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


@pytest.mark.usefixtures("client")  # which waits until the server is ready
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


@pytest.mark.usefixtures("client")
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
