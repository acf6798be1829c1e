"""The requests that are in the house: each is looked at now and then, lest its body never comes or its client has left.

A timer for each request would cost more than reading a small one. One timer looks at all of them, twenty times a
second, and finds nearly every request answered before its first look.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from bln_serve.errors import BodyTimeoutError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

LOOK_EVERY_S = 0.05


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is there to answer."""


class Visit:
    """One request, from its arrival to its answer: a context of the task that answers it.

    While its body comes, it must come in time; after that the client must be there. Otherwise the task is cancelled
    where it waits, and leaves this context with the error that says why. No other cancellation is touched.

    Args:
        visits: where it is looked after.
        receive: of the request.
        arrived: in the event loop's time.
        deadline: when its body must be complete, in the event loop's time.
        idle_timeout_s: seconds that may pass without any part of the body.

    Raises:
        BodyTimeoutError: the body was not complete in time, or stopped coming.
        ClientGoneError: the client closed its connection before the answer was there.
    """

    __slots__ = (
        "_deadline",
        "_error",
        "_idle_timeout_s",
        "_last_part",
        "_receive",
        "_size",
        "_task",
        "_visits",
        "_watch",
        "arrived",
    )

    def __init__(
        self, visits: "Visits", receive: Receive, arrived: float, deadline: float, idle_timeout_s: float
    ) -> None:
        self.arrived = arrived
        self._visits = visits
        self._receive = receive
        self._deadline: float | None = deadline  # None once the body is complete
        self._idle_timeout_s = idle_timeout_s
        self._last_part = arrived
        self._size = 0
        self._task = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Visit":
        """Have the request looked after."""
        self._visits.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it go."""
        self._visits.remove(self)
        if self._watch:
            self._watch.cancel()
        if self._error and self._task and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise self._error from None

    def comes(self, size: int) -> None:
        """Note that a part of the body has come, `size` bytes in all, and others are to follow."""
        self._size = size
        self._last_part = asyncio.get_running_loop().time()

    def has_come(self, size: int) -> None:
        """Note that the body is complete."""
        self._size = size
        self._deadline = None

    def look(self, now: float) -> None:
        """Cancel the task if its request cannot be answered any more."""
        if self._error:
            return
        if self._deadline is None:
            if self._watch is None:
                self._watch = asyncio.get_running_loop().create_task(self._watch_client())
        elif now >= self._deadline:
            self._end(_body_too_late(self._size, "within the request's time", "--request-timeout-s"))
        elif now - self._last_part >= self._idle_timeout_s:
            self._end(_body_too_late(self._size, f"without a pause of {self._idle_timeout_s:g} s", "--idle-timeout-s"))

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientGoneError())

    def _end(self, error: Exception) -> None:
        self._error = error
        if self._task:
            self._task.cancel()


class Visits:
    """All requests that ask a model and are not answered yet. Made and used within one running event loop."""

    def __init__(self) -> None:
        self._present: dict[Visit, None] = {}
        self._timer_runs = False

    def add(self, visit: Visit) -> None:
        """Look after a request from now on; they come in the order of their arrival."""
        self._present[visit] = None
        if not self._timer_runs:
            self._timer_runs = True
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def remove(self, visit: Visit) -> None:
        """Look after it no longer."""
        del self._present[visit]

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for visit in list(self._present):
            if now - visit.arrived < LOOK_EVERY_S / 2:  # those behind it are younger still
                break
            visit.look(now)
        self._timer_runs = bool(self._present)
        if self._timer_runs:
            loop.call_later(LOOK_EVERY_S, self._look)


def _body_too_late(size: int, how: str, option: str) -> BodyTimeoutError:
    return BodyTimeoutError(
        f"Expected the whole body {how}. Received: {size} bytes of it. Send it faster, or start the service with a "
        f"longer {option}."
    )
