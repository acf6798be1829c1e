import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.errors import RunError
from bln_serve.serving.served_model import ServedModel
from bln_serve.verification import Tolerance, compare

NPY = {"content-type": "application/x-npy"}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def rows_for(artifacts: Path, name: str, rows: int, seed: int = 0) -> np.ndarray:
    """Return rows for the single input of a golden model."""
    (spec,) = Artifact.open(artifacts / name / "1").manifest.signature.inputs
    return np.random.default_rng(seed).normal(size=(rows, *spec.shape[1:])).astype(spec.dtype)


def close_to(expected: np.ndarray, answer: Any) -> bool:
    return compare("", expected, np.asarray(answer, expected.dtype), Tolerance()).passed


@pytest.mark.parametrize("name", ["digits_cnn", "digits_rnn", "tiny_mpmm", "tiny_pppp"])
def test_every_sample_of_an_artifact_is_answered_as_keras_did(service: Any, golden_artifacts: Path, name: str) -> None:
    artifact = Artifact.open(golden_artifacts / name / "1")
    for sample in artifact.samples():
        rows = {} if sample.mini_batch_rows is None else {"mini_batch_rows": sample.mini_batch_rows}
        body = {"inputs": {key: array.tolist() for key, array in sample.inputs.items()}, **rows}
        answer = service.post(f"/models/{name}/predict", json=body)
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert (document["model"], document["version"]) == (name, 1)
        assert document["statistics"] == artifact.manifest.statistics
        assert (document["mini_batches"] is None) == (artifact.manifest.rule is None)
        (expected,) = sample.outputs.values()
        assert close_to(expected, document["predictions"])


def test_the_ways_to_send_rows_and_to_get_answers_agree(service: Any, golden_artifacts: Path) -> None:
    x = rows_for(golden_artifacts, "digits_rnn", 57)
    url = "/models/digits_rnn/versions/1/predict"
    expected = bln_serve.load(golden_artifacts / "digits_rnn" / "1").predict(x)
    by_json = service.post(url, json={"instances": x.tolist()})
    by_npy = service.post(url, content=npy(x), headers={**NPY, "accept": "application/json;q=0.5, application/x-npy"})
    assert by_json.json()["mini_batches"] == "25x2,7"
    assert by_npy.headers["content-type"] == "application/x-npy"
    assert {key: value for key, value in by_npy.headers.items() if key.startswith("bln-")} == {
        "bln-model": "digits_rnn",
        "bln-version": "1",
        "bln-statistics": "MMMM",
        "bln-mini-batches": "25x2,7",
    }
    np.testing.assert_array_equal(np.load(io.BytesIO(by_npy.content)), expected)
    np.testing.assert_array_equal(np.asarray(by_json.json()["predictions"], np.float32), expected)


def test_several_inputs_and_outputs(service: Any, golden_artifacts: Path) -> None:
    artifact = Artifact.open(golden_artifacts / "tiny_two_inputs" / "1")
    sample = artifact.samples()[0]
    url = "/models/tiny_two_inputs/predict"
    by_input = {name: array.tolist() for name, array in sample.inputs.items()}
    count = len(next(iter(by_input.values())))
    instances = [{name: rows[index] for name, rows in by_input.items()} for index in range(count)]
    for body in ({"inputs": by_input}, {"instances": instances}):
        predictions = service.post(url, json=body).json()["predictions"]
        assert predictions.keys() == sample.outputs.keys()
        for name, expected in sample.outputs.items():
            assert close_to(expected, predictions[name])
    refused = service.post(url, json={"inputs": by_input}, headers={"accept": "application/x-npy"})
    assert refused.status_code == 400
    assert "the model has several outputs" in refused.json()["error"]
    unnamed = service.post(url, json={"inputs": [[1.0]]})
    assert unnamed.status_code == 422
    assert "Received: one array without a name" in unnamed.json()["error"]


