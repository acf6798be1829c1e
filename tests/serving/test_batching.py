"""Which parts share a run and in which order, how much the queue holds, and what is told of a run."""

import asyncio
import itertools
import threading
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
    turns,
)

from bln_serve.errors import DeadlineExceededError, OverloadedError, RequestTooLargeError
from bln_serve.serving.queued import Part, RunReport

# Order


@both
@in_time
async def test_requests_are_answered_in_order_and_one_at_a_time(in_thread: bool) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread) as queue:
        tasks = [queue.ask(name) for name in "abc"]
        assert await asyncio.gather(*tasks) == [["answer to a"], ["answer to b"], ["answer to c"]]
    assert run.runs == [["a"], ["b"], ["c"]]


@in_time
async def test_what_shares_a_run_is_chosen_when_the_one_before_it_has_ended() -> None:
    run = Run(held=True)
    async with queue_for(run) as queue:
        tasks = [queue.ask(of_group("a"))]
        await run.wait_until_inside()
        for name in "bcd":
            tasks.append(queue.ask(of_group(name)))
            await turns()
        assert run.runs == [["a"]]
        run.let_go(2)
        await asyncio.gather(*tasks)
    assert run.runs == [["a"], ["b", "c", "d"]]


@both
@pytest.mark.parametrize(
    ("parts", "limit", "runs"),
    [
        pytest.param([("g", 1)] * 3, 3, [[0, 1, 2]], id="a group shares a run"),
        pytest.param([("g", 2)] * 3, 4, [[0, 1], [2]], id="up to the limit"),
        pytest.param([("g", 2)] * 3, 5, [[0, 1], [2]], id="and not beyond it"),
        pytest.param([("g", 3), ("g", 2), ("g", 1)], 4, [[0], [1, 2]], id="none goes before one that came first"),
        pytest.param([("g", 1), ("g", 9), ("g", 1)], 4, [[0], [1], [2]], id="one beyond the limit runs alone"),
        pytest.param([("g", 9), ("g", 9)], 4, [[0], [1]], id="each beyond the limit runs alone"),
        pytest.param([("g", 1)] * 2, 1, [[0], [1]], id="a limit of one row"),
        pytest.param([("g", 1), ("h", 1), ("g", 1), ("h", 1)], 4, [[0, 2], [1, 3]], id="groups stay apart"),
        pytest.param([(None, 1)] * 2, 4, [[0], [1]], id="none without a group shares a run"),
        pytest.param([("g", 1), (None, 1), ("g", 1)], 4, [[0, 2], [1]], id="nor with a group's"),
        pytest.param([("g", 1), ("g", 1), ("h", 1), ("g", 1)], 2, [[0, 1], [2], [3]], id="the oldest goes first"),
        pytest.param([("g", 1)] * 3 + [(None, 1), ("g", 1)], 2, [[0, 1], [2, 4], [3]], id="with what may join it"),
    ],
)
@pytest.mark.parametrize("in_one_request", [False, True], ids=["a request each", "one request"])
@in_time
async def test_which_parts_share_a_run(
    parts: list[tuple[str | None, int]], limit: int, runs: list[list[int]], in_one_request: bool, in_thread: bool
) -> None:
    run = Run()
    async with queue_for(run, in_thread=in_thread, max_run_rows=limit) as queue:
        made = [Part(index, rows, group) for index, (group, rows) in enumerate(parts)]
        tasks = [queue.ask(*made)] if in_one_request else [queue.ask(part) for part in made]
        answers = await asyncio.gather(*tasks)
    assert list(itertools.chain(*answers)) == [f"answer to {index}" for index in range(len(parts))]
    assert run.runs == runs


@both
@in_time
async def test_a_request_is_answered_once_all_its_parts_are(in_thread: bool) -> None:
    done = []
    run = Run(during=lambda _: done.append(task.done()))
    async with queue_for(run, in_thread=in_thread) as queue:
        task = queue.ask(of_group("a"), "b", of_group("c"))
        assert await task == ["answer to a", "answer to b", "answer to c"]
    assert run.runs == [["a", "c"], ["b"]]
    assert done == [False, False]


@both
@in_time
async def test_two_equal_parts_are_two(in_thread: bool) -> None:
    same = of_group("a", 2)
    async with queue_for(Run(), in_thread=in_thread) as queue:
        tasks = [queue.ask(same, same), queue.ask(same)]
        await asyncio.sleep(0)
        assert queue.queued_rows == 6
        assert await asyncio.gather(*tasks) == [["answer to a"] * 2, ["answer to a"]]


