"""Whatever happens to the others, each request ends as it would alone."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.queues import (
    Queue,
    Run,
    in_time,
    outcomes,
    the_end_of_the_thread,
    the_loop,
    turns,
)

from bln_serve.errors import DeadlineExceededError, OverloadedError, RequestTooLargeError
from bln_serve.serving.queued import Part, RunReport


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
            loop_rows=0 if in_thread else MAX_RUN_ROWS,
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
    if abort:  # a part of more rows than a run on the loop may have is in the thread, too
        await the_end_of_the_thread("run-model")
    for request, outcome in enumerate(ended):
        trial.check_outcome(request, outcome)
    trial.check_runs(ended)
