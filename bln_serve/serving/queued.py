"""What stands in a run queue, and what is reported when it has run.

A request waits as one future; each of its parts waits in the queue, knows its request, and puts its answer there. The
last answer settles the request.
"""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from msgspec import Struct

from bln_serve.errors import DeadlineExceededError

PayloadT = TypeVar("PayloadT")
AnswerT = TypeVar("AnswerT")


class Part(Struct, Generic[PayloadT], frozen=True):
    """Rows that must stay in one run.

    Attributes:
        payload: what the queue's `run` takes.
        rows: how many rows it counts for.
        group: parts whose groups are equal may share a run; None for a part that runs alone.
        units: how many things its rows are, such as mini-batches, for the report.
    """

    payload: PayloadT
    rows: int
    group: Hashable = None
    units: int = 1


class RunReport(Struct, frozen=True):
    """One run that ended.

    Attributes:
        parts: how many parts shared it.
        requests: of how many requests these were.
        rows: how many rows they have.
        units: how many units they are.
        queue_s: seconds that each of them waited.
        run_s: seconds that the run took.
        failed: whether it raised.
    """

    parts: int
    requests: int
    rows: int
    units: int
    queue_s: tuple[float, ...]
    run_s: float
    failed: bool


class QueuedRequest(Generic[AnswerT]):
    """A request in the queue: its future, and the answers to its parts as they come. Compared by identity.

    Attributes:
        answers: to its parts, in their order; None for one that has not run.
        answered_rows: of these parts; the queue counts them as they leave it.
        future: of the answers; settled by the last, or by an error.
        missing: how many parts have not run.
    """

    __slots__ = ("answered_rows", "answers", "future", "missing")

    def __init__(self, parts: int, future: asyncio.Future[list[AnswerT]]) -> None:
        self.answers: list[AnswerT | None] = [None] * parts
        self.future = future
        self.missing = parts
        self.answered_rows = 0

    def put(self, index: int, answer: AnswerT) -> None:
        """Take the answer to a part; the last one settles the request."""
        self.answers[index] = answer
        self.missing -= 1
        if not self.missing and not self.future.done():
            self.future.set_result(self.answers)  # type: ignore[arg-type]  # none is missing

    def fail(self, error: BaseException) -> None:
        """Settle the request with an error, unless it is settled."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """Settle the request as too late, unless it is settled."""
        self.fail(too_late())


class QueuedPart(Generic[PayloadT, AnswerT]):
    """A part in the queue. Compared by identity: two equal parts are two.

    Attributes:
        index: its place among the request's parts.
        number: its place among all that ever came, by which the oldest is known.
        part: the rows.
        request: to which they belong.
        since: when it came, in the event loop's time.
    """

    __slots__ = ("index", "number", "part", "request", "since")

    def __init__(
        self, part: Part[PayloadT], request: QueuedRequest[AnswerT], index: int, number: int, since: float
    ) -> None:
        self.part = part
        self.request = request
        self.index = index
        self.number = number
        self.since = since


def reported(
    together: Sequence[QueuedPart[PayloadT, AnswerT]], began: float, ended: float, *, failed: bool
) -> RunReport:
    """Return the report of a run of these parts, from `began` to `ended` in the event loop's time."""
    return RunReport(
        parts=len(together),
        requests=len({entry.request for entry in together}),
        rows=sum(entry.part.rows for entry in together),
        units=sum(entry.part.units for entry in together),
        queue_s=tuple(began - entry.since for entry in together),
        run_s=ended - began,
        failed=failed,
    )


def too_late() -> DeadlineExceededError:
    """Return the error of a request whose time passed."""
    return DeadlineExceededError(
        "Expected an answer within the request's time. Received: none yet, and nobody waits for it any more. Try again "
        "later, with fewer rows, or with more time."
    )