@both
@in_time
async def test_requests_that_come_during_a_run_share_the_next(in_thread: bool) -> None:
    loop, later = the_loop(), []

    def ask_more(number: int) -> None:
        if number == 0:
            loop.call_soon_threadsafe(lambda: later.extend(queue.ask(of_group(name)) for name in "bcd"))

    run = Run(during=ask_more)
    async with queue_for(run, in_thread=in_thread) as queue:
        await queue.ask(of_group("a"))
    assert run.runs == [["a"], ["b", "c", "d"]]
    assert await asyncio.gather(*later) == [[f"answer to {name}"] for name in "bcd"]


@both
@in_time
async def test_a_group_that_never_ends_does_not_hold_another_up(in_thread: bool) -> None:
    loop, later = the_loop(), []

    def ask_more(number: int) -> None:
        if number < 5:
            loop.call_soon_threadsafe(lambda: later.extend(queue.ask(of_group("many")) for _ in range(3)))

    run = Run(during=ask_more)
    async with queue_for(run, in_thread=in_thread, max_run_rows=2, max_queued_rows=1000) as queue:
        first = [queue.ask(of_group("many")) for _ in range(3)]
        await queue.ask(of_group("other", group="h"))
        assert run.runs.index(["other"]) == 2  # after the three that came before it
        while unfinished := [task for task in (*first, *later) if not task.done()]:
            await asyncio.wait(unfinished)
    assert len(later) == 15


@both
@in_time
async def test_a_part_larger_than_a_run_should_be_never_holds_up_the_loop(in_thread: bool) -> None:
    def where(payloads: list[Any]) -> list[Any]:
        return [threading.current_thread() is threading.main_thread() for _ in payloads]

    run = Run()
    run.answers = where
    async with queue_for(run, in_thread=in_thread, max_run_rows=4) as queue:
        assert await queue.ask(Part("as large as may be", 4)) == [not in_thread]
        assert await queue.ask(Part("larger", 5)) == [False]


# Room


@in_time
async def test_a_full_queue_refuses_at_once_and_keeps_what_it_has() -> None:
    run = Run(held=True)
    async with queue_for(run, max_queued_rows=10) as queue:
        kept = queue.ask(Part("kept", 8))
        await run.wait_until_inside()
        with pytest.raises(OverloadedError, match=r"room for 3 rows in the queue\. Received: 8 of 10 rows taken"):
            await queue.ask(Part("refused", 1), Part("refused", 2))
        fits = queue.ask(Part("fits", 1), Part("fits", 1))
        run.let_go(3)
        assert await asyncio.gather(kept, fits) == [["answer to kept"], ["answer to fits"] * 2]
    assert "refused" not in itertools.chain(*run.runs)


@pytest.mark.parametrize("leaves", [False, True], ids=["to its answer", "to its cancellation"])
@in_time
async def test_a_request_s_rows_count_to_its_end_also_those_that_have_run(leaves: bool) -> None:
    """Their answers take memory as long as they wait for the others."""
    run = Run(held=True)
    async with queue_for(run, max_queued_rows=10) as queue:
        large, waiting = queue.ask(Part("ran", 3), Part("left", 4)), queue.ask("waiting")
        await run.wait_until_inside()
        run.let_go()
        await run.wait_until_inside()  # of the second of its parts
        assert queue.queued_rows == 8
        with pytest.raises(OverloadedError, match="room for 3 rows"):
            await queue.ask(Part("refused", 3))
        if leaves:
            large.cancel()
            await asyncio.wait({large})
            assert queue.queued_rows == 5  # what runs for nobody takes its room still
        run.let_go()
        await asyncio.wait({large})
        await run.wait_until_inside()
        assert queue.queued_rows == 1
        run.let_go()
        await waiting
    assert run.runs == [["ran"], ["left"], ["waiting"]]


@both
@in_time
async def test_a_request_that_never_fits_is_not_told_to_try_again(in_thread: bool) -> None:
    async with queue_for(Run(), in_thread=in_thread, max_queued_rows=10) as queue:
        with pytest.raises(RequestTooLargeError, match=r"at most 10 rows a request\. Received: 11"):
            await queue.ask(Part("large", 5), Part("large", 6))
        assert await queue.ask(Part("fits", 5), Part("fits", 5)) == ["answer to fits"] * 2


# What a run was


