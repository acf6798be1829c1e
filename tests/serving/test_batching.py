"""The laws of the run queue, in its thread and on the event loop. Time passes only where a test says so."""

import asyncio
import functools
import gc
import itertools
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law

from bln_serve.errors import DeadlineExceededError, OverloadedError, RequestTooLargeError
from bln_serve.serving.batching import Part, RunQueue, RunReport

DEADLINE_S = 10
both = pytest.mark.parametrize("in_thread", [True, False], ids=["in_thread", "on_loop"])


class Loop(asyncio.SelectorEventLoop):
    """A loop whose time stands still, and that knows its timers and what it would only have logged."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[asyncio.TimerHandle] = []
        self.troubles: list[Any] = []
        super().__init__()
        self.set_exception_handler(lambda _, context: self.troubles.append(context.get("exception", context)))

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def call_at(self, *arguments: Any, **more: Any) -> asyncio.TimerHandle:
        self.timers.append(super().call_at(*arguments, **more))
        return self.timers[-1]


def the_loop() -> Loop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    return loop


def in_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on such a loop; fail, and not hang, where a future is never settled, and where a timer is left."""

    @functools.wraps(test)
    def run(*arguments: Any, **more: Any) -> None:
        with asyncio.Runner(loop_factory=Loop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, Loop)
            task = loop.create_task(test(*arguments, **more))
            guard = threading.Timer(2 * DEADLINE_S, lambda: loop.call_soon_threadsafe(task.cancel))
            guard.start()
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pytest.fail("a future was never settled")
            finally:
                guard.cancel()
        assert not loop.troubles
        assert all(timer.cancelled() or timer.when() <= loop.now for timer in loop.timers)

    return run


class Run:
    """Notes the payloads of each run, and fails where one of them is an exception.

    Args:
        held: whether each run waits until the test lets it go; for runs in a thread.
        during: called at the beginning of each run, with the run's number, in the thread that runs.
    """

    def __init__(self, *, held: bool = False, during: Callable[[int], Any] | None = None) -> None:
        self.runs: list[list[Any]] = []
        self.held = held
        self.during = during
        self._entered = threading.Semaphore(0)
        self._go_on = threading.Semaphore(0)
        self._inside = 0

    def __call__(self, payloads: Iterable[Any]) -> list[Any]:
        self._inside += 1
        assert self._inside == 1, "two runs at a time"
        self.runs.append(list(payloads))
        self._entered.release()
        if self.during:
            self.during(len(self.runs) - 1)
        if self.held:
            assert self._go_on.acquire(timeout=DEADLINE_S), "the test let fewer runs go on than there are"
        self._inside -= 1
        return self.answers(self.runs[-1])

    def answers(self, payloads: list[Any]) -> list[Any]:
        for payload in payloads:
            if isinstance(payload, Exception):
                raise payload
        return [f"answer to {payload}" for payload in payloads]

    async def wait_until_inside(self) -> None:
        assert await asyncio.to_thread(self._entered.acquire, timeout=DEADLINE_S), "no run began"

    def let_go(self, runs: int = 1) -> None:
        self._go_on.release(runs)


class Queue(RunQueue[Any, Any]):
    def ask(self, *parts: Any, deadline: float | None = None) -> asyncio.Task[list[Any]]:
        """Send a request in a task of its own; a part is given as such, or as the payload of one that runs alone."""
        whole = [part if isinstance(part, Part) else Part(part, 1) for part in parts]
        return asyncio.create_task(self.answer(whole, deadline))


@asynccontextmanager
async def queue_for(run: Callable[[Any], Any], *, in_thread: bool = True, **more: Any) -> AsyncIterator[Queue]:
    """A queue that is closed at the end, and then has no rows left."""
    queue = Queue(run, in_thread=in_thread, **{"max_queued_rows": 100, "max_run_rows": 10, **more})
    yield queue
    await queue.close()
    assert queue.queued_rows == 0
    assert not queue.thread_busy or run.held  # type: ignore[attr-defined]


def of_group(payload: Any, rows: int = 1, group: str = "g") -> Part[Any]:
    return Part(payload, rows, group)


async def outcomes(tasks: Iterable[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def turns(count: int = 5) -> None:
    """Let the loop do what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


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


POISON = ValueError("poison")


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


# The end


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


async def the_end_of_the_thread(name: str) -> None:
    """Wait until a queue's thread has ended, and what it left to the loop is done."""
    for thread in threading.enumerate():
        if thread.name.startswith(name):
            await asyncio.to_thread(thread.join, DEADLINE_S)
            assert not thread.is_alive()
    await turns()


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


# All of it


@dataclass(frozen=True)
class Piece:
    """A part's payload: all that the law has to know of it."""

    request: int
    index: int
    rows: int
    group: str | None
    poison: bool


@dataclass(frozen=True)
class Ask:
    parts: list[tuple[int, str | None]]
    poison: int | None
    timeout: float | None

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.parts)

    def pieces(self, request: int) -> list[Piece]:
        return [
            Piece(request, index, rows, group, index == self.poison) for index, (rows, group) in enumerate(self.parts)
        ]


MAX_QUEUED_ROWS, MAX_RUN_ROWS = 24, 6
asking = st.builds(
    Ask,
    parts=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([None, "g", "g", "g", "h"])), min_size=1, max_size=4),
    poison=st.one_of(st.none(), st.none(), st.integers(0, 3)),
    timeout=st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2, 3])),
)
events = st.one_of(
    asking,
    asking,
    asking,
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("pass time"), st.just(1)),
    st.tuples(st.just("let go"), st.integers(1, 3)),
    st.tuples(st.just("turns"), st.integers(1, 4)),
)


