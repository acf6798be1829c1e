"""Runs that fail, callers that leave, and answers that are too late: none of them touches another."""

import asyncio
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.queues import (
    POISON,
    Run,
    both,
    in_time,
    of_group,
    outcomes,
    queue_for,
    the_loop,
)

from bln_serve.errors import DeadlineExceededError
from bln_serve.serving.queued import Part

# Failures


@both
@in_time
async def test_a_failing_run_fails_its_own_caller_alone(in_thread: bool) -> None:
    async with queue_for(Run(), in_thread=in_thread) as queue:
        requests = ["a", ValueError("poison"), StopIteration("worse"), "b"]
        first, poison, worse, last = await outcomes(queue.ask(request) for request in requests)
        assert (first, last) == (["answer to a"], ["answer to b"])
        assert isinstance(poison, ValueError)
        assert isinstance(worse, RuntimeError)
        assert queue.queued_rows == 0


@both
@pytest.mark.parametrize(
    ("requests", "runs"),
    [
        pytest.param(
            [["a"], ["b"], ["c"], ["d"], ["e"], [POISON], ["g"], ["h"]],
            [
                ["a", "b", "c", "d", "e", POISON, "g", "h"],
                ["a", "b", "c", "d"],
                ["e", POISON, "g", "h"],
                ["e", POISON],
                ["e"],
                [POISON],
                ["g", "h"],
            ],
            id="one culprit",
        ),
        pytest.param(
            [[POISON], ["b"], [POISON]],
            [[POISON, "b", POISON], [POISON], ["b", POISON], ["b"], [POISON]],
            id="two culprits",
        ),
        pytest.param(
            [["a", "b"], ["c", POISON], ["e", "f"]],
            [["a", "b", "c", POISON, "e", "f"], ["a", "b"], ["c", POISON, "e", "f"], ["c", POISON], ["e", "f"]],
            id="a request's parts stay together",
        ),
        pytest.param([["a", POISON, "c"]], [["a", POISON, "c"]], id="nobody else to find out about"),
    ],
)
@in_time
async def test_a_failed_run_is_halved_until_the_culprit_alone_fails(
    requests: list[list[Any]], runs: list[list[Any]], in_thread: bool
) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        ended = await outcomes(queue.ask(*map(of_group, request)) for request in requests)
        assert queue.queued_rows == 0
    assert run.runs == runs
    for request, outcome in zip(requests, ended, strict=True):
        assert outcome == (POISON if POISON in request else [f"answer to {payload}" for payload in request])


@in_time
async def test_how_many_runs_it_takes_at_most_to_find_the_culprits() -> None:
    most: dict[tuple[int, int], int] = {}
    for count in range(1, 10):
        for culprits in itertools.chain(*(itertools.combinations(range(count), each) for each in (0, 1, 2, count))):
            run = Run()
            async with queue_for(run, in_thread=False) as queue:
                payloads = [ValueError(index) if index in culprits else index for index in range(count)]
                ended = await outcomes(queue.ask(of_group(payload)) for payload in payloads)
            expected = [
                payload if index in culprits else [f"answer to {index}"] for index, payload in enumerate(payloads)
            ]
            assert ended == expected
            key = (count, len(culprits))
            most[key] = max(most.get(key, 0), len(run.runs))
    for (count, culprits), runs in most.items():
        assert runs <= min(2 * count - 1, 1 + 2 * culprits * math.ceil(math.log2(count)))
    assert (most[8, 0], most[8, 1], most[8, 2], most[8, 8]) == (1, 7, 11, 15)


@both
@in_time
async def test_what_comes_meanwhile_waits_until_the_halves_have_run(in_thread: bool) -> None:
    loop, later = the_loop(), []

    def ask_more(number: int) -> None:
        if number == 0:
            loop.call_soon_threadsafe(lambda: later.append(queue.ask(of_group("late"))))

    run = Run(during=ask_more)
    async with queue_for(run, in_thread=in_thread) as queue:
        await outcomes([queue.ask(of_group("a")), queue.ask(of_group(POISON))])
        assert await later[0] == ["answer to late"]
    assert run.runs == [["a", POISON], ["a"], [POISON], ["late"]]


