"""Closing and aborting settle everything."""

import asyncio
import gc
import weakref
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
    the_end_of_the_thread,
    the_loop,
    turns,
)

from bln_serve.errors import DeadlineExceededError, OverloadedError


@in_time
async def test_closing_answers_what_is_queued_and_refuses_what_comes() -> None:
    run = Run(held=True)
    async with queue_for(run) as queue:
        tasks = [queue.ask(name) for name in "ab"]
        await run.wait_until_inside()
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)  # one turn of the loop: closing has begun
        with pytest.raises(OverloadedError, match="going down"):
            await queue.ask("late")
        assert not closing.done()
        run.let_go(2)
        assert await asyncio.gather(*tasks) == [["answer to a"], ["answer to b"]]
        await closing


@both
@in_time
async def test_closing_answers_the_halves_of_a_failed_run_too(in_thread: bool) -> None:
    loop, closing = the_loop(), []

    def close(number: int) -> None:
        if number == 1:
            loop.call_soon_threadsafe(lambda: closing.append(asyncio.create_task(queue.close())))

    async with queue_for(Run(during=close), in_thread=in_thread) as queue:
        ended = await outcomes(queue.ask(of_group(payload)) for payload in ("a", POISON, "c", "d"))
        await asyncio.gather(*closing)
    assert ended == [["answer to a"], POISON, ["answer to c"], ["answer to d"]]


@both
@in_time
async def test_closing_ends_where_the_last_request_was_cancelled(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        leaves = queue.ask("leaves")
        await asyncio.sleep(0)
        leaves.cancel()
        await queue.close()
    assert run.runs == []


@both
@in_time
async def test_a_queue_may_be_closed_twice_and_without_a_request(in_thread: bool) -> None:
    async with queue_for(Run(), in_thread=in_thread) as queue:
        await queue.close()
        await queue.close()


@pytest.mark.parametrize("payload", ["a", POISON], ids=["a run that succeeds", "a run that fails"])
@in_time
async def test_aborting_settles_every_request_also_the_running_one(payload: Any) -> None:
    run = Run(held=True)
    async with queue_for(run, name="aborted") as queue:
        tasks = [
            queue.ask(payload),
            queue.ask("b", of_group("c")),
            queue.ask(of_group("d"), deadline=the_loop().now + 5),
        ]
        await run.wait_until_inside()
        queue.abort()
        assert queue.queued_rows == 0
        assert [type(outcome) for outcome in await outcomes(tasks)] == [OverloadedError] * 3
        assert queue.thread_busy
        with pytest.raises(OverloadedError, match="going down"):
            await queue.ask("late")
        run.let_go()
        await queue.close()
        await the_end_of_the_thread("run-aborted")
    assert run.runs == [[payload]]


@in_time
async def test_aborting_settles_the_halves_of_a_failed_run_too() -> None:
    run = Run(held=True)
    async with queue_for(run, name="halved") as queue:
        tasks = [queue.ask(of_group(payload)) for payload in ("a", POISON, "c", "d")]
        await run.wait_until_inside()
        run.let_go()
        await run.wait_until_inside()
        queue.abort()
        assert [type(outcome) for outcome in await outcomes(tasks)] == [OverloadedError] * 4
        run.let_go()
        await queue.close()
        await the_end_of_the_thread("run-halved")
    assert run.runs == [["a", POISON, "c", "d"], ["a", POISON]]


@in_time
async def test_aborting_between_runs_on_the_loop() -> None:
    loop = the_loop()
    run = Run(during=lambda _: loop.call_soon(queue.abort))
    async with queue_for(run, in_thread=False) as queue:
        first, *others = await outcomes(queue.ask(name) for name in "abc")
    assert first == ["answer to a"]
    assert [type(outcome) for outcome in others] == [OverloadedError] * 2
    assert run.runs == [["a"]]


@both
@pytest.mark.parametrize("turn", [0, 1])
@in_time
async def test_aborting_before_the_first_run_settles_too(turn: int, in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        waiting = queue.ask("a")
        await turns(turn)
        queue.abort()
        with pytest.raises(OverloadedError, match="going down"):
            await waiting
    assert run.runs == []


@both
@pytest.mark.parametrize("error", [ValueError, DeadlineExceededError])
@in_time
async def test_an_error_does_not_keep_a_request_s_rows(error: type[Exception], in_thread: bool) -> None:
    """A busy service may refuse many requests, with many rows each, between two runs of the garbage collector."""
    loop = the_loop()

    class Rows:
        pass

    def run(payloads: list[Any]) -> list[Any]:
        if isinstance(payloads[0], Rows):
            raise ValueError
        loop.pass_time(1)
        return payloads

    rows = Rows()
    gone = weakref.ref(rows)
    gc.disable()
    try:
        async with queue_for(run, in_thread=in_thread, name="freed") as queue:
            deadline = loop.now + 1 if error is DeadlineExceededError else None
            tasks = [queue.ask("a"), queue.ask("b"), queue.ask(rows, deadline=deadline)]
            ended = await outcomes(tasks)
            assert [type(each) for each in ended] == [list, list, error]
        await the_end_of_the_thread("run-freed")
        del rows, ended, tasks
        assert gone() is None
    finally:
        gc.enable()