class Trial:
    """A queue, what was asked of it, and what became of that."""

    def __init__(self, in_thread: bool) -> None:
        self.loop = the_loop()
        self.run = Run(held=in_thread)
        self.run.answers = self.run_pieces  # type: ignore[method-assign]
        self.failed: list[bool] = []
        self.reports: list[RunReport] = []
        self.queue = Queue(
            self.run,
            max_queued_rows=MAX_QUEUED_ROWS,
            max_run_rows=MAX_RUN_ROWS,
            in_thread=in_thread,
            report=self.reports.append,
        )
        self.asked: list[Ask] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.deadlines: list[float] = []
        self.queued: list[Piece] = []
        self.cancelled: set[int] = set()
        self.aborted = False

    def run_pieces(self, pieces: list[Piece]) -> list[Any]:
        poison = [piece for piece in pieces if piece.poison]
        self.failed.append(bool(poison))
        if poison:
            raise ValueError(poison[0])
        return [("answer", piece) for piece in pieces]

    def ask(self, ask: Ask) -> None:
        self.deadlines.append(math.inf if ask.timeout is None else self.loop.now + ask.timeout)
        self.tasks.append(asyncio.create_task(self.answer(ask, len(self.asked))))
        self.asked.append(ask)

    async def answer(self, ask: Ask, request: int) -> list[Any]:
        pieces, deadline = ask.pieces(request), self.deadlines[request]
        late, room = deadline <= self.loop.now, self.queue.queued_rows + ask.rows <= MAX_QUEUED_ROWS
        admitted = room and not late and not self.aborted
        self.queued += pieces if admitted else []
        parts = [Part(piece, piece.rows, piece.group) for piece in pieces]
        try:
            answers = await self.queue.answer(parts, None if deadline == math.inf else deadline)
        except RequestTooLargeError:
            assert ask.rows > MAX_QUEUED_ROWS
            raise
        except OverloadedError:
            assert not room or self.aborted
            raise
        assert admitted
        return answers

    async def follow(self, event: Any) -> None:
        match event:
            case Ask():
                self.ask(event)
            case "cancel", index:
                if index < len(self.tasks) and self.tasks[index].cancel():
                    self.cancelled.add(index)
            case "pass time", seconds:
                self.loop.pass_time(seconds)
            case "let go", runs:
                self.run.let_go(runs)
                await turns(2)
            case "turns", count:
                await turns(count)

    async def end(self, abort: bool) -> list[Any]:
        if abort:
            self.aborted = True
            self.queue.abort()
        self.run.held = False
        self.run.let_go(1000)
        ended = await outcomes(self.tasks)
        await self.queue.close()
        assert self.queue.queued_rows == 0
        return ended

    def check_outcome(self, request: int, outcome: Any) -> None:
        """What it would have been alone, unless its caller left, its time passed, there was no room, or all ended."""
        ask = self.asked[request]
        if request in self.cancelled or isinstance(outcome, asyncio.CancelledError):
            assert request in self.cancelled
            assert isinstance(outcome, asyncio.CancelledError)
        elif isinstance(outcome, DeadlineExceededError):
            assert self.deadlines[request] <= self.loop.now
        elif not isinstance(outcome, OverloadedError | RequestTooLargeError):  # checked where it was refused
            pieces = ask.pieces(request)
            poison = [piece for piece in pieces if piece.poison]
            if poison:
                assert isinstance(outcome, ValueError)
                assert outcome.args == tuple(poison)
            else:
                assert outcome == [("answer", piece) for piece in pieces]

    def check_runs(self, ended: list[Any]) -> None:
        ran: set[Piece] = set()
        answered: list[Piece] = []
        for pieces, failed in zip(self.run.runs, self.failed, strict=True):
            assert len({piece.group for piece in pieces}) == 1
            assert len(pieces) == 1 or pieces[0].group is not None
            assert len(pieces) == 1 or sum(piece.rows for piece in pieces) <= MAX_RUN_ROWS
            assert [*map(self.queued.index, pieces)] == sorted(map(self.queued.index, pieces))
            answered += [] if failed else pieces
            if pieces[0] not in ran:  # and so no half: of all that waits this is the oldest
                for older in self.queued[: self.queued.index(pieces[0])]:
                    assert older in ran or not isinstance(ended[older.request], list)
            ran.update(pieces)
        assert len(answered) == len(set(answered)), "a part ran twice"
        if not self.aborted:
            assert [report.failed for report in self.reports] == self.failed


@law
@given(st.lists(events, max_size=25), st.booleans(), st.booleans())
@in_time
async def test_every_request_is_settled_as_it_would_be_alone(plan: list[Any], in_thread: bool, abort: bool) -> None:
    trial = Trial(in_thread)
    for event in plan:
        await trial.follow(event)
    ended = await trial.end(abort)
    if abort and in_thread:
        await the_end_of_the_thread("run-model")
    for request, outcome in enumerate(ended):
        trial.check_outcome(request, outcome)
    trial.check_runs(ended)
