"""Work that takes long or may hang, as a disk may: in threads that neither requests nor the process's end wait for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class Background:
    """Calls functions, each in a thread of its own.

    Threads of the event loop's own pool would be waited for when the loop ends: for ever, where a disk hangs.
    """

    def __init__(self) -> None:
        self._threads: list[Thread] = []

    @property
    def busy(self) -> bool:
        """Whether a function is still being called, be it one that nobody waits for any more."""
        return any(thread.is_alive() for thread in self._threads)

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function. Whoever is cancelled while waiting goes on at once; what the function returns is lost then.

        Raises:
            Exception: what the function raises.
        """
        outcome: Future[T] = Future()

        def call() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                outcome.set_result(function())
            except BaseException as error:  # the waiting side's to judge
                outcome.set_exception(error)

        thread = Thread(target=call, name="background", daemon=True)
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()
        return await asyncio.wrap_future(outcome)
