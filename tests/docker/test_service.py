"""The serving image under the restrictions it is promised to run under: a real container, its published port, Keras."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import keras
import numpy as np
import pytest
from support.artifacts import alter_weights
from support.container import RESTRICTED, Container, running_service
from support.engine import ROOT, Engine, wait_until
from support.held import Runs, variables

from bln_serve.layers import bln_layers
from bln_serve.verification import Tolerance, compare

pytestmark = pytest.mark.docker

HEALTH_S = 60
MODELS = ("digits_cnn", "digits_rnn")


@pytest.fixture(scope="module")
def service(engine: Engine, serve_image: str, models: Path) -> Iterator[Container]:
    with running_service(engine, serve_image, models) as container:
        container.wait_until_loaded()
        yield container


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(ROOT / "models" / "digits_samples.npz", allow_pickle=False) as samples:
        return samples["images"].astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_it_answers_as_keras_does(service: Container, images: np.ndarray, name: str) -> None:
    model = keras.saving.load_model(ROOT / "models" / f"{name}.keras")
    assert bln_layers(model)
    expected = model.predict(images, batch_size=25, verbose=0)
    assert compare(name, expected, service.predict(name, images), Tolerance()).passed


def test_answers_of_one_model_are_not_the_other_s(service: Container, images: np.ndarray) -> None:
    cnn, rnn = (service.predict(name, images) for name in MODELS)
    assert not compare("", cnn, rnn, Tolerance(rtol=1e-2)).passed


def test_it_turns_healthy(engine: Engine, serve_image: str, models: Path) -> None:
    # Late enough that it is seen before.
    late = ("--health-interval", "15s")
    with running_service(engine, serve_image, models, options=(*RESTRICTED, *late)) as container:
        assert container.health() == "starting"
        wait_until(lambda: container.health() == "healthy", HEALTH_S)
        log = container.inspect()["State"]["Health"]["Log"]
        assert '"ready":true' in log[-1]["Output"]


def test_the_restrictions_hold(service: Container) -> None:
    assert service.python("import os; print(os.getuid(), os.getgid())") == "10001 10001"
    writable = (
        "import tempfile\n"
        "for folder in ('/', '/opt', '/models', '/home', '/var/tmp', '/tmp'):\n"
        "    try:\n"
        "        tempfile.TemporaryFile(dir=folder)\n"
        "        print(folder)\n"
        "    except OSError: pass\n"
    )
    assert service.python(writable) == "/tmp"
    status = service.python("print(open('/proc/1/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert service.inspect()["HostConfig"]["Memory"] == 512 * 1024 * 1024
    assert not service.inspect()["State"]["OOMKilled"]


def test_the_image_verifies_artifacts(engine: Engine, serve_image: str, models: Path) -> None:
    mount = f"type=bind,source={models},target=/models,readonly"
    verify = ("docker", "run", "--rm", *RESTRICTED, "--mount", mount, "--entrypoint", "bln-verify", serve_image)
    assert engine.run(*verify, "/models/digits_rnn/1").returncode == 0
    assert engine.run(*verify, "/models/digits_rnn/2").returncode != 0  # there is none


def test_no_training_framework_is_in_the_process(service: Container) -> None:
    maps = service.python("print(open('/proc/1/maps').read())")
    assert "onnxruntime" in maps
    assert "tensorflow" not in maps


@pytest.mark.parametrize(("cpus", "expected"), [("1", 1), ("1.5", 1), ("2", 2)])
def test_threads_follow_the_quota(engine: Engine, serve_image: str, models: Path, cpus: str, expected: int) -> None:
    if int(engine.docker("info", "--format", "{{.NCPU}}")) < expected:
        pytest.skip(f"the engine's machine has fewer than {expected} processors")
    still = ("--repository-poll-s", "0")  # which would be one thread more, now and then
    with running_service(engine, serve_image, models, *still, options=("--cpus", cpus)) as container:
        container.wait_until_loaded()
        said = next(line for line in container.logs().splitlines() if line.startswith("threads of a run: "))
        assert said.startswith(f"threads of a run: {expected}, ")
        # Each model has a pool of its own; the threads beside those are the same for one and for two.
        threads = len(container.python("import os; print(*os.listdir('/proc/1/task'))").split())
    with running_service(engine, serve_image, models, *still, "--threads", "1", options=()) as container:
        container.wait_until_loaded()
        alone = len(container.python("import os; print(*os.listdir('/proc/1/task'))").split())
    assert threads - alone == len(MODELS) * (expected - 1)


def test_affinity_counts_too(engine: Engine, serve_image: str, models: Path) -> None:
    with running_service(engine, serve_image, models, options=("--cpuset-cpus", "0")) as container:
        container.wait_until_loaded()
        assert "threads of a run: 1, for 1 processor" in container.logs()


def test_a_broken_version_beside_a_good_one_is_passed_over(
    engine: Engine, serve_image: str, models: Path, images: np.ndarray, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(models, tmp_path / "models"))
    repository.chmod(0o755)
    shutil.copytree(repository / "digits_cnn" / "1", repository / "digits_cnn" / "2")
    alter_weights(repository / "digits_cnn" / "2")
    with running_service(engine, serve_image, repository) as container:
        found = container.wait_until_loaded()
        assert found["ready"]
        assert {(each["name"], each["version"]) for each in found["models"]} == {(name, 1) for name in MODELS}
        (broken,) = found["broken"]
        assert (broken["name"], broken["version"]) == ("digits_cnn", 2)
        assert "model.onnx" in broken["reason"]
        assert len(container.predict("digits_cnn", images[:3])) == 3
        wait_until(lambda: container.health() == "healthy", HEALTH_S)


def test_where_nothing_passes_it_stays_up_and_says_why(
    engine: Engine, serve_image: str, models: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(models / "digits_cnn", tmp_path / "digits_cnn"))
    alter_weights(broken / "1")
    with running_service(engine, serve_image, broken) as container:
        found = container.wait_until_loaded()
        assert not found["ready"]
        assert found["models"] == []
        assert httpx.get(f"{container.url}/healthz", timeout=HEALTH_S).status_code == 200
        answer = container.readyz()
        assert answer is not None
        assert answer.status_code == 503
        assert container.health() != "healthy"


@pytest.mark.parametrize(
    ("mode", "said"), [(0o755, "Received: a folder without any exported version"), (0o700, "chmod -R a+rX /models")]
)
def test_a_folder_without_models_ends_with_a_sentence(
    engine: Engine, serve_image: str, tmp_path: Path, mode: int, said: str
) -> None:
    tmp_path.chmod(mode)
    mount = f"type=bind,source={tmp_path},target=/models,readonly"
    result = engine.run("docker", "run", "--rm", *RESTRICTED, "--mount", mount, serve_image)
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_stopping_under_load_loses_nothing(
    engine: Engine, serve_image: str, models: Path, images: np.ndarray, tmp_path: Path
) -> None:
    """`docker stop` while requests wait: each that was accepted is answered in full, and rightly."""
    clients, rows = 12, 600
    rng = np.random.default_rng(0)
    bodies = [images[rng.integers(0, len(images), rows)] for _ in range(clients)]
    tmp_path.chmod(0o755)
    runs, there = Runs(tmp_path), Path("/held")
    held = ["--mount", f"type=bind,source={tmp_path},target={there},readonly"]
    for name, value in variables(there).items():
        held += ["--env", f"{name}={value}"]
    with (
        running_service(engine, serve_image, models, options=(*RESTRICTED, *held)) as container,
        ThreadPoolExecutor(clients + 1) as pool,
    ):
        container.wait_until_loaded()
        expected = [container.predict("digits_rnn", body, mini_batch_rows=2) for body in bodies]
        with runs.held():
            answers = [pool.submit(container.predict, "digits_rnn", body, mini_batch_rows=2) for body in bodies]
            wait_until(lambda: queued_rows(container) == clients * rows, HEALTH_S, every_s=0.01)
            stop = pool.submit(engine.docker, "stop", container.id)
            wait_until(lambda: container.readyz() is None, HEALTH_S, every_s=0.01)  # it takes no connections any more
            assert not any(answer.done() for answer in answers)
        for answer, expectation in zip(answers, expected, strict=True):
            assert compare("", expectation, answer.result(), Tolerance()).passed
        stop.result()
        state = container.inspect()["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


def queued_rows(container: Container) -> int:
    answer = container.readyz()
    return sum(model["queued_rows"] for model in answer.json()["models"]) if answer else 0
