import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bln_serve.errors import OverloadedError, RequestTooLargeError
from bln_serve.serving.batching import RunQueue

DEADLINE_S = 10


def run_in_time(body: Coroutine[Any, Any, None]) -> None:
    """Fail, and not hang, where a future is never settled."""
    asyncio.run(asyncio.wait_for(body, 2 * DEADLINE_S))


class Gate:
    """A run that notes what it was asked and waits until the test lets it go on."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.inside = 0

    def __call__(self, request: Any) -> Any:
        self.inside += 1
        assert self.inside == 1, "two runs at a time"
        self.ran.append(request)
        self.entered.release()
        assert self.go_on.acquire(timeout=DEADLINE_S), "the test let fewer runs go on than there are"
        self.inside -= 1
        if isinstance(request, Exception):
            raise request
        return f"answer to {request}"

    async def wait_until_inside(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=DEADLINE_S)


def test_requests_are_answered_in_order_and_one_at_a_time() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        tasks = [asyncio.create_task(queue.answer(name, 1)) for name in "abc"]
        for _ in tasks:
            gate.go_on.release()
        assert await asyncio.gather(*tasks) == ["answer to a", "answer to b", "answer to c"]
        assert gate.ran == ["a", "b", "c"]
        await queue.close()

    run_in_time(body())


def test_a_failing_run_fails_its_own_caller_alone() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        requests = ["a", ValueError("poison"), StopIteration("worse"), "b"]
        tasks = [asyncio.create_task(queue.answer(request, 1)) for request in requests]
        for _ in tasks:
            gate.go_on.release()
        first, poison, worse, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (first, last) == ("answer to a", "answer to b")
        assert isinstance(poison, ValueError)
        assert isinstance(worse, RuntimeError)
        assert queue.queued_rows == 0
        await queue.close()

    run_in_time(body())


def test_a_cancelled_waiting_request_is_never_run_and_gives_its_rows_back() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        first, dropped, last = (asyncio.create_task(queue.answer(name, 3)) for name in ("first", "dropped", "last"))
        await gate.wait_until_inside()
        assert queue.queued_rows == 9
        dropped.cancel()
        await asyncio.wait({dropped})
        assert queue.queued_rows == 6
        gate.go_on.release(2)
        assert await asyncio.gather(first, last) == ["answer to first", "answer to last"]
        assert gate.ran == ["first", "last"]
        await queue.close()

    run_in_time(body())


def test_a_cancelled_running_request_holds_its_rows_until_the_run_ends() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        running, mate = (asyncio.create_task(queue.answer(name, 4)) for name in ("running", "mate"))
        await gate.wait_until_inside()
        running.cancel()
        await asyncio.wait({running})
        assert queue.queued_rows == 8
        gate.go_on.release(2)
        assert await mate == "answer to mate"
        await queue.close()
        assert queue.queued_rows == 0

    run_in_time(body())


def test_a_full_queue_refuses_at_once_and_keeps_what_it_has() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        kept = asyncio.create_task(queue.answer("kept", 8))
        await gate.wait_until_inside()
        with pytest.raises(OverloadedError, match=r"room for 3 rows in the queue\. Received: 8 of 10 rows taken"):
            await queue.answer("refused", 3)
        fits = asyncio.create_task(queue.answer("fits", 2))
        gate.go_on.release(2)
        assert await asyncio.gather(kept, fits) == ["answer to kept", "answer to fits"]
        await queue.close()

    run_in_time(body())


def test_a_request_that_never_fits_is_not_told_to_try_again() -> None:
    async def body() -> None:
        queue = RunQueue(Gate(), max_queued_rows=10)
        with pytest.raises(RequestTooLargeError, match=r"at most 10 rows a request\. Received: 11"):
            await queue.answer("large", 11)
        await queue.close()

    run_in_time(body())


def test_closing_answers_what_is_queued_and_refuses_what_comes() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        tasks = [asyncio.create_task(queue.answer(name, 1)) for name in "ab"]
        await gate.wait_until_inside()
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)  # one turn of the loop: closing has begun
        with pytest.raises(OverloadedError, match="going down"):
            await queue.answer("late", 1)
        gate.go_on.release(2)
        assert await asyncio.gather(*tasks) == ["answer to a", "answer to b"]
        await closing

    run_in_time(body())


def test_aborting_settles_every_request_also_the_running_one() -> None:
    async def body() -> None:
        gate = Gate()
        queue = RunQueue(gate, max_queued_rows=10)
        tasks = [asyncio.create_task(queue.answer(name, 1)) for name in "abc"]
        await gate.wait_until_inside()
        queue.abort()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [OverloadedError] * 3
        assert queue.thread_busy
        gate.go_on.release()
        await queue.close()

    run_in_time(body())


def test_aborting_before_the_first_turn_of_the_loop_settles_too() -> None:
    async def body() -> None:
        queue = RunQueue(Gate(), max_queued_rows=10)
        waiting = asyncio.create_task(queue.answer("a", 1))
        queue.abort()
        with pytest.raises(OverloadedError, match="going down"):
            await waiting
        await queue.close()

    run_in_time(body())


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["good", "poison", "cancelled"])), max_size=12),
    st.booleans(),
)
def test_every_request_is_settled_as_it_would_be_alone(plan: list[tuple[int, str]], abort: bool) -> None:
    """Answered, failed by its own poison, cancelled by its own caller, or refused; nothing hangs, no rows stay."""

    def run(request: tuple[int, str]) -> tuple[int, str]:
        if request[1] == "poison":
            raise ValueError(request)
        return request

    async def body() -> None:
        queue = RunQueue(run, max_queued_rows=16)
        tasks = [asyncio.create_task(queue.answer((index, kind), rows)) for index, (rows, kind) in enumerate(plan)]
        await asyncio.sleep(0)
        for task, (_, kind) in zip(tasks, plan, strict=True):
            if kind == "cancelled":
                task.cancel()
        if abort:
            queue.abort()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await queue.close()
        room = 16
        for index, (outcome, (rows, kind)) in enumerate(zip(outcomes, plan, strict=True)):
            if rows > room:
                assert isinstance(outcome, OverloadedError)
                continue
            room -= rows
            if kind == "cancelled":
                assert isinstance(outcome, asyncio.CancelledError)
            elif abort:
                assert outcome == (index, kind) or isinstance(outcome, OverloadedError | ValueError)
            elif kind == "poison":
                assert isinstance(outcome, ValueError)
                assert outcome.args[0] == (index, kind)
            else:
                assert outcome == (index, kind)
        assert queue.queued_rows == 0

    run_in_time(body())
