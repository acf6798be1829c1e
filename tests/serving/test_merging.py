"""Merging on golden artifacts: how a request is divided, and that it gets the answer it would get alone."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.artifacts import NAMES, TOGETHER
from support.laws import law

from bln_serve.artifact import Artifact
from bln_serve.errors import RunError
from bln_serve.runtime import Model, OnnxSession
from bln_serve.serving.batching import RunQueue
from bln_serve.serving.merging import Portion, SharedRun, join, parts_of
from bln_serve.serving.prediction import Work
from bln_serve.serving.queued import Part
from bln_serve.signature import Arrays, rows_of
from bln_serve.verification import compare_all


class Golden:
    """A golden model with rows to ask it about: those of its own three largest samples."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        artifact = Artifact.open(path)
        samples = [sample.inputs for sample in artifact.samples()[-3:]]
        self.model = Model(artifact, threads)
        self.manifest = artifact.manifest
        self.pool = self.manifest.signature.validate(
            {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}
        )
        self.run = SharedRun(self.model)

    def work(self, start: int, rows: int, mini_batch_rows: int | None = None) -> Work:
        """A request of some of the rows."""
        index = (start + np.arange(rows)) % rows_of(self.pool)
        inputs = {name: array[index] for name, array in self.pool.items()}
        return Work(inputs, self.model.cut(rows, mini_batch_rows))

    def parts(self, work: Work, max_run_rows: int) -> list[Part[Portion]]:
        return parts_of(work, max_run_rows, several_mini_batches=self.manifest.several_mini_batches)

    def alone(self, work: Work, mini_batch_rows: int | None = None) -> Arrays:
        answer = self.model.predict(work.inputs, mini_batch_rows)
        return answer if isinstance(answer, dict) else {self.manifest.signature.outputs[0].name: answer}

    def furthest(self, expected: Arrays, answers: Arrays) -> float:
        """The largest difference, as a share of the tolerance."""
        checks = list(compare_all("merged", expected, answers, self.manifest.tolerance))
        assert expected.keys() == answers.keys()
        return max(check.difference / check.limit for check in checks)


@pytest.fixture(scope="module")
def golden(golden_artifacts: Path) -> Callable[[str], Golden]:
    models = {name: Golden(golden_artifacts / name / "1") for name in (*NAMES, *TOGETHER)}
    return models.__getitem__


def a_request(rows: int, sizes: tuple[int, ...] | None) -> Work:
    """Rows that are all different, in two inputs."""
    return Work({"x": np.arange(rows * 2).reshape(rows, 2), "y": -np.arange(rows)}, sizes)


# How a request is divided


@pytest.mark.parametrize(
    ("rows", "max_run_rows", "parts"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [2, 3]), (9, 4, [3, 3, 3]), (3, 1, [1, 1, 1]), (3, 512, [3])],
)
def test_independent_rows_are_divided_evenly_below_the_limit(rows: int, max_run_rows: int, parts: list[int]) -> None:
    divided = parts_of(a_request(rows, None), max_run_rows, several_mini_batches=False)
    assert [part.rows for part in divided] == parts
    assert [(part.payload.mini_batches, part.units) for part in divided] == [(None, 1)] * len(parts)