def test_mini_batch_rows_in_the_url_and_in_the_body(service: Any, golden_artifacts: Path) -> None:
    x = rows_for(golden_artifacts, "digits_rnn", 12)
    model = bln_serve.load(golden_artifacts / "digits_rnn" / "1")
    body = {"instances": x.tolist()}
    url = "/models/digits_rnn/predict"
    in_url = service.post(f"{url}?mini_batch_rows=4", json=body).json()
    in_body = service.post(url, json={**body, "mini_batch_rows": 4}).json()
    both = service.post(f"{url}?mini_batch_rows=4", json={**body, "mini_batch_rows": 4}).json()
    assert in_url == in_body == both
    assert in_url["mini_batches"] == "4x3"
    assert close_to(np.asarray(model.predict(x, 4)), in_url["predictions"])
    assert not close_to(np.asarray(model.predict(x, 0)), in_url["predictions"])
    whole = service.post(f"{url}?mini_batch_rows=0", content=npy(x), headers=NPY).json()
    assert whole["mini_batches"] == "12"
    assert close_to(np.asarray(model.predict(x, 0)), whole["predictions"])


def test_independent_rows_ignore_mini_batch_rows(service: Any, golden_artifacts: Path) -> None:
    x = rows_for(golden_artifacts, "digits_cnn", 26)
    answer = service.post("/models/digits_cnn/predict?mini_batch_rows=25", json={"instances": x.tolist()})
    assert answer.json()["mini_batches"] is None
    single = service.post("/models/digits_cnn/predict", json={"instances": x[:1].tolist()}).json()["predictions"]
    assert close_to(np.asarray(answer.json()["predictions"])[:1], single)


IMAGE = [[0.0] * 8] * 8


@pytest.mark.parametrize(
    ("url", "sent", "status", "sentence"),
    [
        ("digits_cnn", {"content": b"{"}, 400, "Expected a JSON object"),
        ("digits_cnn", {"content": b""}, 400, "Received: 0 bytes"),
        ("digits_cnn", {"json": {"instances": [IMAGE], "mini_batch_row": 3}}, 400, "Received: .'mini_batch_row'."),
        ("digits_cnn?mini_batch_row=3", {"json": {"instances": [IMAGE]}}, 400, "URL parameter than mini_batch_rows"),
        ("digits_cnn?mini_batch_rows=3&mini_batch_rows=4", {"json": {"instances": [IMAGE]}}, 400, "once in the URL"),
        ("digits_cnn?mini_batch_rows=-1", {"json": {"instances": [IMAGE]}}, 422, "a whole number: 0 .* Received: '-1'"),
        ("digits_cnn?mini_batch_rows=²", {"json": {"instances": [IMAGE]}}, 422, "a whole number"),
        (
            "digits_rnn?mini_batch_rows=2",
            {"json": {"instances": [IMAGE] * 4, "mini_batch_rows": 4}},
            400,
            "Received: 2 in the URL and 4 in the body",
        ),
        ("digits_cnn", {"content": b"abc", "headers": NPY}, 400, "Expected an .npy body"),
        (
            "digits_cnn",
            {"content": b"x", "headers": {"content-type": "text/csv"}},
            415,
            "Content-Type: application/json",
        ),
        ("digits_cnn", {"content": b"x", "headers": {"content-type": ""}}, 415, "Received: none"),
        (
            "digits_cnn",
            {"json": {"instances": [IMAGE[:7]]}},
            422,
            r"float32 \(rows, 8, 8\). Received: shape \(1, 7, 8\)",
        ),
        ("digits_cnn", {"json": {"inputs": {"nope": [IMAGE]}}}, 422, "Expected inputs: .* Received: 'nope'"),
        ("digits_cnn", {"json": {"instances": []}}, 422, "at least one row"),
        ("digits_cnn", {"json": {"instances": [[["a"] * 8] * 8]}}, 422, "Received: text"),
        ("digits_cnn", {"json": {"instances": [[[True] * 8] * 8]}}, 422, "Received: booleans"),
        ("digits_cnn", {"json": {"instances": [[[1e300] * 8] * 8]}}, 422, "which float32 cannot hold"),
        (
            "digits_cnn",
            {"content": npy(np.full((1, 8, 8), np.nan)), "headers": NPY},
            422,
            "Every number must be finite",
        ),
        (
            "digits_cnn",
            {"content": npy(np.full((1, 8, 8), np.inf)), "headers": NPY},
            422,
            "Every number must be finite",
        ),
        ("digits_cnn", {"content": npy(np.zeros((0, 8, 8))), "headers": NPY}, 422, "no rows"),
        ("digits_rnn", {"json": {"instances": [IMAGE]}}, 422, "at least 2 rows .* To be answered"),
        ("digits_rnn", {"json": {"instances": [IMAGE] * 26}}, 422, "26 rows, which in mini-batches of 25 leave 1"),
        ("tiny_pppp?mini_batch_rows=0", {"json": {"instances": [[[0.0] * 4] * 6] * 5}}, 422, "at most 4 rows"),
        ("nope", {"json": {"instances": [IMAGE]}}, 404, "/models/digits_cnn/predict.* Received: 'nope'"),
    ],
)
def test_a_wrong_request_is_refused_with_a_sentence(
    service: Any, url: str, sent: dict[str, Any], status: int, sentence: str
) -> None:
    name, _, query = url.partition("?")
    if "json" not in sent:
        sent = {"headers": {"content-type": "application/json"}, **sent}
    answer = service.post(f"/models/{name}/predict" + (f"?{query}" if query else ""), **sent)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert re.search(sentence, answer.json()["error"]), answer.text


