"""When requests run: as soon as the model is free, with what has queued by then, first come first served.

A request is one part or several; a part is rows that must stay in one run, as a mini-batch's must. Parts of one group
may share a run. The queue decides *when* parts run and *which* of them together; the callable it was given knows *how*.
So the queue has no idea of arrays, of ONNX Runtime or of HTTP.

    while nothing runs and parts wait:
        take the oldest part and, of its group, those that wait behind it, in order, up to max_run_rows
        run them; if that fails and they belong to several requests, run each half of these requests by itself

All of its state belongs to one event loop, and the thread does nothing but call: no locks.

The law: every future is settled on every path. A request is answered, fails with its own error, is refused, is too
late, or was cancelled by its own caller; whatever becomes of one has no effect on another.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Generic

from bln_serve.errors import OverloadedError, RequestTooLargeError
from bln_serve.serving.deadlines import Deadlines
from bln_serve.serving.queued import (
    AnswerT,
    Part,
    PayloadT,
    QueuedPart,
    QueuedRequest,
    RunReport,
    reported,
    too_late,
)


class RunQueue(Generic[PayloadT, AnswerT]):
    """A bounded queue in front of one model. Made and used within one running event loop.

    Args:
        run: answers parts that share a run, one answer each, in order; never called twice at a time.
        max_queued_rows: the most rows of requests that are not answered; above it requests are refused at once.
        bound: the option that gives more room, for messages.
        max_run_rows: the most rows of parts that share a run; a larger part runs alone.
        alone: says whether a request that comes is known to be the only one that the service has, those that it has not
            read yet included. It then runs at once, if it may run on the event loop: nobody could share its run.
        loop_rows: the most rows of a run that is made on the event loop, which spares a short run two changes of
            thread, and in which nothing else happens meanwhile. Others are made in a thread of the queue's own.
        report: called after each run, before its callers go on. What it raises is the event loop's to log.
        name: of the thread.
    """

    def __init__(
        self,
        run: Callable[[Sequence[PayloadT]], Sequence[AnswerT]],
        *,
        max_queued_rows: int,
        bound: str = "--max-queued-rows",
        max_run_rows: int = 1,
        loop_rows: int = 0,
        alone: Callable[[], bool] = lambda: False,
        report: Callable[[RunReport], None] | None = None,
        name: str = "model",
    ) -> None:
        self._run = run
        self._max_queued_rows = max_queued_rows
        self._bound = bound
        self._max_run_rows = max_run_rows
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._loop_rows = loop_rows
        self._alone = alone
        self._deadlines = Deadlines(self._loop)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"run-{name}")
        self._numbers = count()
        self._groups: dict[Hashable, OrderedDict[QueuedPart[PayloadT, AnswerT], None]] = {}
        self._halves: list[list[QueuedPart[PayloadT, AnswerT]]] = []
        self._running: list[QueuedPart[PayloadT, AnswerT]] = []
        self._queued_rows = 0
        self._next_is_due = False
        self._thread_busy = False
        self._closing = False
        self._aborted = False
        self._ended = asyncio.Event()
        self._left: asyncio.Future[list[AnswerT]] = self._loop.create_future()
        self._left.cancel()

    @property
    def queued_rows(self) -> int:
        """Rows of the requests that are not answered yet, and what still runs for others."""
        return self._queued_rows

    @property
    def thread_busy(self) -> bool:
        """Whether `run` is being called, be it for requests that nobody waits for any more."""
        return self._thread_busy

    async def answer(self, parts: Sequence[Part[PayloadT]], deadline: float | None = None) -> list[AnswerT]:
        """Queue a request and wait for the answers to its parts. Cancelling the caller takes waiting parts out.

        Args:
            parts: at least one.
            deadline: when the answer is too late, in the event loop's time; None for never.

        Raises:
            RequestTooLargeError: it has more rows than the queue can ever hold.
            OverloadedError: the queue is full or closing, or was aborted meanwhile.
            DeadlineExceededError: the deadline passed first.
            Exception: what `run` raised for this request.
        """
        since = self._loop.time()
        if deadline is not None and deadline <= since:
            raise too_late()
        self._admit(parts[0].rows if len(parts) == 1 else sum([part.rows for part in parts]))
        if len(parts) == 1 and parts[0].rows <= self._loop_rows and self._is_idle() and self._alone():
            return self._answer_at_once(parts, since)
        request: QueuedRequest[AnswerT] = QueuedRequest(len(parts), self._loop.create_future())
        entries = [QueuedPart(part, request, index, next(self._numbers), since) for index, part in enumerate(parts)]
        self._put(entries)
        self._run_soon()
        if deadline is not None:
            self._deadlines.add(request, deadline)
        try:
            return await request.future
        finally:
            self._deadlines.remove(request)
            if request.missing:
                self._drop(entries)
            if not self._aborted:
                self._queued_rows -= request.answered_rows
            # An error holds the frames it came through. Holding it in turn, they would keep the rows until collected.
            request.future = self._left

    async def close(self) -> None:
        """Refuse what comes, wait until what is queued is answered, and end."""
        self._closing = True
        self._run_soon()
        await self._ended.wait()
        self._deadlines.end()
        self._thread.shutdown(wait=False)

    def abort(self) -> None:
        """Refuse what comes, and also what is queued or running: their callers get OverloadedError."""
        self._closing = self._aborted = True
        waiting = [entry for group in self._groups.values() for entry in group]
        for entry in (*self._running, *(entry for half in self._halves for entry in half), *waiting):
            entry.request.fail(_going_down())
        self._groups.clear()
        self._halves.clear()
        self._running = []
        self._queued_rows = 0
        self._deadlines.end()
        self._ended.set()

    def _admit(self, rows: int) -> None:
        if self._closing:
            raise _going_down()
        if rows > self._max_queued_rows:
            raise RequestTooLargeError(
                f"Expected at most {self._max_queued_rows} rows a request. Received: {rows}. Send them in several "
                f"requests, or start the service with a larger {self._bound}."
            )
        if self._queued_rows + rows > self._max_queued_rows:
            raise OverloadedError(
                f"Expected room for {rows} rows in the queue. Received: {self._queued_rows} of "
                f"{self._max_queued_rows} rows taken. Try again later."
            )

    def _is_idle(self) -> bool:
        return not (self._groups or self._running or self._halves or self._next_is_due)

    def _answer_at_once(self, parts: Sequence[Part[PayloadT]], since: float) -> list[AnswerT]:
        """Answer a request that need not wait, and so is in no queue."""
        self._thread_busy = True
        failed = True
        try:
            answers = self._call([part.payload for part in parts])
            failed = False
            return list(answers)
        finally:
            if self._report is not None:
                run_s = self._loop.time() - since
                report = RunReport(1, 1, parts[0].rows, parts[0].units, (0.0,), run_s, failed)
                try:
                    self._report(report)
                except Exception as error:  # the request has its answer, or an error of its own
                    self._loop.call_exception_handler({"message": "a report failed", "exception": error})

    def _put(self, entries: list[QueuedPart[PayloadT, AnswerT]]) -> None:
        for entry in entries:
            self._groups.setdefault(entry.part.group, OrderedDict())[entry] = None
            self._queued_rows += entry.part.rows

    def _drop(self, entries: list[QueuedPart[PayloadT, AnswerT]]) -> None:
        """Take out the parts that still wait: their request is settled already, or its caller was cancelled."""
        for entry in entries:
            group = self._groups.get(entry.part.group)
            if group is not None and entry in group:
                del group[entry]
                if not group:
                    del self._groups[entry.part.group]
                self._queued_rows -= entry.part.rows

    def _run_soon(self) -> None:
        # At the next turn of the loop, so that every request that this turn reads may share the run.
        if not (self._running or self._next_is_due or self._aborted):
            self._next_is_due = True
            self._loop.call_soon(self._run_next)

    def _run_next(self) -> None:
        self._next_is_due = False
        if self._aborted:
            return
        if not (together := self._take()):
            if self._closing:
                self._ended.set()
            return
        self._running = together
        self._thread_busy = True
        began = self._loop.time()
        payloads = [entry.part.payload for entry in together]
        rows = sum([entry.part.rows for entry in together])
        try:
            if rows > self._loop_rows:
                call = self._loop.run_in_executor(self._thread, self._call, payloads)
                call.add_done_callback(partial(self._take_over, together, began))
                return
            answers = self._call(payloads)
        except Exception as error:  # whatever a run raises belongs to its own callers, and the queue goes on
            self._thread_busy = False  # also where the system has no thread left
            self._go_on(together, began, error)
        else:
            self._go_on(together, began, answers)

    def _take(self) -> list[QueuedPart[PayloadT, AnswerT]]:
        """Take out of the queue what runs next."""
        while self._halves or self._groups:
            taken = self._halves.pop() if self._halves else self._take_oldest()
            if together := [entry for entry in taken if self._is_wanted(entry)]:
                return together
        return []

    def _take_oldest(self) -> list[QueuedPart[PayloadT, AnswerT]]:
        """Take the part that waits longest, and what may share its run."""
        key, group = min(self._groups.items(), key=lambda item: next(iter(item[1])).number)
        # One that nobody waits for any more is taken by itself, and so out of the way of the next in age.
        alone = key is None or next(iter(group)).request.future.done()
        together: list[QueuedPart[PayloadT, AnswerT]] = []
        rows = 0
        for entry in group:
            rows += entry.part.rows
            if together and (alone or rows > self._max_run_rows):
                break
            together.append(entry)
        for entry in together:
            del group[entry]
        if not group:
            del self._groups[key]
        return together

    def _is_wanted(self, entry: QueuedPart[PayloadT, AnswerT]) -> bool:
        """Whether somebody still waits for a part that was taken; otherwise its rows are given back."""
        if entry.request.future.done():
            self._queued_rows -= entry.part.rows
            return False
        return True

    def _call(self, payloads: list[PayloadT]) -> Sequence[AnswerT]:
        try:
            answers = self._run(payloads)
        except StopIteration as error:  # a future cannot carry it, and would never be settled
            raise RuntimeError("The run raised StopIteration") from error
        finally:
            self._thread_busy = False
        if len(answers) != len(payloads):
            raise RuntimeError(f"Expected {len(payloads)} answers of the run. Received: {len(answers)}")
        return answers

    def _take_over(
        self, together: list[QueuedPart[PayloadT, AnswerT]], began: float, call: asyncio.Future[Sequence[AnswerT]]
    ) -> None:
        """Go on, on the event loop, where the thread ended."""
        self._go_on(together, began, call.exception() or call.result())

    def _go_on(
        self, together: list[QueuedPart[PayloadT, AnswerT]], began: float, outcome: Sequence[AnswerT] | BaseException
    ) -> None:
        """Hand out what a run gave, and let the next one come."""
        ended = self._loop.time()
        if self._aborted:
            return
        if failed := isinstance(outcome, BaseException):
            self._fail(together, outcome)
        else:
            self._leave(together)
            for entry, answer in zip(together, outcome, strict=True):
                entry.request.put(entry.index, answer)
        self._running = []
        self._run_soon()
        if self._report is not None:
            self._report(reported(together, began, ended, failed=failed))

    def _fail(self, together: list[QueuedPart[PayloadT, AnswerT]], error: BaseException) -> None:
        """Fail the request whose parts these are; of several, find out whose part it was."""
        requests = list(dict.fromkeys(entry.request for entry in together))
        if len(requests) == 1:
            self._leave(together)
            requests[0].fail(error)
        else:
            first = set(requests[: len(requests) // 2])
            self._halves.append([entry for entry in together if entry.request not in first])
            self._halves.append([entry for entry in together if entry.request in first])

    def _leave(self, together: list[QueuedPart[PayloadT, AnswerT]]) -> None:
        """Give back the rows of a run; those of a request that has further parts are kept, and count, till its end."""
        for entry in together:
            if entry.request.future.done():
                self._queued_rows -= entry.part.rows
            else:
                entry.request.answered_rows += entry.part.rows


def _going_down() -> OverloadedError:
    return OverloadedError("Expected a running service. Received: one that is going down. Try again later.")
