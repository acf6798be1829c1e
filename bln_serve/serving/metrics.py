"""What Prometheus is told: of requests, how they ended and how long they took; of runs, what shared them.

Names and units follow https://prometheus.io/docs/practices/naming/: seconds, `_total`, labels `model` and `version`.
The seconds of waiting and of computing are apart. How many requests a run holds shows whether merging does anything.

Several workers tell of themselves together: each writes its numbers into files of its own, in a folder that all share,
and whichever is asked adds up what is there (https://prometheus.github.io/client_python/multiprocess/). A worker that
takes the place of a dead one goes on in its files, so that no counter falls.

What happens is tallied first (`tallies`), and told when the metrics are read.
"""

import os
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from bln_serve.manifest import Manifest
from bln_serve.serving.lifeline import METRICS_FOLDER
from bln_serve.serving.queued import RunReport
from bln_serve.serving.tallies import Tallies, Tally

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MODEL = ("model", "version")
_INFO = "bln_model_info"


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
        self._seconds_tally = Tally(self._seconds, _SECONDS)
        self._statuses, self._reasons = Tallies(self._requests), Tallies(self._refusals)
        self._of_seconds = {self._queue_seconds, self._run_seconds}
        self._of_models: dict[tuple[Histogram, tuple[str, str]], Tally] = {}
        self._tallies: list[Tally | Tallies] = [self._seconds_tally, self._statuses, self._reasons]

    def answered(self, status: int, seconds: float, reason: str) -> None:
        """Count a request.

        Args:
            status: of its answer.
            seconds: from its arrival.
            reason: the kind of error; empty for none.
        """
        self._statuses.note(status)
        self._seconds_tally.note(seconds)
        if reason:
            self._reasons.note(reason)

    def serve(self, name: str, version: int, manifest: Manifest, max_run_rows: int) -> Callable[[RunReport], None]:
        """Begin to tell of a model, and return what is to be called after each of its runs."""
        labels = (name, str(version))
        self._info.labels(*labels, manifest.statistics or "none", str(manifest.row_coupling), max_run_rows).set(1)
        queue_seconds, run_seconds = self._tally(self._queue_seconds, labels), self._tally(self._run_seconds, labels)
        run_rows, run_requests = self._tally(self._run_rows, labels), self._tally(self._run_requests, labels)
        run_mini_batches = self._tally(self._run_mini_batches, labels) if manifest.rule else None
        failed = self._failed_runs.labels(*labels)

        def report(run: RunReport) -> None:
            for seconds in run.queue_s:
                queue_seconds.note(seconds)
            run_seconds.note(run.run_s)
            run_rows.note(run.rows)
            run_requests.note(run.requests)
            if run_mini_batches:
                run_mini_batches.note(run.units)
            if run.failed:
                failed.inc()

        return report

    def _tally(self, histogram: Histogram, labels: tuple[str, str]) -> Tally:
        """Return the tally of a model's histogram, the same for a version that comes back."""
        if (tally := self._of_models.get((histogram, labels))) is None:
            tally = Tally(histogram.labels(*labels), _SECONDS if histogram in self._of_seconds else _COUNTS)
            self._of_models[histogram, labels] = tally
            self._tallies.append(tally)
        return tally

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
        """Tell what was tallied; to be called now and then where other processes tell of this one."""
        for tally in self._tallies:
            tally.hand_over()
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