def test_values_outside_an_index_range_are_refused(service: Any, golden_artifacts: Path) -> None:
    artifact = Artifact.open(golden_artifacts / "tiny_two_inputs" / "1")
    inputs = {name: array.tolist() for name, array in artifact.samples()[0].inputs.items()}
    (indices,) = [spec for spec in artifact.manifest.signature.inputs if spec.dtype.startswith("int")]
    inputs[indices.name] = np.full_like(artifact.samples()[0].inputs[indices.name], 10_000).tolist()
    answer = service.post("/models/tiny_two_inputs/predict", json={"inputs": inputs})
    assert answer.status_code == 422
    assert f"Expected input '{indices.name}'" in answer.json()["error"]
    assert "Every value must be from" in answer.json()["error"]


def test_a_body_beyond_the_limit(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    service = start(paths=[repository("digits_cnn")], max_body_bytes=1000)
    json = {"content-type": "application/json"}

    async def chunks() -> Any:
        for _ in range(3):
            yield b" " * 600
        pytest.fail("read on after the limit was passed")

    for content, received in ((b" " * 1001, "1001 bytes"), (chunks(), "at least 1200 bytes")):
        answer = service.post("/predict", content=content, headers=json)
        assert answer.status_code == 413
        assert f"at most 1000 bytes. Received: {received}" in answer.json()["error"]


def test_more_rows_than_the_queue_can_hold(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    service = start(paths=[repository("digits_cnn")], max_queued_rows=3)
    answer = service.post("/predict", json={"instances": [IMAGE] * 4})
    assert answer.status_code == 413
    assert "at most 3 rows a request. Received: 4" in answer.json()["error"]
    assert service.post("/predict", json={"instances": [IMAGE] * 3}).status_code == 200


def test_more_bytes_than_the_queue_can_hold(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    """A row of 8 x 8 float32 has 256 bytes, however it is sent."""
    service = start(paths=[repository("digits_cnn")], max_queued_bytes=4 * 256 - 1)
    answer = service.post("/predict", json={"instances": [IMAGE] * 4})
    assert answer.status_code == 413
    assert "at most 3 rows a request. Received: 4" in answer.json()["error"]
    assert "a larger --max-queued-bytes" in answer.json()["error"]
    assert service.post("/predict", json={"instances": [IMAGE] * 3}).status_code == 200


def test_a_key_that_stands_there_twice(service: Any) -> None:
    body = b'{"instances": [[[0, 0], [0, 0]]], "instances": [[[1, 1], [1, 1]]]}'
    for route in ("/models/digits_cnn/predict", "/v1/models/digits_cnn:predict"):
        answer = service.post(route, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert "Received: ['instances'] twice." in answer.json()["error"]
    twice = b'{"inputs": [], "id": "a", "id": "b"}'
    assert "['id'] twice" in service.post("/v2/models/digits_cnn/infer", content=twice).json()["error"]


def test_a_route_or_method_that_is_not_there(service: Any) -> None:
    nowhere = service.get("/v9/nothing")
    assert nowhere.status_code == 404
    assert nowhere.json()["error"] == (
        "Expected a route of this service; /openapi.json lists them. Received: GET /v9/nothing."
    )
    wrong = service.get("/predict")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"] == "Expected POST. Received: GET /predict."


def test_fastapi_s_own_validation_has_the_same_body(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    service = start(paths=[repository("digits_cnn")])
    service.app.add_api_route("/number/{value}", _takes_a_number)
    answer = service.get("/number/x")
    assert answer.status_code == 422
    assert "Received: path.value" in answer.json()["error"]


def _takes_a_number(value: int) -> int:
    return value


@pytest.mark.parametrize("error", [RunError("secret: /models/x"), ZeroDivisionError("secret")])
def test_what_goes_wrong_inside_is_logged_and_not_told(
    error: Exception,
    repository: Callable[..., Path],
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = start(paths=[repository("digits_cnn")])

    async def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "answer", fail)
        answer = service.post("/predict", json={"instances": [IMAGE]})
    assert answer.status_code == 500
    assert answer.json()["error"].startswith("Expected to be able to answer. Received: an error inside the service")
    assert "secret" not in answer.text
    assert "secret" in caplog.text
    assert service.post("/predict", json={"instances": [IMAGE]}).status_code == 200


def test_an_answer_that_json_cannot_say(
    repository: Callable[..., Path], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start(paths=[repository("digits_cnn")])

    async def overflow(*_: Any) -> dict[str, np.ndarray]:
        return {"y": np.array([[0.0], [np.inf]], np.float32)}

    monkeypatch.setattr(ServedModel, "answer", overflow)
    answer = service.post("/predict", json={"instances": [IMAGE] * 2})
    assert answer.status_code == 422
    assert "in 1 of 2 rows, at index 1" in answer.json()["error"]
    as_npy = service.post("/predict", json={"instances": [IMAGE] * 2}, headers={"accept": "application/x-npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(as_npy.content)), [[0.0], [np.inf]])


def test_the_default_model(service: Any, repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    body = {"instances": [IMAGE] * 2}
    several = service.post("/predict", json=body)
    assert several.status_code == 404
    assert "Expected the URL to name one of several models: /models/digits_cnn/predict" in several.json()["error"]
    two = repository("digits_cnn", "digits_rnn")
    chosen = start(paths=[two], default_model="digits_rnn")
    assert chosen.post("/predict", json=body).json()["model"] == "digits_rnn"
    alone = start(paths=[two / "digits_cnn"])
    assert alone.post("/predict", json=body).json()["model"] == "digits_cnn"


def test_a_version_that_is_not_served(service: Any) -> None:
    for version in ("2", "01", "x"):
        answer = service.post(f"/models/digits_cnn/versions/{version}/predict", json={"instances": [IMAGE]})
        assert answer.status_code == 404
        assert f"Expected version 1 of model 'digits_cnn', the one that is served. Received: '{version}'" in answer.text


def test_metadata_says_what_may_be_sent(service: Any) -> None:
    document = service.get("/models/tiny_pppp").json()
    assert (document["name"], document["version"], document["statistics"]) == ("tiny_pppp", 1, "PPPP")
    assert (document["row_coupling"], document["max_mini_batch_rows"]) == ("positional", 4)
    assert document["inputs"][0]["shape"][0] is None
    assert document["tolerance"] == {"atol": 0.0, "rtol": 1e-5}
    assert service.get("/models/nope").status_code == 404


def test_openapi_describes_bodies_and_answers(service: Any) -> None:
    paths = service.get("/openapi.json").json()["paths"]
    for path in ("/predict", "/models/{name}/predict", "/models/{name}/versions/{version}/predict"):
        post = paths[path]["post"]
        assert set(post["requestBody"]["content"]) == {"application/json", "application/x-npy"}
        assert "mini_batch_rows" in [parameter["name"] for parameter in post["parameters"]]
        for status in ("200", "400", "404", "413", "415", "422", "500", "503"):
            assert status in post["responses"]
    assert {"/healthz", "/readyz", "/models/{name}"} < set(paths)