@both
@in_time
async def test_what_is_left_of_a_failed_request_is_not_run(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        tasks = [
            queue.ask("a", of_group(POISON), Part("c", 5, "h"), "d"),
            queue.ask(of_group("mate"), Part("e", 1, "h")),
        ]
        assert await outcomes(tasks) == [POISON, ["answer to mate", "answer to e"]]
        assert queue.queued_rows == 0
    assert run.runs == [["a"], [POISON, "mate"], [POISON], ["mate"], ["e"]]


@both
@pytest.mark.parametrize("answers", [0, 1, 3])
@in_time
async def test_a_run_with_a_wrong_number_of_answers_has_failed(answers: int, in_thread: bool) -> None:
    async with queue_for(lambda _: ["answer"] * answers, in_thread=in_thread) as queue:
        with pytest.raises(RuntimeError, match=rf"Expected 2 answers of the run\. Received: {answers}"):
            await queue.ask(of_group("a"), of_group("b"))


@both
@in_time
async def test_too_few_answers_are_put_down_to_the_request_that_has_none(in_thread: bool) -> None:
    async with queue_for(lambda payloads: [each for each in payloads if each != "mute"], in_thread=in_thread) as queue:
        first, mute, last = await outcomes(queue.ask(of_group(payload)) for payload in ("a", "mute", "b"))
    assert (first, last) == (["a"], ["b"])
    assert str(mute) == "Expected 1 answers of the run. Received: 0"


@in_time
async def test_a_thread_that_cannot_start_fails_one_request_and_not_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    async with queue_for(Run()) as queue:
        with monkeypatch.context() as context:
            context.setattr(ThreadPoolExecutor, "submit", no_thread)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await queue.ask("a")
        assert queue.queued_rows == 0
        assert not queue.thread_busy
        assert await queue.ask("b") == ["answer to b"]


# Callers that leave


@in_time
async def test_a_cancelled_waiting_request_is_never_run_and_gives_its_rows_back() -> None:
    run = Run(held=True)
    async with queue_for(run) as queue:
        first, dropped, last = (queue.ask(Part(name, 3), Part(name, 1, "g")) for name in ("first", "dropped", "last"))
        await run.wait_until_inside()
        assert queue.queued_rows == 12
        dropped.cancel()
        await asyncio.wait({dropped})
        assert queue.queued_rows == 8
        run.let_go(3)
        assert await asyncio.gather(first, last) == [["answer to first"] * 2, ["answer to last"] * 2]
    assert run.runs == [["first"], ["first", "last"], ["last"]]


@both
@in_time
async def test_a_request_cancelled_as_its_run_is_due_is_not_run(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        stays, leaves = queue.ask(of_group("stays", 2)), queue.ask(of_group("leaves", 3))
        await asyncio.sleep(0)  # both are queued, and the run comes before their own next turn
        leaves.cancel()
        assert await stays == ["answer to stays"]
        assert queue.queued_rows == 0
    assert run.runs == [["stays"]]
    assert leaves.cancelled()


@both
@in_time
async def test_a_part_does_not_take_the_place_of_one_that_left(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        leaves, stays = queue.ask(of_group("leaves")), queue.ask("first", of_group("second"))
        await asyncio.sleep(0)
        leaves.cancel()
        await stays
    assert run.runs == [["first"], ["second"]]


@in_time
async def test_a_cancelled_running_request_holds_its_rows_until_the_run_ends() -> None:
    run = Run(held=True)
    async with queue_for(run) as queue:
        running, mate, waiting = queue.ask(of_group("running", 4)), queue.ask(of_group("mate", 4)), queue.ask("waiting")
        await run.wait_until_inside()
        running.cancel()
        await asyncio.wait({running})
        assert queue.queued_rows == 9
        run.let_go()
        assert await mate == ["answer to mate"]
        assert queue.queued_rows == 1
        run.let_go()
        assert await waiting == ["answer to waiting"]
    assert run.runs == [["running", "mate"], ["waiting"]]


@both
@pytest.mark.parametrize(
    ("leaves", "runs"),
    [
        pytest.param(1, [["a", POISON, "c", "d"], ["a"], ["c", "d"]], id="the culprit"),
        pytest.param(0, [["a", POISON, "c", "d"], [POISON], ["c", "d"]], id="its mate"),
        pytest.param(2, [["a", POISON, "c", "d"], ["a", POISON], ["a"], [POISON], ["d"]], id="one of the other half"),
    ],
)
@in_time
async def test_one_that_leaves_a_run_that_fails_is_not_run_again(
    leaves: int, runs: list[list[Any]], in_thread: bool
) -> None:
    loop = the_loop()
    run = Run(during=lambda number: number or loop.call_soon_threadsafe(tasks[leaves].cancel))
    async with queue_for(run, in_thread=in_thread) as queue:
        payloads = ["a", POISON, "c", "d"]
        tasks = [queue.ask(of_group(payload, 2)) for payload in payloads]
        ended = await outcomes(tasks)
        assert queue.queued_rows == 0
    assert run.runs == runs
    assert isinstance(ended.pop(leaves), asyncio.CancelledError)
    del payloads[leaves]
    assert ended == [payload if payload is POISON else [f"answer to {payload}"] for payload in payloads]


@in_time
async def test_one_that_leaves_while_its_half_waits_holds_its_rows_until_its_turn() -> None:
    run = Run(held=True)
    async with queue_for(run) as queue:
        tasks = [queue.ask(of_group(payload, 2)) for payload in ("a", POISON, "c", "d")]
        await run.wait_until_inside()
        run.let_go()
        await run.wait_until_inside()
        tasks[2].cancel()
        await asyncio.wait({tasks[2]})
        assert queue.queued_rows == 8
        run.let_go(4)
        await outcomes(tasks)
        assert queue.queued_rows == 0
    assert run.runs == [["a", POISON, "c", "d"], ["a", POISON], ["a"], [POISON], ["d"]]


# Deadlines


@in_time
async def test_a_request_whose_time_passes_while_it_waits_is_never_run() -> None:
    run, loop = Run(held=True), the_loop()
    async with queue_for(run) as queue:
        tasks = [queue.ask("first"), queue.ask(Part("late", 3), "more", deadline=loop.now + 5), queue.ask("last")]
        await run.wait_until_inside()
        assert queue.queued_rows == 6
        loop.pass_time(5)
        with pytest.raises(DeadlineExceededError, match="within the request's time"):
            await tasks[1]
        assert queue.queued_rows == 2
        run.let_go(2)
        assert await asyncio.gather(tasks[0], tasks[2]) == [["answer to first"], ["answer to last"]]
    assert run.runs == [["first"], ["last"]]


@in_time
async def test_a_request_whose_time_passes_while_it_runs_leaves_its_mates_alone() -> None:
    run, loop = Run(held=True), the_loop()
    async with queue_for(run) as queue:
        late = queue.ask(of_group("late", 3), "left", deadline=loop.now + 5)
        mate = queue.ask(of_group("mate", 3), deadline=loop.now + 6)
        await run.wait_until_inside()
        loop.pass_time(5)
        with pytest.raises(DeadlineExceededError):
            await late
        assert queue.queued_rows == 6  # what runs for nobody takes its room still
        run.let_go()
        assert await mate == ["answer to mate"]
        assert queue.queued_rows == 0
    assert run.runs == [["late", "mate"]]


@in_time
async def test_a_request_whose_time_passes_while_its_half_waits_is_not_run_again() -> None:
    run, loop = Run(held=True), the_loop()
    async with queue_for(run) as queue:
        tasks = [queue.ask(of_group("a")), queue.ask(of_group(POISON), deadline=loop.now + 5), queue.ask(of_group("c"))]
        await run.wait_until_inside()
        run.let_go()
        await run.wait_until_inside()
        loop.pass_time(5)
        await asyncio.wait({tasks[1]})
        run.let_go(2)
        first, late, last = await outcomes(tasks)
        assert (first, last) == (["answer to a"], ["answer to c"])
        assert isinstance(late, DeadlineExceededError)
        assert queue.queued_rows == 0
    assert run.runs == [["a", POISON, "c"], ["a"], ["c"]]


@both
@in_time
async def test_a_deadline_is_seen_between_runs(in_thread: bool) -> None:
    loop = the_loop()
    run = Run(during=lambda number: number or loop.pass_time(5))
    async with queue_for(run, in_thread=in_thread) as queue:
        tasks = [queue.ask("a"), queue.ask("b"), queue.ask("late", deadline=loop.now + 5), queue.ask("c")]
        *_, late, last = await outcomes(tasks)
        assert isinstance(late, DeadlineExceededError)
        assert last == ["answer to c"]
    assert run.runs == [["a"], ["b"], ["c"]]


@both
@in_time
async def test_a_request_that_comes_too_late_is_not_queued(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        with pytest.raises(DeadlineExceededError):
            await queue.ask("late", deadline=the_loop().now)
        assert queue.queued_rows == 0
    assert run.runs == []


@both
@in_time
async def test_an_answer_in_time_leaves_no_timer(in_thread: bool) -> None:
    async with queue_for(Run(), in_thread=in_thread) as queue:
        assert await queue.ask("a", deadline=the_loop().now + 5) == ["answer to a"]
    assert [timer.cancelled() for timer in the_loop().timers] == [True]
