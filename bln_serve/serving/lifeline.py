"""What ties a worker to the process that started it: a socket pair, one end of which is the worker's standard input.

worker -> LISTENING     its part of the port is open
GO     -> worker        all of them are, so begin to answer
DRAIN  -> worker        answer what was accepted, and end
end of file             the other one is gone: a worker then drains, and no port stays taken by an orphan
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

LISTENING = b"l"
GO = b"g"
DRAIN = b"d"

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable in which prometheus_client finds the folder where workers share their metrics."""

# How long after its time to shut down a worker may take to end by itself.
LAST_WORDS_S = 2

# How long an orphan may: no process waits for it, and on a busy machine its last refusals take their time.
_ORPHANS_LAST_WORDS_S = 10

_FAILED = 1


class Lifeline:
    """A worker's end.

    Made first of all, since it also takes the signals away: Ctrl-C reaches a worker and the process that started it,
    and that one says what to do.

    Attributes:
        orphaned: whether the process that started it is gone.
    """

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._socket = socket.socket(fileno=os.dup(0))
        self.orphaned = False

    def report_listening(self) -> bool:
        """Say that this worker listens, wait for the others, and return whether to begin."""
        try:
            self._socket.send(LISTENING)
            return self._socket.recv(1) == GO
        except OSError:  # nobody is there
            return False

    def obey(self, drain: Callable[[], None], shutdown_timeout_s: float) -> None:
        """Drain when told to, or when nobody is left to tell; in that case be gone in time.

        Args:
            drain: called in a thread of its own, once or twice.
            shutdown_timeout_s: in which the worker ends after that.
        """
        threading.Thread(target=self._obey, args=(drain, shutdown_timeout_s), name="lifeline", daemon=True).start()

    def _obey(self, drain: Callable[[], None], shutdown_timeout_s: float) -> None:
        while self._order() == DRAIN:
            drain()
        self.orphaned = True
        drain()
        time.sleep(shutdown_timeout_s + _ORPHANS_LAST_WORDS_S)
        os._exit(_FAILED)

    def _order(self) -> bytes:
        try:
            return self._socket.recv(1)
        except OSError:
            return b""
