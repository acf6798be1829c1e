"""Versions and models that come, go, and are mended while the service answers."""

import logging
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.repositories import Repository

from bln_serve.serving import catalog, loading, watching

IMAGES = {"instances": [[[0.0] * 8] * 8] * 2}
POLL_S = 0.02


@pytest.fixture
def watch(models: Repository, start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    """Start a service that looks at the repository all the time."""
    caplog.set_level(logging.INFO)
    return lambda **values: start(**{"paths": [models.path], "repository_poll_s": POLL_S, **values})


def looks(service: Any, count: int = 4) -> None:
    """Let the service look at the repository some times more."""
    real, seen = service.catalog._watch.look, []

    def look(*arguments: Any) -> Any:
        seen.append(arguments)
        return real(*arguments)

    service.catalog._watch.look = look
    service.until(lambda: len(seen) > count)
    service.catalog._watch.look = real


def broken(service: Any) -> dict[tuple[str, int], str]:
    return {(each["name"], each["version"]): each["reason"] for each in service.get("/readyz").json()["broken"]}


def states(service: Any, name: str = "digits") -> dict[str, str]:
    answer = service.get(f"/v1/models/{name}")
    assert answer.status_code == 200, answer.text
    return {each["version"]: each["state"] for each in answer.json()["model_version_status"]}


def test_a_new_version_takes_over_and_is_described_in_the_log(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    assert service.post("/predict", json=IMAGES).json()["version"] == 1
    models.put("digits_rnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    answer = service.post("/predict", json=IMAGES).json()
    assert (answer["version"], answer["statistics"]) == (2, "MMMM")
    assert "serving digits version 2: statistics MMMM" in caplog.text
    assert "runs of digits have at most 25 rows (measured; to keep it: --max-run-rows digits=25)" in caplog.text
    service.until(lambda: "digits version 1 is not served any more" in caplog.text)
    assert service.get("/readyz").json() == {
        "ready": True,
        "models": [{"name": "digits", "version": 2, "queued_rows": 0}],
        "loading": [],
        "broken": [],
    }


def test_a_service_told_not_to_look_does_not(models: Repository, watch: Callable[..., Any]) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch(repository_poll_s=0)
    service.until(service.catalog._looking_after.done)
    assert service.serves() == 1


def test_a_broken_new_version_is_reported_once_and_the_old_one_stays(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    models.put_damaged("digits_cnn", "digits/2")
    service.until(lambda: bool(service.catalog.readiness().broken))
    looks(service)
    assert "model.onnx with SHA-256" in broken(service)["digits", 2]
    assert caplog.text.count("error:") == 1
    assert service.get("/readyz").status_code == 200
    assert service.post("/predict", json=IMAGES).json()["version"] == 1
    assert states(service) == {"1": "AVAILABLE", "2": "END"}
    (ended,) = service.get("/v1/models/digits/versions/2").json()["model_version_status"]
    assert ended["status"]["error_code"] == "UNKNOWN"
    assert "model.onnx with SHA-256" in ended["status"]["error_message"]
    assert service.get("/v1/models/digits/versions/3").status_code == 404
    models.take_away("digits/2")
    service.until(lambda: not service.catalog.readiness().broken)
    assert states(service) == {"1": "AVAILABLE"}


@pytest.mark.parametrize("file", ["model.onnx", "manifest.json", "samples.npz"])
def test_a_broken_version_is_tried_again_when_its_files_have_changed(
    file: str, models: Repository, watch: Callable[..., Any]
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    folder = models.put_damaged("digits_rnn", "digits/2", file)
    service.until(lambda: bool(service.catalog.readiness().broken))
    models.mend("digits_rnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    assert broken(service) == {}
    assert folder.is_dir()


def test_a_version_copied_by_hand_is_left_alone_until_it_changes_no_more(
    models: Repository, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is there first, and the model grows from look to look."""
    models.put("digits_cnn", "digits/1")
    folder = models.put("digits_rnn", "digits/2").rename(models.path.with_name("coming"))
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(b"")
    tried: list[int] = []
    real = loading.load_verified

    def count(version: Any, threads: Any) -> Any:
        tried.append(version.version)
        return real(version, threads)

    monkeypatch.setattr(loading, "load_verified", count)
    service = watch()
    folder.rename(models.path / "digits/2")
    service.until(lambda: bool(service.catalog.readiness().broken))
    before, grown = tried.count(2), []
    look = service.catalog._watch.look

    def look_and_grow(known: Any) -> Any:
        if len(grown) < 10:
            grown.append(len(grown))
            with (models.path / "digits/2/model.onnx").open("ab") as file:
                file.write(content[len(content) * (len(grown) - 1) // 10 : len(content) * len(grown) // 10])
        return look(known)

    service.catalog._watch.look = look_and_grow
    service.until(lambda: service.serves() == 2)
    assert tried.count(2) - before == 1, "tried once, when it was whole"


def test_a_version_that_fails_for_the_same_reason_again_is_not_reported_again(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    (models.path / "digits/2").mkdir()
    service.until(lambda: bool(service.catalog.readiness().broken))
    assert "Expected an exported version with a manifest.json" in broken(service)["digits", 2]
    (models.path / "digits/2/half").write_bytes(b"x")
    tried = [service.catalog._known.tried[0].stamp]
    service.until(lambda: service.catalog._known.tried[0].stamp not in tried)
    assert caplog.text.count("error:") == 1


def test_a_version_taken_away_gives_way_to_the_one_before_it(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The way back from a version whose answers are bad."""
    for version in (1, 2, 3):
        models.put("digits_cnn" if version == 1 else "digits_rnn", f"digits/{version}")
    service = watch()
    assert service.serves() == 3
    shutil.rmtree(models.path / "digits/2")
    models.put_damaged("digits_cnn", "digits/2")
    models.take_away("digits/3")
    service.until(lambda: service.serves() == 1)
    assert list(broken(service)) == [("digits", 2)]
    assert service.get("/readyz").status_code == 200
    assert service.post("/predict", json=IMAGES).json()["version"] == 1
    assert "serving digits version 1" in caplog.text


def test_a_model_comes_and_goes(models: Repository, watch: Callable[..., Any]) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    ask = "/models/other/predict"
    assert service.post(ask, json=IMAGES).status_code == 404
    models.put("digits_rnn", "other/1")
    service.until(lambda: service.serves("other") == 1)
    assert service.post(ask, json=IMAGES).status_code == 200
    assert service.get("/v2/models/other/ready").status_code == 200
    models.take_away("other")
    service.until(lambda: service.serves("other") is None)
    assert service.post(ask, json=IMAGES).status_code == 404
    assert service.get("/v1/models/other").status_code == 404
    assert service.get("/readyz").status_code == 200


def test_the_last_model_goes_and_comes_back(models: Repository, watch: Callable[..., Any]) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    models.take_away("digits")
    service.until(lambda: service.serves() is None)
    assert service.get("/readyz").status_code == 503
    refused = service.post("/models/digits/predict", json=IMAGES)
    assert refused.status_code == 404
    assert "the name of a model that is here: none. Received: 'digits'" in refused.json()["error"]
    models.put("digits_cnn", "digits/1")
    service.until(lambda: service.serves() == 1)
    assert service.post("/predict", json=IMAGES).status_code == 200


def test_a_new_model_does_not_take_predict_away_from_the_only_one(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    models.put("digits_rnn", "other/1")
    service.until(lambda: service.serves("other") == 1)
    assert service.post("/predict", json=IMAGES).json()["model"] == "digits"
    assert "note: /predict goes on to ask digits" in caplog.text
    models.take_away("digits")
    service.until(lambda: service.serves() is None)
    assert service.post("/predict", json=IMAGES).json()["model"] == "other"


def test_a_pinned_version_taken_away_leaves_the_model_known_and_not_ready(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    models.put("digits_cnn", "digits/2")
    models.put("digits_rnn", "other/1")
    service = watch(model={"digits": 2})
    models.take_away("digits/2")
    service.until(lambda: service.serves() is None)
    looks(service)
    assert service.get("/readyz").status_code == 503
    assert service.get("/v2/models/digits/ready").json() == {"name": "digits", "ready": False}
    refused = service.post("/models/digits/predict", json=IMAGES)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert service.post("/models/other/predict", json=IMAGES).status_code == 200
    assert "which is pinned. Received: none, since it was taken away" in broken(service)["digits", 2]
    assert states(service) == {"2": "END"}
    assert caplog.text.count("error:") == 1
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    assert service.get("/readyz").status_code == 200


def test_a_pin_keeps_newer_versions_out(models: Repository, watch: Callable[..., Any]) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch(model={"digits": 1})
    models.put("digits_cnn", "digits/2")
    looks(service)
    assert service.serves() == 1
    assert states(service) == {"1": "AVAILABLE"}


@pytest.mark.parametrize("trouble", ["away", "refused"])
def test_a_repository_that_cannot_be_listed_for_a_while_keeps_what_is_served(
    trouble: str,
    models: Repository,
    watch: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    moved = models.path.with_name("moved")
    if trouble == "away":
        models.path.rename(moved)
    else:

        def refuse(_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(watching.Place, "versions", refuse)
    service.until(lambda: "cannot be listed, and is taken to be as it was" in caplog.text)
    looks(service)
    assert caplog.text.count("cannot be listed") == 1
    assert service.get("/readyz").status_code == 200
    assert service.post("/predict", json=IMAGES).status_code == 200
    if trouble == "away":
        moved.rename(models.path)
    monkeypatch.undo()
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    assert "can be listed again" in caplog.text


def test_a_version_that_appears_at_a_second_path_is_reported_and_changes_nothing(
    models: Repository,
    golden_artifacts: Any,
    tmp_path: Any,
    watch: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    models.put("digits_cnn", "digits/1")
    second = Repository(golden_artifacts, tmp_path / "second")
    second.put("digits_rnn", "other/1")
    service = watch(paths=[models.path, second.path])
    second.put("digits_cnn", "digits/1")
    service.until(lambda: "the models are taken to be as they were" in caplog.text)
    looks(service)
    assert caplog.text.count("each version of a model at one path") == 1
    assert service.post("/models/digits/predict", json=IMAGES).status_code == 200
    second.take_away("digits")
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.serves() == 2)


def test_what_nobody_thought_of_does_not_end_the_looking(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()

    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(service.catalog._watch, "look", fail)
    service.until(lambda: "the models could not be looked after" in caplog.text)
    assert service.post("/predict", json=IMAGES).status_code == 200
    monkeypatch.undo()
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.serves() == 2)


def test_the_metrics_tell_of_the_version_that_is_served_alone(models: Repository, watch: Callable[..., Any]) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    service.post("/predict", json=IMAGES)
    models.put("digits_rnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    text = service.get("/metrics").text
    for gauge in ("bln_model_info", "bln_queued_rows"):
        lines = [line for line in text.splitlines() if line.startswith(f"{gauge}{{")]
        assert [('version="2"' in line, 'model="digits"' in line) for line in lines] == [(True, True)]
    assert 'bln_run_rows_sum{model="digits",version="1"} 2.0' in text, "what was counted stays"
    models.take_away("digits/2")
    service.until(lambda: service.serves() == 1)
    assert 'bln_queued_rows{model="digits",version="1"} 0.0' in service.get("/metrics").text
    service.post("/predict", json=IMAGES)
    assert 'bln_run_rows_sum{model="digits",version="1"} 4.0' in service.get("/metrics").text


def test_settings_hold_for_what_is_loaded_later(
    models: Repository, watch: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch(deterministic=True, max_run_rows="8")
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.serves() == 2)
    (served,) = service.catalog.readiness().served
    assert (served.shared, served.max_run_rows) == (False, 8)
    assert caplog.text.count("runs of digits have at most 8 rows (as set") == 2


def test_a_version_being_loaded_says_so_and_the_one_before_answers(
    models: Repository, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    go_on, real = held(monkeypatch)
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.catalog._trying is not None)
    assert states(service) == {"1": "AVAILABLE", "2": "LOADING"}
    assert service.get("/readyz").json()["ready"]
    assert service.post("/predict", json=IMAGES).json()["version"] == 1
    models.put("digits_cnn", "new/1")
    go_on.set()
    service.until(lambda: service.serves("new") == 1)
    assert states(service) == {"2": "AVAILABLE"}
    assert real is loading.load


def test_the_first_loading_says_what_loads_and_what_comes_after(
    models: Repository, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.put("digits_cnn", "a/1")
    models.put("digits_cnn", "b/1")
    models.put("digits_cnn", "b/2")
    go_on, _ = held(monkeypatch)
    service = watch(loaded=False)
    service.until(lambda: service.catalog._trying is not None)
    assert (states(service, "a"), states(service, "b")) == ({"1": "LOADING"}, {"2": "START"})
    assert service.get("/v2/models/a/ready").status_code == 400
    assert service.get("/readyz").json()["loading"] == ["a", "b"]
    go_on.set()
    service.wait_until_loaded()
    assert service.get("/readyz").status_code == 200


def held(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Hold every loading until the returned event is set."""
    go_on, real = threading.Event(), loading.load

    def wait(*arguments: Any, **more: Any) -> Any:
        assert go_on.wait(30)
        return real(*arguments, **more)

    monkeypatch.setattr(catalog, "load", wait)
    return go_on, real
