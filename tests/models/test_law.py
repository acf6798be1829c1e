"""The law on the shipped models as today's exporter writes them: 64 clients at a time get `keras_model.predict(x)`.

Their runs hold several requests, each with statistics of its own.
"""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
from e2e.composition import Composition, Question, compose, stuttering
from prometheus_client.parser import text_string_to_metric_families
from support.server import Server

from bln_serve.export import export
from bln_serve.layers import with_statistics
from bln_serve.verification import Tolerance, compare

MODELS = Path(__file__).parents[2] / "models"
CASES = (("digits_rnn", "MMMM"), ("digits_cnn", "PPMM"), ("digits_cnn", "MMMM"))
COUPLED = [case for case in CASES if case[1] != "PPMM"]
M = 25
SIZES = [size for size in range(2, 60) if size % M != 1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("models")
    for name, policy in CASES:
        export(MODELS / f"{name}.keras", repository, name=f"{name}-{policy}", statistics=policy)
    server = Server(str(repository), "--max-run-rows", "100")  # more than one mini-batch, whatever this machine is
    yield server
    server.end()


@pytest.fixture(scope="module")
def requests() -> list[np.ndarray]:
    """Rows of unseen images, other ones in each request."""
    with np.load(MODELS / "digits_samples.npz", allow_pickle=False) as samples:
        images = samples["images"].astype(np.float32)
    rng = np.random.default_rng(6)
    return [images[rng.choice(len(images), size, replace=False)] for size in (*SIZES, *SIZES[:8])]


def keras_model(name: str, policy: str) -> keras.Model:
    return with_statistics(keras.saving.load_model(MODELS / f"{name}.keras"), policy)


async def shared_runs(server: Server, model: str) -> dict[str, float]:
    async with server.client() as client:
        await server.wait_until_ready(client)
        text = (await client.get("/metrics")).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.endswith(("_sum", "_count")) and sample.labels.get("model") == model
    }


def load(server: Server, model: str, requests: list[np.ndarray]) -> tuple[Composition, dict[str, float]]:
    async def body() -> tuple[Composition, dict[str, float]]:
        await shared_runs(server, model)  # wait until it is ready
        async with stuttering(server.process.pid):
            questions = [Question({"image": x}) for x in requests]
            composition = await compose(server.url, "v2-binary", model, questions, rounds=2)
        return composition, await shared_runs(server, model)

    return asyncio.run(body())


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_64_clients_get_what_keras_answers(name: str, policy: str, server: Server, requests: list[np.ndarray]) -> None:
    model = keras_model(name, policy)
    composition, held = load(server, f"{name}-{policy}", requests)
    assert len(requests) == 64
    assert composition.cancelled > 0
    for x, each in zip(requests, composition.answered, strict=True):
        expected = model.predict(x, batch_size=M, verbose=0)
        for answer in (each.alone, *each.together):
            check = compare(f"{len(x)} rows", expected, answer["logits"], Tolerance())
            assert check.passed, check.line()
    assert held["bln_run_requests_sum"] - held["bln_run_requests_count"] > 16
    if policy != "PPMM":
        assert held["bln_run_mini_batches_sum"] > held["bln_run_mini_batches_count"]


@pytest.mark.parametrize(("name", "policy"), COUPLED)
def test_rows_of_two_requests_in_one_mini_batch_would_move_answers_far(
    name: str, policy: str, requests: list[np.ndarray]
) -> None:
    model = keras_model(name, policy)
    for mate, x in pairwise(requests[:16]):
        alone = model.predict(x, batch_size=M, verbose=0)
        merged = model.predict(np.concatenate([mate, x]), batch_size=len(mate) + len(x), verbose=0)[len(mate) :]
        assert np.abs(merged - alone).max() > 100 * Tolerance().limit(alone)
