"""The law: a request gets the answer it would get alone, whatever is asked at the same time, and runs are shared."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from e2e.composition import (
    PROTOCOLS,
    Answered,
    Arrays,
    Composition,
    ProtocolName,
    Question,
    RefusedError,
    ask,
    compose,
    distance,
    request_of,
    stuttering,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.laws import law
from support.server import Server

import bln_serve
from bln_serve.errors import MiniBatchError
from bln_serve.runtime import Model
from bln_serve.verification import compare

SHARED = ("together_mpmm", "together_pppp", "digits_cnn")
"""Models whose runs may hold several requests."""
COUPLED = ("together_mpmm", "together_pppp")
MODELS = (*SHARED, "digits_rnn")
CLIENTS = 64


@pytest.fixture(scope="module")
def models(golden_artifacts: Path) -> dict[str, Model]:
    return {name: bln_serve.load(golden_artifacts / name / "1") for name in MODELS}


def drawn(model: Model, count: int, seed: int) -> list[Question]:
    """Draw requests of many sizes, cut in many ways."""
    (spec,) = model.manifest.signature.inputs
    rng = np.random.default_rng(seed)
    questions: list[Question] = []
    while len(questions) < count:
        rows = int(rng.integers(1, 40))
        mini_batch_rows = None if rng.random() < 0.3 or not model.manifest.rule else int(rng.choice([0, 1, 2, 3, 4, 7]))
        x = rng.normal(size=(rows, *spec.shape[1:])).astype(np.float32)
        question = Question({spec.name: x}, mini_batch_rows)
        if may_be_cut(model, question):
            questions.append(question)
    return questions


def may_be_cut(model: Model, question: Question) -> bool:
    try:
        model.cut(question.rows, question.mini_batch_rows)
    except MiniBatchError:
        return False
    return True


def is_right(model: Model, question: Question, answer: Arrays) -> bool:
    """Whether an answer is the one that the model gives in this process, where nobody else asks."""
    expected = np.asarray(model.predict(question.inputs, question.mini_batch_rows))
    (actual,) = answer.values()
    return compare("", expected, actual, model.manifest.tolerance).passed


async def runs(server: Server, model: str) -> dict[str, float]:
    """Return the samples of what runs held, by their names without bln_run_."""
    async with server.client() as client:
        text = (await client.get("/metrics")).text
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("bln_run_") and sample.labels.get("model") == model:
                bucket = f" {sample.labels['le']}" if "le" in sample.labels else ""
                samples[sample.name.removeprefix("bln_run_") + bucket] = sample.value
    return samples


def load(
    server: Server, model: str, questions: Sequence[Question], protocol: ProtocolName = "v2-binary", **more: Any
) -> tuple[Composition, dict[str, float]]:
    """Ask each alone and then all at the same time; return what came out, and what runs held beside what was alone."""

    async def body() -> tuple[Composition, dict[str, float]]:
        async with server.client() as client:
            await server.wait_until_ready(client)
        before = await runs(server, model)
        async with stuttering(server.process.pid):
            composition = await compose(server.url, protocol, model, questions, clients=CLIENTS, **more)
        after = await runs(server, model)
        return composition, {name: value - before[name] for name, value in after.items()}

    return asyncio.run(body())


@pytest.mark.parametrize("name", MODELS)
def test_64_clients_get_the_answers_that_each_gets_alone(name: str, server: Server, models: dict[str, Model]) -> None:
    questions = drawn(models[name], 64, seed=1)
    composition, held = load(server, name, questions, rounds=3)
    assert composition.cancelled > 0
    assert all(len(each.together) >= 3 for each in composition.answered)
    for each in composition.answered:
        for answer in (each.alone, *each.together):
            assert is_right(models[name], each.question, answer), each
    assert composition.worst.moved <= models[name].manifest.tolerance.rtol
    if name in SHARED:
        assert held["requests_sum"] - held["requests_count"] > 32, "each of a run's requests but one makes one more"
    else:
        assert held["requests_sum"] == held["requests_count"] == held["requests_bucket 1.0"]
        assert held["mini_batches_sum"] == held["mini_batches_count"] == held["mini_batches_bucket 1.0"]
    if name in COUPLED:
        assert held["mini_batches_sum"] - held["mini_batches_count"] > 32


@pytest.mark.parametrize("name", [*COUPLED, "digits_rnn"])
def test_rows_of_two_requests_in_one_mini_batch_would_move_answers_far(name: str, models: dict[str, Model]) -> None:
    """The law is worth a test only where breaking it shows."""
    model = models[name]
    questions = drawn(model, 64, seed=1)
    most = model.manifest.max_mini_batch_rows
    moved = 0
    for mate, question in pairwise(questions):
        if most and mate.rows % most == 0 and question.mini_batch_rows in (None, most):
            continue  # its rows would lie in the slots that they have alone
        x = np.concatenate([each for one in (mate, question) for each in one.inputs.values()])
        merged = np.asarray(model.predict(x, most or 0))[mate.rows :]
        alone = np.asarray(model.predict(question.inputs, question.mini_batch_rows))
        assert np.abs(merged - alone).max() > 100 * model.manifest.tolerance.limit(alone), question
        moved += 1
    assert moved > 32


def test_the_measure_sees_an_answer_that_moved() -> None:
    x = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    question = Question({"x": x})
    still = Answered(question, {"y": x}, [{"y": x.copy()}])
    assert still.moved == 0
    for together, moved in (
        (x + np.float32(0.06), pytest.approx(0.01, rel=1e-5)),
        (x[:2], np.inf),
        (np.where(x == 1, np.nan, x), np.inf),
    ):
        answered = Answered(question, {"y": x}, [{"y": x}, {"y": together}])
        assert answered.moved == moved
        assert Composition([still, answered], 0).worst is answered
    assert distance({"y": x}, {"z": x}) == np.inf


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_holds_in_every_protocol(protocol: ProtocolName, server: Server, models: dict[str, Model]) -> None:
    model = models["together_mpmm"]
    composition, held = load(server, "together_mpmm", drawn(model, 32, seed=2), protocol, rounds=2)
    assert held["requests_sum"] > held["requests_count"]
    for each in composition.answered:
        assert all(is_right(model, each.question, answer) for answer in (each.alone, *each.together)), each


@pytest.mark.parametrize("name", MODELS)
def test_deterministic_answers_have_the_same_bits_alone_and_among_others(
    name: str, start_server: Callable[..., Server], golden_artifacts: Path, models: dict[str, Model]
) -> None:
    server = start_server(str(golden_artifacts / name), "--deterministic", "--max-run-rows", "48")
    composition, held = load(server, name, drawn(models[name], 64, seed=3), rounds=2)
    assert held["requests_sum"] == held["requests_count"]  # nothing is shared
    for each in composition.answered:
        assert is_right(models[name], each.question, each.alone)
        (alone,) = each.alone.values()
        for answer in each.together:
            (together,) = answer.values()
            assert alone.tobytes() == together.tobytes()


_FINITE = 3e38
"""A value that is a float32, and overflows in the first layer: it is answered, and shares a run."""


def poisons(question: Question) -> list[tuple[Question, int]]:
    """Return requests that are wrong, with the status each gets."""
    ((name, x),) = question.inputs.items()
    holed = x.copy()
    holed.flat[0] = np.nan
    return [
        (Question({name: holed}), 422),
        (Question({name: x[:, :-1]}), 422),
        (Question({name: x.astype(np.float64).reshape(-1)}), 422),
        (Question({name: x[:0]}), 422),
        (Question({"nothing": x}), 422),
        (Question({name: np.full_like(x, _FINITE)}, question.mini_batch_rows), 200),
        (Question({name: np.full_like(x, -_FINITE)}, question.mini_batch_rows), 200),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_poisoned_request_never_touches_its_mates(name: str, server: Server, models: dict[str, Model]) -> None:
    model = models[name]
    good = drawn(model, CLIENTS, seed=4)
    bad = [poison for question in good[::4] for poison in poisons(question)]

    async def poison(client: httpx.AsyncClient, question: Question) -> int:
        return (await client.send(request_of(client, "v2-binary", name, question))).status_code

    async def body() -> tuple[list[Arrays], list[int], dict[str, float]]:
        async with server.client() as client:
            await server.wait_until_ready(client)
            before = await runs(server, name)
            mates = [ask(client, "v2-binary", name, question) for question in good]
            wrong = [poison(client, question) for question, _ in bad]
            calls: list[Any] = [*mates, *wrong]
            order = np.random.default_rng(5).permutation(len(calls)).tolist()
            async with stuttering(server.process.pid):
                outcomes = dict(zip(order, await asyncio.gather(*(calls[index] for index in order)), strict=True))
            after = await runs(server, name)
        several = [outcomes[index] for index in range(len(calls))]
        held = {each: value - before[each] for each, value in after.items()}
        return several[: len(good)], several[len(good) :], held

    answers, statuses, held = asyncio.run(body())
    assert statuses == [status for _, status in bad]
    for question, answer in zip(good, answers, strict=True):
        assert is_right(model, question, answer), question
    if name in SHARED:
        assert held["requests_sum"] > held["requests_count"]


plans = st.lists(
    st.tuples(
        st.sampled_from(MODELS),
        st.integers(1, 30),  # rows
        st.sampled_from([None, 0, 1, 2, 3, 4]),  # mini_batch_rows
        st.sampled_from(PROTOCOLS),
        st.integers(0, 4),  # hundredths of a second until it is asked
        st.none() | st.floats(0, 0.1),  # seconds until it is given up
    ),
    min_size=1,
    max_size=40,
)


@settings(law, max_examples=25)
@given(plans, st.integers(0, 2**32 - 1), st.booleans())
def test_alone_equals_together(
    server: Server, models: dict[str, Model], plan: list[tuple[Any, ...]], seed: int, stutters: bool
) -> None:
    rng = np.random.default_rng(seed)

    async def one(client: httpx.AsyncClient, name: str, question: Question, step: tuple[Any, ...]) -> None:
        protocol, after, patience_s = step
        await asyncio.sleep(after / 100)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                if may_be_cut(models[name], question):
                    assert is_right(models[name], question, await ask(client, protocol, name, question))
                else:
                    with pytest.raises(RefusedError, match="422"):
                        await ask(client, protocol, name, question)

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(server.client())
            await server.wait_until_ready(client)
            if stutters:
                await stack.enter_async_context(stuttering(server.process.pid))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for name, rows, mini_batch_rows, *step in plan:
                (spec,) = models[name].manifest.signature.inputs
                x = rng.normal(size=(rows, *spec.shape[1:])).astype(np.float32)
                group.create_task(one(client, name, Question({spec.name: x}, mini_batch_rows), tuple(step)))
        async with server.client() as client:  # what was given up has left nothing behind
            await server.wait_for_queued_rows(client, 0)

    asyncio.run(body())
