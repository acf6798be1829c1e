"""How many processors this process may use: those it may run on, and the time on them that its container grants.

A container's CPU limit is a quota: so many microseconds of processor time in each period, 100 ms unless set otherwise,
on however many processors. The affinity, and so the count that most programs go by, shows nothing of it.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), https://docs.kernel.org/scheduler/sched-bwc.html
(version 1: cpu.cfs_quota_us, cpu.cfs_period_us), and cgroups(7) and cgroup_namespaces(7) for /proc/self/cgroup.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# A positive number that the kernel's 64 bits can hold.
_MICROSECONDS = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)


@dataclass(frozen=True)
class Processors:
    """What this process may use.

    Attributes:
        affinity: how many processors its threads may run on.
        quota: processor seconds a second that its control group grants, which need be no whole number; None for no
            limit but the affinity.
    """

    affinity: int
    quota: float | None

    @property
    def count(self) -> int:
        """How many threads can be kept busy without a pause, at least 1.

        The quota is rounded down. ONNX Runtime's threads spin while they wait for work, so that a thread beyond the
        quota uses up the period's time early, and then every thread of the container stands still, those that answer
        /healthz too, until the next period begins.
        """
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))

    def share(self, processes: int) -> int:
        """Return how many of these threads each of so many processes may have, at least 1."""
        return max(1, self.count // processes)

    def __str__(self) -> str:
        count = f"{self.count} processor{'s' if self.count > 1 else ''}"
        return count if self.quota is None else f"{count} (a CPU quota of {self.quota:g}; {self.affinity} by affinity)"


def threads_of_a_run(given: int | None, workers: int = 1) -> str:
    """Say how many threads a run has, and why.

    Args:
        given: as set; None for this process's share of what is available.
        workers: how many processes there are.
    """
    each = f" in each of {workers} workers" if workers > 1 else ""
    if given:
        return f"{given}{each}, as set"
    processors = available()
    return f"{processors.share(workers)}{each}, for {processors}"


def available(root: Path = Path("/")) -> Processors:
    """Read the affinity of the calling thread and the CPU quota of this process.

    Args:
        root: the folder that holds proc/ and sys/, for tests.

    Returns:
        The smallest quota of the process's control group and of the groups that hold it. A file that is missing, cannot
        be read or holds something else stands for no quota.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processors(affinity, min(_quotas(root), default=None))


def _quotas(root: Path) -> Iterator[float]:
    mounts = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if (hierarchy, controllers) == ("0", ""):
            # Beside mounts of version 1, version 2 is mounted as `unified`.
            yield from _quotas_of(group, (mounts, mounts / "unified"), _quota_v2)
        elif "cpu" in controllers.split(","):
            yield from _quotas_of(group, (mounts / controllers, mounts / "cpu"), _quota_v1)


def _quotas_of(group: str, mounts: tuple[Path, ...], quota_in: Callable[[Path], float | None]) -> Iterator[float]:
    """Yield the quotas of a group and of every group that holds it, wherever it is mounted.

    In a container without a cgroup namespace the group's name is the host's, while the mount's root is the container's
    own group: folders of that name do not exist there, and the root counts all the same. A name that leads upwards is
    of a process outside the mount's groups, whose quotas are not its own.
    """
    parts = PurePosixPath(group.lstrip("/")).parts
    if not group.startswith("/") or ".." in parts:
        return
    for mount in mounts:
        for depth in range(len(parts) + 1):
            quota = quota_in(mount.joinpath(*parts[:depth]))
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.max"))


def _quota_v1(folder: Path) -> float | None:
    return _ratio(f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}")


def _ratio(text: str) -> float | None:
    """Return quota / period, both in microseconds; None for `max`, for -1 and for what is no such pair."""
    numbers = text.split()
    if len(numbers) != 2 or not all(map(_MICROSECONDS.fullmatch, numbers)):
        return None
    return int(numbers[0]) / int(numbers[1])


def _read(path: Path) -> str:
    try:
        # A group's name may be any bytes, and leads to its folder as the same bytes.
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
