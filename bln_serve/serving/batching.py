"""When a request runs: one at a time, first come first served, in one thread of the model's own.

The queue decides *when*; the callable it was given knows *how* (which rows make a mini-batch, and how they are run).
So the queue has no idea of arrays, of ONNX Runtime or of HTTP. All of its state belongs to one event loop, and the
thread does nothing but call: no locks.

The law: every future is settled on every path. A request is answered, fails with its own error, is refused, or was
cancelled by its own caller; whatever becomes of one has no effect on another.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from bln_serve.errors import OverloadedError, RequestTooLargeError

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, eq=False)
class _Entry(Generic[RequestT, AnswerT]):
    """A request in the queue. Compared by identity: two equal requests are two."""

    request: RequestT
    rows: int
    future: asyncio.Future[AnswerT]

    def succeed(self, answer: AnswerT) -> None:
        if not self.future.done():
            self.future.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class RunQueue(Generic[RequestT, AnswerT]):
    """A bounded queue in front of one model. Made and used within one running event loop.

    Args:
        run: answers one request; called in the queue's own thread, never twice at a time.
        max_queued_rows: the most rows that wait or run together; above it requests are refused at once.
        name: of the thread.
    """

    def __init__(self, run: Callable[[RequestT], AnswerT], *, max_queued_rows: int, name: str = "model") -> None:
        self._run = run
        self._max_queued_rows = max_queued_rows
        self._waiting: OrderedDict[_Entry[RequestT, AnswerT], None] = OrderedDict()
        self._running: _Entry[RequestT, AnswerT] | None = None
        self._queued_rows = 0
        self._closing = False
        self._thread_busy = False
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"run-{name}")
        self._worker = asyncio.get_running_loop().create_task(self._work(), name=f"run queue of {name}")

    @property
    def queued_rows(self) -> int:
        """Rows that wait or run."""
        return self._queued_rows

    @property
    def thread_busy(self) -> bool:
        """Whether the thread is inside `run`, be it for a request that nobody waits for any more."""
        return self._thread_busy

    async def answer(self, request: RequestT, rows: int) -> AnswerT:
        """Queue a request and wait for its answer. Cancelling the caller takes a waiting request out of the queue.

        Args:
            request: what `run` takes.
            rows: how many rows it counts for.

        Raises:
            RequestTooLargeError: it has more rows than the queue can ever hold.
            OverloadedError: the queue is full or closing, or was aborted meanwhile.
            Exception: what `run` raised for this request.
        """
        self._admit(rows)
        entry = _Entry[RequestT, AnswerT](request, rows, asyncio.get_running_loop().create_future())
        self._waiting[entry] = None
        self._queued_rows += rows
        self._wake.set()
        try:
            return await entry.future
        finally:
            self._drop(entry)

    async def close(self) -> None:
        """Refuse what comes, wait until what is queued is answered, and end."""
        self._closing = True
        self._wake.set()
        await asyncio.wait({self._worker})
        self._thread.shutdown(wait=False)

    def abort(self) -> None:
        """Refuse what comes, and also what is queued or running: their callers get OverloadedError."""
        self._refuse_all()  # here too: a task that is cancelled before its first step never reaches its finally
        self._worker.cancel()

    def _admit(self, rows: int) -> None:
        if self._closing:
            raise _going_down()
        if rows > self._max_queued_rows:
            raise RequestTooLargeError(
                f"Expected at most {self._max_queued_rows} rows a request. Received: {rows}. Send them in several "
                "requests, or start the service with a larger --max-queued-rows."
            )
        if self._queued_rows + rows > self._max_queued_rows:
            raise OverloadedError(
                f"Expected room for {rows} rows in the queue. Received: {self._queued_rows} of "
                f"{self._max_queued_rows} rows taken. Try again later."
            )

    def _drop(self, entry: _Entry[RequestT, AnswerT]) -> None:
        """Take out an entry that still waits, which only happens when its caller was cancelled."""
        if entry in self._waiting:
            del self._waiting[entry]
            self._queued_rows -= entry.rows

    async def _work(self) -> None:
        try:
            while self._waiting or not self._closing:
                if self._waiting:
                    await self._run_next()
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self._refuse_all()

    async def _run_next(self) -> None:
        entry, _ = self._waiting.popitem(last=False)
        self._running = entry
        self._thread_busy = True
        try:
            call = asyncio.get_running_loop().run_in_executor(self._thread, self._in_thread, entry.request)
            entry.succeed(await call)
        except Exception as error:  # whatever a run raises belongs to its own caller, and the queue goes on
            entry.fail(error)
        self._running = None
        self._queued_rows -= entry.rows

    def _in_thread(self, request: RequestT) -> AnswerT:
        try:
            return self._run(request)
        except StopIteration as error:  # a future cannot carry it, and would never be settled
            raise RuntimeError("The run raised StopIteration") from error
        finally:
            self._thread_busy = False

    def _refuse_all(self) -> None:
        self._closing = True
        for entry in (*([self._running] if self._running else []), *self._waiting):
            entry.fail(_going_down())
        self._running = None
        self._waiting.clear()
        self._queued_rows = 0


def _going_down() -> OverloadedError:
    return OverloadedError("Expected a running service. Received: one that is going down. Try again later.")