@pytest.mark.parametrize(
    ("sizes", "max_run_rows", "several", "parts"),
    [
        pytest.param((5, 5, 5), 15, True, [(3, 5, 5)], id="side by side"),
        pytest.param((5, 5, 5), 14, True, [(1, 5, 5), (2, 5, 5)], id="up to the limit"),
        pytest.param((5, 5, 3), 100, True, [(2, 5, 5), (1, 3, 3)], id="the rest has another size"),
        pytest.param((5, 5), 4, True, [(1, 5, 5), (1, 5, 5)], id="larger than the limit"),
        pytest.param((2, 2), 1, True, [(1, 2, 2), (1, 2, 2)], id="a limit of one row"),
        pytest.param((7,), 4, True, [(1, 7, 7)], id="one of all rows"),
        pytest.param((5, 5, 3), 100, False, [(1, 5, None), (1, 5, None), (1, 3, None)], id="one a run"),
        pytest.param((5,), 2, False, [(1, 5, None)], id="one a run, larger than the limit"),
    ],
)
def test_mini_batches_stay_whole_and_meet_their_like(
    sizes: tuple[int, ...], max_run_rows: int, several: bool, parts: list[tuple[int, int, int | None]]
) -> None:
    divided = parts_of(a_request(sum(sizes), sizes), max_run_rows, several_mini_batches=several)
    assert [(part.units, part.rows // part.units, part.group) for part in divided] == parts


@law
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_a_request_s_parts_are_its_rows_in_order_in_whole_mini_batches(
    runs: list[tuple[int, int]], max_run_rows: int, coupled: bool, several: bool
) -> None:
    sizes = tuple(size for size, count in runs for _ in range(count))
    work = a_request(sum(sizes), sizes if coupled else None)
    parts = parts_of(work, max_run_rows, several_mini_batches=several)
    for name, array in join([part.payload.inputs for part in parts]).items():
        np.testing.assert_array_equal(array, work.inputs[name])
    assert [part.rows for part in parts] == [rows_of(part.payload.inputs) for part in parts]
    if not coupled:
        assert len(parts) == -(-work.rows // max_run_rows)
        assert max(part.rows for part in parts) <= min(max_run_rows, min(part.rows for part in parts) + 1)
        assert len({part.group for part in parts} - {None}) == 1
        return
    assert [part.units for part in parts] == [part.payload.mini_batches for part in parts]
    assert tuple(part.rows // part.units for part in parts for _ in range(part.units)) == sizes
    assert all(part.rows <= max_run_rows or part.units == 1 for part in parts)
    if several:
        assert [part.group for part in parts] == [part.rows // part.units for part in parts]
        for size, alike in groupby(sizes):  # no more parts than there must be, and none much smaller than the others
            count, most = len(list(alike)), max(1, max_run_rows // size)
            units = [parts.pop(0).units for _ in range(-(-count // most))]
            assert sum(units) == count
            assert max(units) <= min(units) + 1
        assert parts == []
    else:
        assert {(part.group, part.units) for part in parts} == {(None, 1)}


# That it gets the answer it would get alone


def shared(golden: Golden, parts: Sequence[Part[Portion]], chooser: random.Random) -> list[Arrays]:
    """Run parts in any order with any of their group; return the answers in the parts' order."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        groups[index if part.group is None else ("group", part.group)].append(index)
    answers: dict[int, Arrays] = {}
    for indices in groups.values():
        chooser.shuffle(indices)
        while indices:
            run, indices[:] = indices[: (take := chooser.randint(1, len(indices)))], indices[take:]
            answers |= zip(run, golden.run([parts[index].payload for index in run]), strict=True)
    return [answers[index] for index in range(len(parts))]


@st.composite
def requests_for(draw: st.DrawFn, golden: Golden) -> list[tuple[int, int, int | None]]:
    """Requests that a model takes: first row, rows, rows of a mini-batch."""
    rule = golden.manifest.rule
    unit = rule.default_rows if rule else 8
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, rows_of(golden.pool) - 1))
        rows = draw(st.integers(rule.min_rows if rule else 1, 3 * unit))
        sizes = [None, *range(1, rows + 1)]
        allowed = [size for size in sizes if rule is None or rule.allows(rows, size or rule.default_rows)]
        requests.append((start, rows, draw(st.sampled_from(allowed))) if allowed else (start, unit, None))
    return requests


@pytest.mark.parametrize("name", [*NAMES, *TOGETHER])
@settings(law, max_examples=100)
@given(data=st.data())
def test_a_request_gets_the_answer_it_would_get_alone(
    name: str, golden: Callable[[str], Golden], data: st.DataObject
) -> None:
    model = golden(name)
    requests = data.draw(requests_for(model))
    max_run_rows = data.draw(st.integers(1, 80))
    works = [model.work(*request) for request in requests]
    divided = [model.parts(work, max_run_rows) for work in works]
    answers = iter(shared(model, [part for parts in divided for part in parts], data.draw(st.randoms())))
    for work, parts, (*_, mini_batch_rows) in zip(works, divided, requests, strict=True):
        answer = join([next(answers) for _ in parts])
        assert model.furthest(model.alone(work, mini_batch_rows), answer) <= 1


@pytest.mark.parametrize(
    ("name", "rows"),
    [pytest.param("together_mpmm", 5, id="live batch mean"), pytest.param("together_pppp", 2, id="stored by slot")],
)
def test_one_mini_batch_of_several_requests_would_be_far_off(
    name: str, rows: int, golden: Callable[[str], Golden]
) -> None:
    """What a server does that does not know of mini-batches; and so, what the law above would notice."""
    model = golden(name)
    works = [model.work(start, rows) for start in (0, rows)]
    portions = [part.payload for work in works for part in model.parts(work, 100)]
    naive = model.model.run(join([portion.inputs for portion in portions]), (2 * rows,))
    merged = model.run(portions)
    expected = [model.alone(work) for work in works]
    moved = [
        model.furthest(alone, {output: array[start : start + rows] for output, array in naive.items()})
        for alone, start in zip(expected, (0, rows), strict=True)
    ]
    assert max(moved) > 100
    assert [model.furthest(alone, answer) <= 1 for alone, answer in zip(expected, merged, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("name", "mini_batch_rows", "runs"),
    [
        ("digits_cnn", None, [18]),
        ("tiny_two_inputs", None, [18]),
        ("together_mpmm", 3, [18]),
        ("together_pppp", 2, [18]),
        ("together_mpmm", 4, [12, 6]),
        ("tiny_mpmm", 3, [3] * 6),
        ("tiny_pppp", 2, [2] * 9),
    ],
)
@pytest.mark.parametrize("in_thread", [True, False], ids=["in_thread", "on_loop"])
def test_through_the_queue_requests_share_runs(
    name: str,
    mini_batch_rows: int | None,
    runs: list[int],
    *,
    in_thread: bool,
    golden: Callable[[str], Golden],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = golden(name)
    works = [model.work(start, 6, mini_batch_rows) for start in (0, 6, 12)]
    expected = [model.alone(work, mini_batch_rows) for work in works]
    ran = rows_of_each_run(monkeypatch)

    async def body() -> list[Arrays]:
        queue = RunQueue(model.run, max_queued_rows=100, max_run_rows=18, loop_rows=0 if in_thread else 18)
        answers = await asyncio.gather(*(queue.answer(model.parts(work, 18)) for work in works))
        await queue.close()
        return [join(each) for each in answers]

    answers = asyncio.run(asyncio.wait_for(body(), 30))
    assert ran == runs
    assert max(map(model.furthest, expected, answers)) <= 1


def rows_of_each_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many rows ONNX Runtime is given, from here on."""
    real, ran = OnnxSession.run, []

    def run(session: OnnxSession, inputs: Arrays, *more: Any) -> Arrays:
        ran.append(rows_of(inputs))
        return real(session, inputs, *more)

    monkeypatch.setattr(OnnxSession, "run", run)
    return ran


def test_a_request_that_the_runtime_refuses_does_not_harm_its_mates(golden: Callable[[str], Golden]) -> None:
    model = golden("tiny_two_inputs")
    works = [model.work(start, 3) for start in (0, 3, 6)]
    expected = [model.alone(work) for work in works]
    works[1].inputs["tokens"][2, 3] = 10**6  # not in the embedding; and the signature would have refused it

    async def body() -> list[Any]:
        queue = RunQueue(model.run, max_queued_rows=100, max_run_rows=100, loop_rows=100)
        answering = (queue.answer(model.parts(work, 100)) for work in works)
        answers = await asyncio.gather(*answering, return_exceptions=True)
        await queue.close()
        return answers

    first, refused, last = asyncio.run(asyncio.wait_for(body(), 30))
    assert isinstance(refused, RunError)
    assert model.furthest(expected[0], join(first)) <= 1
    assert model.furthest(expected[2], join(last)) <= 1


# The same bits


@pytest.mark.parametrize("name", [*NAMES, *TOGETHER])
def test_parts_that_are_not_shared_run_alone_and_are_the_same_rows(name: str, golden: Callable[[str], Golden]) -> None:
    model = golden(name)
    work = model.work(0, 12)
    several = model.model.manifest.several_mini_batches
    apart, together = (parts_of(work, 5, several_mini_batches=several, shared=shared) for shared in (False, True))
    assert [part.group for part in apart] == [None] * len(together)
    for one, other in zip(apart, together, strict=True):
        assert (one.rows, one.units, one.payload.mini_batches) == (other.rows, other.units, other.payload.mini_batches)
        for key, array in one.payload.inputs.items():
            np.testing.assert_array_equal(array, other.payload.inputs[key])
