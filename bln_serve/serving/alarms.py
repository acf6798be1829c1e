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

    __slots__ = ("_loop", "_ring", "_timer", "_when")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._ring: Callable[[], None] | None = None
        self._when = 0.0

    def __bool__(self) -> bool:
        """Whether it is set."""
        return self._ring is not None

    def set(self, seconds: float, ring: Callable[[], None]) -> None:
        """Call `ring` in so many seconds, and forget what it was set to before."""
        self._ring = ring
        self._when = when = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._look)
        elif self._timer.when() > when:
            self._timer.cancel()
            self._timer = self._loop.call_at(when, self._look)

    def stop(self) -> None:
        """Do not ring."""
        self._ring = None

    def end(self) -> None:
        """Do not ring, and leave nothing with the event loop either."""
        self._ring = None
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._ring is None:
            return
        if self._loop.time() < self._when:
            self._timer = self._loop.call_at(self._when, self._look)
        else:
            ring, self._ring = self._ring, None
            ring()
