"""The law on real models: what the service answers is what `keras_model.predict(x, batch_size=m)` answers.

Both shipped models are exported under policies of every row coupling, on the statistics their training estimated, and
served by a real server.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import keras
import numpy as np
import pytest
from support.server import Server

from bln_serve.export import export
from bln_serve.layers import bln_layers
from bln_serve.statistics import StatisticsPolicy
from bln_serve.verification import Tolerance, compare

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("digits_cnn", "digits_rnn")
POLICIES = ("PPMM", "MMMM", "PPPP", "MPMM")
NPY = {"content-type": "application/x-npy", "accept": "application/x-npy"}


def served_as(name: str, policy: str) -> str:
    return f"{name}-{policy}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("models")
    for name in NAMES:
        for policy in POLICIES:
            export(MODELS / f"{name}.keras", repository, name=served_as(name, policy), statistics=policy)
    server = Server(str(repository))
    server.until_ready()
    yield server
    server.end()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(MODELS / "digits_samples.npz", allow_pickle=False) as samples:
        return samples["images"].astype(np.float32)


def keras_answers(name: str, policy: str, x: np.ndarray) -> np.ndarray:
    model = keras.saving.load_model(MODELS / f"{name}.keras")
    for layer in bln_layers(model):
        layer.policy = StatisticsPolicy.from_code(policy)
    return model.predict(x, batch_size=25, verbose=0)


def ask(server: Server, model: str, x: np.ndarray) -> np.ndarray:
    body = io.BytesIO()
    np.save(body, x)
    answer = httpx.post(f"{server.url}/models/{model}/predict", content=body.getvalue(), headers=NPY, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_unseen_image_is_answered_as_keras_answers_it(name: str, policy: str, server: Server, images) -> None:
    expected = keras_answers(name, policy, images)
    actual = ask(server, served_as(name, policy), images)
    assert compare(name, expected, actual, Tolerance()).passed
    assert (expected.argmax(axis=1) == actual.argmax(axis=1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_policies_answer_differently_so_that_a_mix_up_would_show(name: str, images) -> None:
    answers = {policy: keras_answers(name, policy, images[:50]) for policy in POLICIES}
    for policy in POLICIES[1:]:
        assert not compare(policy, answers["PPMM"], answers[policy], Tolerance(rtol=1e-3)).passed
