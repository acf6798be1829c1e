"""TensorFlow Serving's v1 and the Open Inference Protocol v2 over real connections, as their clients speak them.

Messages are built here by hand, so that nothing of the service's own codecs vouches for itself.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.artifacts import NAMES, TOGETHER
from support.messages import FP32, INT32, LENGTH, Arrays, answered, images, read_binary, v2_binary, v2_json
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.manifest import Manifest
from bln_serve.runtime import Model
from bln_serve.verification import compare

MODELS = (*NAMES, *TOGETHER)
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def manifests(golden_artifacts: Path) -> dict[str, Manifest]:
    return {name: Artifact.open(golden_artifacts / name / "1").manifest for name in MODELS}


@pytest.fixture(scope="module")
def rnn(golden_artifacts: Path) -> Model:
    return bln_serve.load(golden_artifacts / "digits_rnn" / "1")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    server.until_ready()
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
            await server.wait_until_loaded(client)
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
