"""What Prometheus is told: of requests, how they ended and how long they took; of runs, what shared them.

Names and units follow https://prometheus.io/docs/practices/naming/: seconds, `_total`, labels `model` and `version`.
The seconds of waiting and of computing are apart. How many requests a run holds shows whether merging does anything.

Several workers tell of themselves together: each writes its numbers into files of its own, in a folder that all share,
and whichever is asked adds up what is there (https://prometheus.github.io/client_python/multiprocess/). A worker that
takes the place of a dead one goes on in its files, so that no counter falls.

What is to be counted is noted first and counted many at a time. Between two runs of a model nothing is in the
processor's caches that counting needs, and each time it would have to be fetched anew.
"""

import os
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from bln_serve.manifest import Manifest
from bln_serve.serving.batching import RunReport
from bln_serve.serving.lifeline import METRICS_FOLDER

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MODEL = ("model", "version")
_INFO = "bln_model_info"
_NOTED = 128  # which take half a millisecond to count


def share(number: int) -> None:
    """Have the metrics made from now on add up with those of other processes, in the folder that METRICS_FOLDER names.

    Args:
        number: of this process among those that run; whoever takes its place has it, too.
    """
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


def folder_of_all() -> str | None:
    """Return the folder in which processes share their metrics; None where this one shares with nobody."""
    return os.environ.get(METRICS_FOLDER)


class Metrics:
    """The service's metrics, in a registry of their own; where they are shared, together with other processes'.

    Attributes:
        in_flight: requests that ask a model, unanswered.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._exposed = registry
        self._shared = folder_of_all() is not None
        if self._shared:
            self._exposed = CollectorRegistry()
            self._exposed.register(_OfAllProcesses())
        self._queues: dict[tuple[str, str], tuple[Gauge, Callable[[], int]]] = {}
        self._requests = Counter(
            "bln_requests", "Requests that ask a model, by the status of their answer", ("status",), registry=registry
        )
        self._refusals = Counter(
            "bln_refusals", "Requests answered with an error, by its kind", ("reason",), registry=registry
        )
        self._seconds = Histogram(
            "bln_request_seconds", "From a request's arrival to its answer", buckets=_SECONDS, registry=registry
        )
        self.in_flight = 0
        self._answered: list[tuple[int, float, str]] = []
        self._runs: list[tuple[Callable[[RunReport], None], RunReport]] = []
        self._in_flight = Gauge(
            "bln_requests_in_flight",
            "Requests that ask a model, unanswered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue_seconds = Histogram(
            "bln_queue_seconds",
            "A mini-batch's wait, or a request's rows'",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self._run_seconds = Histogram(
            "bln_run_seconds", "One run of the model", _MODEL, buckets=_SECONDS, registry=registry
        )
        self._run_rows = Histogram("bln_run_rows", "Rows of one run", _MODEL, buckets=_COUNTS, registry=registry)
        self._run_requests = Histogram(
            "bln_run_requests", "Requests that share one run", _MODEL, buckets=_COUNTS, registry=registry
        )
        self._run_mini_batches = Histogram(
            "bln_run_mini_batches",
            "Mini-batches of one run, where rows are coupled",
            _MODEL,
            buckets=_COUNTS,
            registry=registry,
        )
        self._failed_runs = Counter("bln_failed_runs", "Runs that failed", _MODEL, registry=registry)
        self._queued_rows = Gauge(
            "bln_queued_rows", "Rows of unanswered requests", _MODEL, registry=registry, multiprocess_mode="livesum"
        )
        self._info = Gauge(
            _INFO,
            "1 for each model that is served",
            (*_MODEL, "statistics", "row_coupling", "max_run_rows"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._with_status: dict[int, Counter] = {}
        self._with_reason: dict[str, Counter] = {}

    def answered(self, status: int, seconds: float, reason: str) -> None:
        """Count a request.

        Args:
            status: of its answer.
            seconds: from its arrival.
            reason: the kind of error; empty for none.
        """
        self._answered.append((status, seconds, reason))
        if len(self._answered) >= _NOTED:
            self.refresh()

    def _count(self, status: int, seconds: float, reason: str) -> None:
        if (requests := self._with_status.get(status)) is None:
            requests = self._with_status[status] = self._requests.labels(status)
        requests.inc()
        self._seconds.observe(seconds)
        if reason:
            if (refusals := self._with_reason.get(reason)) is None:
                refusals = self._with_reason[reason] = self._refusals.labels(reason)
            refusals.inc()

    def serve(self, name: str, version: int, manifest: Manifest, max_run_rows: int) -> Callable[[RunReport], None]:
        """Begin to tell of a model, and return what is to be called after each of its runs."""
        labels = (name, str(version))
        self._info.labels(*labels, manifest.statistics or "none", str(manifest.row_coupling), max_run_rows).set(1)
        queue_seconds, run_seconds = self._queue_seconds.labels(*labels), self._run_seconds.labels(*labels)
        run_rows, run_requests = self._run_rows.labels(*labels), self._run_requests.labels(*labels)
        run_mini_batches = self._run_mini_batches.labels(*labels) if manifest.rule else None
        failed = self._failed_runs.labels(*labels)

        def count(run: RunReport) -> None:
            for seconds in run.queue_s:
                queue_seconds.observe(seconds)
            run_seconds.observe(run.run_s)
            run_rows.observe(run.rows)
            run_requests.observe(run.requests)
            if run_mini_batches:
                run_mini_batches.observe(run.units)
            if run.failed:
                failed.inc()

        return lambda run: self._runs.append((count, run))

    def leave(self, name: str, version: int, manifest: Manifest, max_run_rows: int) -> None:
        """Cease to tell of a model as one that is served. What was counted stays, for what is asked of all versions."""
        labels = (name, str(version))
        info = (*labels, manifest.statistics or "none", str(manifest.row_coupling), max_run_rows)
        del self._queues[labels]
        if self._shared:  # what is in the files can only be changed
            self._info.labels(*info).set(0)
            self._queued_rows.labels(*labels).set(0)
        else:
            self._info.remove(*info)
            self._queued_rows.remove(*labels)

    def watch_queue(self, name: str, version: int, queued_rows: Callable[[], int]) -> None:
        """Ask for a model's queued rows at each `refresh`."""
        labels = (name, str(version))
        self._queues[labels] = self._queued_rows.labels(*labels), queued_rows

    def refresh(self) -> None:
        """Count what was noted; to be called now and then where other processes tell of this one."""
        answered, self._answered = self._answered, []
        for status, seconds, reason in answered:
            self._count(status, seconds, reason)
        runs, self._runs = self._runs, []
        for count, run in runs:
            count(run)
        self._in_flight.set(self.in_flight)
        for gauge, queued_rows in self._queues.values():
            gauge.set(queued_rows())

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the text that Prometheus reads and its content type, in the format that it accepts."""
        self.refresh()
        encode, content_type = choose_encoder(accept)
        return encode(self._exposed), content_type


class _OfAllProcesses(Collector):
    """What the processes that share a folder have counted together, without the models that have left."""

    def collect(self) -> Iterable[Metric]:
        for metric in MultiProcessCollector(None).collect():  # type: ignore[no-untyped-call]
            if metric.name == _INFO:
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric
