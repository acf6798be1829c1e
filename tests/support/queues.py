"""What the tests of the run queue share: a loop whose time they pass, a run that they hold, a queue that ends."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bln_serve.serving.batching import RunQueue
from bln_serve.serving.queued import Part

DEADLINE_S = 10
POISON = ValueError("poison")
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
    limits = {"max_queued_rows": 100, "max_run_rows": 10, **more}
    queue = Queue(run, loop_rows=0 if in_thread else limits["max_run_rows"], **limits)
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


async def the_end_of_the_thread(name: str) -> None:
    """Wait until a queue's thread has ended, and what it left to the loop is done."""
    for thread in threading.enumerate():
        if thread.name.startswith(name):
            await asyncio.to_thread(thread.join, DEADLINE_S)
            assert not thread.is_alive()
    await turns()