@both
@in_time
async def test_a_report_of_each_run(in_thread: bool) -> None:
    loop, reports = the_loop(), []
    run = Run(during=lambda number: loop.pass_time([0.25, 0.5, 1, 2][number]))
    async with queue_for(run, in_thread=in_thread, report=reports.append) as queue:
        several = [Part("b", 2, "g", units=2), Part("c", 3, "g", units=3)]
        await outcomes([queue.ask("a"), queue.ask(*several), queue.ask(of_group(POISON, 4))])
    assert reports == [
        RunReport(parts=1, requests=1, rows=1, units=1, queue_s=(0,), run_s=0.25, failed=False),
        RunReport(parts=3, requests=2, rows=9, units=6, queue_s=(0.25,) * 3, run_s=0.5, failed=True),
        RunReport(parts=2, requests=1, rows=5, units=5, queue_s=(0.75,) * 2, run_s=1, failed=False),
        RunReport(parts=1, requests=1, rows=4, units=1, queue_s=(1.75,), run_s=2, failed=True),
    ]


@both
@in_time
async def test_a_report_comes_before_the_answer(in_thread: bool) -> None:
    reports: list[RunReport] = []
    async with queue_for(Run(), in_thread=in_thread, report=reports.append) as queue:
        await queue.ask("a")
        assert len(reports) == 1


@both
@in_time
async def test_a_report_that_fails_harms_nobody(in_thread: bool) -> None:
    def fail(report: RunReport) -> None:
        raise ValueError(report.failed)

    loop = the_loop()
    async with queue_for(Run(), in_thread=in_thread, report=fail) as queue:
        assert await outcomes(queue.ask(payload) for payload in ("a", POISON, "b")) == [
            ["answer to a"],
            POISON,
            ["answer to b"],
        ]
    assert [trouble.args for trouble in loop.troubles] == [(False,), (True,), (False,)]
    loop.troubles.clear()


# A request that is alone


@in_time
async def test_a_request_that_is_alone_is_answered_at_once() -> None:
    reports: list[RunReport] = []
    async with queue_for(Run(), in_thread=False, alone=lambda: True, report=reports.append) as queue:
        answer = queue.answer([Part("a", 3, "g", 2)], deadline=the_loop().now + 5)
        with pytest.raises(StopIteration) as ended:  # it never waits
            answer.send(None)
        assert ended.value.value == ["answer to a"]
        assert reports == [RunReport(1, 1, 3, 2, (0.0,), 0.0, failed=False)]
        assert not queue.thread_busy


@in_time
async def test_a_request_is_not_alone_behind_another() -> None:
    run = Run()
    async with queue_for(run, in_thread=False, alone=lambda: True) as queue:
        requests = queue.ask(of_group("a"), of_group("b")), queue.ask(of_group("c"))
        assert await asyncio.gather(*requests) == [["answer to a", "answer to b"], ["answer to c"]]
    assert run.runs == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("in_thread", "rows"), [pytest.param(True, 1, id="in a thread"), pytest.param(False, 11, id="too large")]
)
@in_time
async def test_a_run_that_is_long_leaves_the_loop_even_for_a_request_that_is_alone(in_thread: bool, rows: int) -> None:
    threads: list[bool] = []
    run = Run(during=lambda _: threads.append(threading.current_thread() is threading.main_thread()))
    async with queue_for(run, in_thread=in_thread, alone=lambda: True) as queue:
        assert await queue.ask(Part("a", rows)) == ["answer to a"]
    assert threads == [False]


@in_time
async def test_a_request_that_is_alone_fails_alone() -> None:
    reports: list[RunReport] = []
    async with queue_for(Run(), in_thread=False, alone=lambda: True, report=reports.append) as queue:
        with pytest.raises(ValueError, match="poison"):
            await queue.ask(POISON)
        assert [report.failed for report in reports] == [True]
        assert await queue.ask("a") == ["answer to a"]
        with pytest.raises(DeadlineExceededError):
            await queue.ask("late", deadline=the_loop().now)


@in_time
async def test_a_report_that_fails_does_not_take_the_answer_of_a_request_that_is_alone() -> None:
    def fail(_: RunReport) -> None:
        raise ValueError("report")

    async with queue_for(Run(), in_thread=False, alone=lambda: True, report=fail) as queue:
        assert await queue.ask("a") == ["answer to a"]
    assert [str(trouble) for trouble in the_loop().troubles] == ["report"]
    the_loop().troubles.clear()
