"""A version that is served: its queue, those who use it, and its end."""

import asyncio
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from bln_serve.manifest import Manifest
from bln_serve.repository import ModelVersion
from bln_serve.serving.batching import RunQueue
from bln_serve.serving.loading import Loaded
from bln_serve.serving.merging import Portion, SharedRun, join, parts_of
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.prediction import Work
from bln_serve.serving.settings import Settings
from bln_serve.signature import Arrays


class Users:
    """Counts the requests that use a version: from the moment they know which one they ask until they are answered."""

    __slots__ = ("_count", "_nobody")

    def __init__(self) -> None:
        self._count = 0
        self._nobody: asyncio.Event | None = None

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count -= 1
        if self._nobody and not self._count:
            self._nobody.set()

    async def gone(self) -> None:
        """Wait until nobody is left. Who comes then has found the version before it was taken away, or not at all."""
        self._nobody = asyncio.Event()
        if self._count:
            await self._nobody.wait()


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded and verified version with its queue. Compared by identity: a version may leave and come back.

    Attributes:
        source: what was loaded.
        manifest: what it says of itself.
        max_run_rows: the most rows of a run, unless a single mini-batch has more.
        shared: whether requests share runs.
        queue: where its requests wait and run.
        users: to be entered by each request before it waits for anything else: it may then queue, whatever replaces
            the version meanwhile.
    """

    source: ModelVersion
    manifest: Manifest
    max_run_rows: int
    shared: bool
    queue: RunQueue[Portion, Arrays]
    users: Users = field(default_factory=Users)

    @property
    def name(self) -> str:
        """As the repository calls it."""
        return self.source.name

    @property
    def version(self) -> int:
        """As the repository numbers it."""
        return self.source.version

    async def answer(self, work: Work, deadline: float | None = None) -> Arrays:
        """Answer a checked request: what it would get alone, whatever shares its runs.

        Args:
            work: as `prepare` returns it for this model.
            deadline: when the answer is too late, in the event loop's time; None for never.

        Raises:
            RequestTooLargeError, OverloadedError, DeadlineExceededError: as the queue does.
            RunError: ONNX Runtime refused a run.
        """
        several = self.manifest.several_mini_batches
        parts = parts_of(work, self.max_run_rows, several_mini_batches=several, shared=self.shared)
        return join(await self.queue.answer(parts, deadline))

    async def let_go(self) -> None:
        """Answer what still uses it, and end. Its memory goes back when the last reference to it does."""
        await self.users.gone()
        await self.queue.close()


def begin(loaded: Loaded, settings: Settings, metrics: Metrics, alone: Callable[[], bool]) -> ServedModel:
    """Give a loaded version its queue, within the running event loop, and begin to tell of it in the metrics.

    Args:
        loaded: the version.
        settings: the bounds of queues and runs.
        metrics: where its runs are counted.
        alone: says whether a request that comes is the only one that the service has.
    """
    version, manifest = loaded.version, loaded.model.manifest
    max_run_rows = settings.run_rows_of(version.name) or loaded.cost.max_run_rows
    queue = RunQueue[Portion, Arrays](
        SharedRun(loaded.model),
        **_bound(manifest, settings),
        max_run_rows=max_run_rows,
        loop_rows=loaded.cost.loop_rows,
        alone=alone,
        report=metrics.serve(version.name, version.version, manifest, max_run_rows),
        name=version.name,
    )
    held_weakly = weakref.ref(queue)  # whatever the metrics keep, a version that has left is not kept by them
    metrics.watch_queue(
        version.name, version.version, lambda: there.queued_rows if (there := held_weakly()) is not None else 0
    )
    return ServedModel(version, manifest, max_run_rows, not settings.deterministic, queue)


def _bound(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """Return how many rows may be queued, and the option that says so: rows of one model have one size."""
    inputs = manifest.signature.inputs
    row_bytes = sum(math.prod(size or 1 for size in spec.shape) * np.dtype(spec.dtype).itemsize for spec in inputs)
    rows = max(1, settings.max_queued_bytes // max(1, row_bytes))
    if rows < settings.max_queued_rows:
        return {"max_queued_rows": rows, "bound": "--max-queued-bytes"}
    return {"max_queued_rows": settings.max_queued_rows, "bound": "--max-queued-rows"}


def describe(served: ServedModel) -> str:
    """Say in one line what is served and what may be sent."""
    manifest = served.manifest
    inputs = ", ".join(f"{spec.name!r} {spec.describe()}" for spec in manifest.signature.inputs)
    rule = manifest.rule
    may_be_sent = "any number of rows"
    if rule:
        most = f", at most {rule.max_rows}" if rule.max_rows else ""
        may_be_sent = f"rows in mini-batches of {rule.default_rows}, at least {rule.min_rows}{most}"
    return (
        f"serving {served.name} version {served.version}: statistics {manifest.statistics or 'none'}, "
        f"row coupling {manifest.row_coupling} ({manifest.row_coupling_reason}); send {inputs}, {may_be_sent}, "
        f"to /models/{served.name}/predict"
    )
