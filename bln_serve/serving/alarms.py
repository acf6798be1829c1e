"""A wait that nearly always ends before its time, as a client's silence between two requests does.

Setting and cancelling a timer of the event loop for each request costs several times what the rest of its bookkeeping
does. So the loop's timer is left where it is, and looks, when it rings, whether the time has really come.
"""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once, at the time it was last set to. Used within one event loop.

    Args:
        loop: whose time it is.
    """

    __slots__ = ("_due", "_loop", "_ring", "_timer", "_when")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.Handle | None = None
        self._due = 0.0  # when the timer rings; uvloop's own does not say so where that is at once
        self._ring: Callable[[], None] | None = None
        self._when = 0.0

    def set(self, seconds: float, ring: Callable[[], None]) -> None:
        """Call `ring` in so many seconds, and forget what it was set to before."""
        self._ring = ring
        self._when = when = self._loop.time() + seconds
        if self._timer is None:
            self._look_at(when)
        elif self._due > when:
            self._timer.cancel()
            self._look_at(when)

    def stop(self) -> None:
        """Do not ring."""
        self._ring = None

    def end(self) -> None:
        """Do not ring, and leave nothing with the event loop either."""
        self._ring = None
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _look_at(self, when: float) -> None:
        self._due, self._timer = when, self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._ring is None:
            return
        if self._loop.time() < self._when:
            self._look_at(self._when)
        else:
            ring, self._ring = self._ring, None
            ring()
