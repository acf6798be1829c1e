import dataclasses
import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bln_serve.artifact import Artifact, Sample, hashes, write_samples
from bln_serve.errors import ModelNotFoundError, UsageError
from bln_serve.serving import catalog, loading

IMAGES = {"instances": [[[0.0] * 8] * 8] * 2}


def corrupt(version: Path, file: str = "model.onnx") -> None:
    damaged = bytearray((version / file).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (version / file).write_bytes(damaged)


def test_the_latest_version_is_served(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    service = start(paths=[repository("digits_cnn/9", "digits_cnn/10")])
    assert service.post("/predict", json=IMAGES).json()["version"] == 10


@pytest.mark.parametrize("file", ["model.onnx", "manifest.json", "samples.npz"])
def test_a_broken_latest_version_gives_way_to_the_older_one_and_is_reported(
    file: str, repository: Callable[..., Path], start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models = repository("digits_cnn/1", "digits_cnn/2")
    if file == "manifest.json":
        (models / "digits_cnn/2" / file).write_text("{")
    else:
        corrupt(models / "digits_cnn/2", file)
    service = start(paths=[models])
    ready = service.get("/readyz")
    assert ready.status_code == 200
    (broken,) = ready.json()["broken"]
    assert (broken["name"], broken["version"]) == ("digits_cnn", 2)
    assert "Expected" in broken["reason"]
    assert "digits_cnn version 2 is not served" in caplog.text
    assert service.post("/predict", json=IMAGES).json()["version"] == 1


def test_a_tampered_file_is_never_served(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    models = repository("digits_cnn")
    corrupt(models / "digits_cnn/1")
    service = start(paths=[models])
    ready = service.get("/readyz")
    assert ready.status_code == 503
    assert "SHA-256" in ready.json()["broken"][0]["reason"]
    answer = service.post("/predict", json=IMAGES)
    assert answer.status_code == 503
    assert "to have a version that passes its verification. Received: none" in answer.json()["error"]
    assert service.get("/healthz").status_code == 200


def test_a_model_that_answers_otherwise_than_keras_did_is_not_served(
    repository: Callable[..., Path], start: Callable[..., Any]
) -> None:
    """All hashes are right, and the samples are another model's."""
    models = repository("tiny_mpmm", "tiny_pppp")
    version = models / "tiny_mpmm/1"
    artifact = Artifact.open(version)
    samples = artifact.samples()
    moved = tuple(
        Sample(each.inputs, {name: array * 1.01 for name, array in each.outputs.items()}, each.mini_batch_rows)
        for each in samples
    )
    write_samples(version, moved)
    manifest = dataclasses.replace(artifact.manifest, files=hashes(version))
    (version / "manifest.json").write_bytes(manifest.to_json())
    service = start(paths=[models])
    (broken,) = service.get("/readyz").json()["broken"]
    assert broken["name"] == "tiny_mpmm"
    assert "to answer its samples as Keras did" in broken["reason"]
    assert service.post("/models/tiny_pppp/predict", json={"instances": [[[0.0] * 4] * 6]}).status_code == 200


def test_a_broken_model_does_not_hand_the_default_to_its_neighbour(
    repository: Callable[..., Path], start: Callable[..., Any]
) -> None:
    models = repository("digits_cnn", "digits_rnn")
    corrupt(models / "digits_rnn/1")
    service = start(paths=[models])
    assert service.get("/readyz").status_code == 200
    assert service.post("/predict", json=IMAGES).status_code == 404
    assert service.post("/models/digits_cnn/predict", json=IMAGES).status_code == 200


def test_a_pin_names_the_only_version_allowed(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    models = repository("digits_cnn/1", "digits_cnn/2", "digits_rnn/1")
    service = start(paths=[models], model={"digits_cnn": 1})
    assert service.post("/models/digits_cnn/predict", json=IMAGES).json()["version"] == 1
    corrupt(models / "digits_cnn/1")
    broken = start(paths=[models], model={"digits_cnn": 1})
    assert broken.get("/readyz").status_code == 503
    assert [each["name"] for each in broken.get("/readyz").json()["models"]] == ["digits_rnn"]
    assert broken.post("/models/digits_cnn/predict", json=IMAGES).status_code == 503


def test_while_loading_the_service_is_alive_and_not_ready(
    repository: Callable[..., Path], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any, **more: Any) -> Any:
        go_on.wait()
        return loading.load(*arguments, **more)

    monkeypatch.setattr(catalog, "load", slow)
    service = start(paths=[repository("digits_cnn")], loaded=False)
    try:
        assert service.get("/healthz").status_code == 200
        assert service.get("/readyz").status_code == 503
        assert service.get("/readyz").json()["loading"] == ["digits_cnn"]
        answer = service.post("/predict", json=IMAGES)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "it still loads" in answer.json()["error"]
    finally:
        go_on.set()
    service.wait_until_loaded()
    assert service.get("/readyz").status_code == 200
    assert service.post("/predict", json=IMAGES).status_code == 200


def test_an_error_nobody_thought_of_breaks_one_version_alone(
    repository: Callable[..., Path],
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = loading.load_verified

    def fail_for_two(version: Any, threads: Any) -> Any:
        if version.version == 2:
            raise ZeroDivisionError("unforeseen")
        return real(version, threads)

    monkeypatch.setattr(loading, "load_verified", fail_for_two)
    service = start(paths=[repository("digits_cnn/1", "digits_cnn/2")])
    assert service.post("/predict", json=IMAGES).json()["version"] == 1
    assert service.get("/readyz").json()["broken"][0]["reason"].startswith("ZeroDivisionError while loading")
    assert "unforeseen" in caplog.text


def test_a_file_that_cannot_be_read_is_named(
    repository: Callable[..., Path], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Artifact) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "models/digits_cnn/1/model.onnx")

    monkeypatch.setattr(Artifact, "check_hashes", refuse)
    (broken,) = start(paths=[repository("digits_cnn/1")]).get("/readyz").json()["broken"]
    assert broken["reason"] == "[Errno 13] Permission denied: 'models/digits_cnn/1/model.onnx'"


def test_an_unknown_file_is_reported_and_not_served(
    repository: Callable[..., Path], start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models = repository("digits_cnn")
    (models / "digits_cnn/1/extra.bin").write_bytes(b"x")
    service = start(paths=[models])
    assert service.get("/readyz").status_code == 200
    assert "extra.bin" in caplog.text


def test_a_manifest_without_the_model_s_hash_is_not_served(
    repository: Callable[..., Path], start: Callable[..., Any]
) -> None:
    version = repository("digits_cnn") / "digits_cnn/1"
    manifest = dataclasses.replace(Artifact.open(version).manifest, files={})
    (version / "manifest.json").write_bytes(manifest.to_json())
    service = start(paths=[version.parents[1]])
    assert "to hold the SHA-256 of model.onnx" in service.get("/readyz").json()["broken"][0]["reason"]


def test_one_version_s_folder_and_one_model_s_folder(
    repository: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    models = repository("digits_cnn/1", "digits_cnn/2")
    mounted = shutil.copytree(models / "digits_cnn", tmp_path / "mounted")
    for path in (models / "digits_cnn/2", mounted):
        assert start(paths=[path]).post("/predict", json=IMAGES).json()["model"] == "digits_cnn"


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({"paths": ["nowhere"]}, ModelNotFoundError, "Received: no such folder"),
        ({"model": {"digits_cnn": 7}}, ModelNotFoundError, "version 7 of model 'digits_cnn', which is pinned"),
        ({"model": {"nope": 1}}, ModelNotFoundError, "version 1 of model 'nope'"),
        ({"default_model": "nope"}, ModelNotFoundError, "default model to be one of digits_cnn. Received: 'nope'"),
    ],
)
def test_settings_that_ask_for_what_is_not_there(
    settings: dict[str, Any],
    kind: type[Exception],
    sentence: str,
    repository: Callable[..., Path],
    start: Callable[..., Any],
) -> None:
    with pytest.raises(kind, match=sentence):
        start(**{"paths": [repository("digits_cnn")], **settings})


def test_the_same_version_at_two_paths(repository: Callable[..., Path], start: Callable[..., Any]) -> None:
    models = repository("digits_cnn")
    with pytest.raises(UsageError, match=r"each version of a model at one path\. Received: digits_cnn version 1"):
        start(paths=[models, models / "digits_cnn"])
