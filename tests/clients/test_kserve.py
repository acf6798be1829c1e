"""KServe's own client, in both of its protocols, against what the model answers in this process."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from support.artifacts import NAMES, TOGETHER
from support.server import DEADLINE_S, Server

import bln_serve
from bln_serve.runtime import Model
from bln_serve.verification import compare

MODELS = (*NAMES, *TOGETHER)
DATATYPES = {"float32": "FP32", "int32": "INT32"}
Arrays = dict[str, np.ndarray]


def kserve(protocol: str) -> InferenceRESTClient:
    return InferenceRESTClient(RESTConfig(protocol=protocol, retries=0, timeout=DEADLINE_S))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, golden_artifacts: Path) -> Model:
    return bln_serve.load(golden_artifacts / request.param / "1")


def drawn(model: Model, rows: int) -> Arrays:
    rng = np.random.default_rng(rows)
    return {
        spec.name: rng.normal(size=(rows, *spec.shape[1:])).astype(np.float32)
        if spec.dtype == "float32"
        else rng.integers(0, 20, (rows, *spec.shape[1:])).astype(np.int32)
        for spec in model.manifest.signature.inputs
    }


def by_name(model: Model, outputs: Any) -> Arrays:
    names = [spec.name for spec in model.manifest.signature.outputs]
    return dict(outputs) if len(names) > 1 else {names[0]: outputs}


def assert_right(model: Model, inputs: Arrays, actual: Arrays) -> None:
    expected = by_name(model, model.predict(inputs))
    assert expected.keys() == actual.keys()
    for name, rows in expected.items():
        assert compare(name, rows, actual[name], model.manifest.tolerance).passed


def test_v1_predicts(model: Model, server: Server) -> None:
    inputs = drawn(model, 9)
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*(x.tolist() for x in inputs.values()), strict=True)]

    async def ask() -> Any:
        async with kserve("v1") as client:
            return await client.infer(server.url, {"instances": rows}, model_name=model.manifest.name)

    predictions = asyncio.run(ask())["predictions"]
    if isinstance(predictions[0], dict):
        answered = {name: np.float32([row[name] for row in predictions]) for name in predictions[0]}
    else:
        answered = by_name(model, np.float32(predictions))
    assert_right(model, inputs, answered)


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_v2_predicts(model: Model, binary: bool, server: Server) -> None:
    inputs = drawn(model, 9)
    name = model.manifest.name
    tensors = [InferInput(each, list(x.shape), DATATYPES[x.dtype.name]) for each, x in inputs.items()]
    for tensor, x in zip(tensors, inputs.values(), strict=True):
        tensor.set_data_from_numpy(x, binary_data=binary)
    request = InferRequest(name, tensors, request_id="7", parameters={"binary_data_output": binary})

    async def ask() -> Any:
        async with kserve("v2") as client:
            return await client.infer(server.url, request, model_name=name)

    answer = asyncio.run(ask())
    assert (answer.id, answer.model_name) == ("7", name)
    assert_right(model, inputs, {output.name: output.as_numpy() for output in answer.outputs})


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_it_sees_that_the_server_lives_and_a_model_is_ready(protocol: str, model: Model, server: Server) -> None:
    async def ask() -> list[bool]:
        async with kserve(protocol) as client:
            answers = [
                await client.is_server_live(server.url),
                await client.is_model_ready(server.url, model.manifest.name),
            ]
            return [*answers, await client.is_server_ready(server.url)] if protocol == "v2" else answers

    assert set(asyncio.run(ask())) == {True}


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_it_sees_that_a_model_is_not_ready(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    server = Server(str(tmp_path))

    async def ask() -> Any:
        async with server.client() as client:
            await server.wait_until_loaded(client)
        async with kserve(protocol) as client:
            return await client.is_model_ready(server.url, "digits")

    try:
        assert asyncio.run(ask()) is False
    finally:
        server.end()


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_it_is_told_what_is_wrong(protocol: str, server: Server) -> None:
    wrong = {"instances": [[1.0]]} if protocol == "v1" else {"inputs": []}

    async def ask() -> None:
        async with kserve(protocol) as client:
            await client.infer(server.url, wrong, model_name="digits_cnn")

    with pytest.raises(Exception, match=r"(?s)Expected input.*'422 Unprocessable"):
        asyncio.run(ask())
