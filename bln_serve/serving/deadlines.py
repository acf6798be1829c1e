"""When what waits has waited too long: one timer for all, since nearly everything is answered long before its time."""

import asyncio
import math
from typing import Protocol


class Expiring(Protocol):
    """What may wait too long. Compared by identity."""

    def expire(self) -> None:
        """End, once its time has passed."""


class Deadlines:
    """Expires what is too late. Made and used within one running event loop.

    Args:
        loop: whose time it is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._when: dict[Expiring, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = math.inf

    def add(self, request: Expiring, when: float) -> None:
        """Expire it then, in the loop's time, unless it is removed before."""
        self._when[request] = when
        if when < self._next:
            self._wake_at(when)

    def remove(self, request: Expiring) -> None:
        """Do not expire it."""
        self._when.pop(request, None)

    def end(self) -> None:
        """Expire nothing any more."""
        if self._timer:
            self._timer.cancel()

    def _wake_at(self, when: float) -> None:
        self.end()
        self._next, self._timer = when, self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        now = self._loop.time()
        for request in [request for request, when in self._when.items() if when <= now]:
            self.remove(request)
            request.expire()
        self._next, self._timer = math.inf, None
        if self._when:
            self._wake_at(min(self._when.values()))
