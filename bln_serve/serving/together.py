"""Workers that are ready only together: whoever asks one of them for readiness will have its requests go to any.

Each leaves a file in the folder that all share while it is ready by itself, and so the readiness of all is a look at
the folder. The file of a worker that died is removed by the process that starts another.
"""

from dataclasses import dataclass
from pathlib import Path


def ready_file(folder: str, number: int) -> Path:
    """Return the file that says that a worker is ready."""
    return Path(folder) / f"ready-{number}"


@dataclass(frozen=True)
class WorkersReady:
    """How many of the workers that share a port are ready by themselves.

    Attributes:
        ready: so many are.
        count: so many there are.
    """

    ready: int
    count: int


class Together:
    """One worker among others.

    Args:
        folder: that all share.
        number: of this worker, from 0.
        count: how many there are.
    """

    def __init__(self, folder: str, number: int, count: int) -> None:
        self._own = ready_file(folder, number)
        self._files = [ready_file(folder, each) for each in range(count)]
        self._told = False

    def tell(self, *, ready: bool) -> None:
        """Tell the others whether this one is ready by itself."""
        if ready and not self._told:
            self._own.touch()
        elif self._told and not ready:
            self._own.unlink(missing_ok=True)
        self._told = ready

    def workers_ready(self) -> WorkersReady:
        """Return how many of all are."""
        return WorkersReady(sum(file.exists() for file in self._files), len(self._files))
