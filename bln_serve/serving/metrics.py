"""What Prometheus is told: of requests, how they ended and how long they took; of runs, what shared them.

Names and units follow https://prometheus.io/docs/practices/naming/: seconds, `_total`, labels `model` and `version`.
The seconds of waiting and of computing are apart. How many requests a run holds shows whether merging does anything.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from bln_serve.manifest import Manifest
from bln_serve.serving.batching import RunReport

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MODEL = ("model", "version")


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "bln_requests", "Requests that ask a model, by the status of their answer", ("status",), registry=registry
        )
        self._refusals = Counter(
            "bln_refusals", "Requests answered with an error, by its kind", ("reason",), registry=registry
        )
        self._seconds = Histogram(
            "bln_request_seconds", "From a request's arrival to its answer", buckets=_SECONDS, registry=registry
        )
        self.in_flight = Gauge("bln_requests_in_flight", "Requests that ask a model, unanswered", registry=registry)
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
        self._queued_rows = Gauge("bln_queued_rows", "Rows of unanswered requests", _MODEL, registry=registry)
        self._info = Gauge(
            "bln_model_info",
            "1 for each model that is served",
            (*_MODEL, "statistics", "row_coupling", "max_run_rows"),
            registry=registry,
        )

    def answered(self, status: int, seconds: float, reason: str) -> None:
        """Count a request.

        Args:
            status: of its answer.
            seconds: from its arrival.
            reason: the kind of error; empty for none.
        """
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)
        if reason:
            self._refusals.labels(reason).inc()

    def serve(self, name: str, version: int, manifest: Manifest, max_run_rows: int) -> Callable[[RunReport], None]:
        """Begin to tell of a model, and return what is to be called after each of its runs."""
        labels = (name, str(version))
        self._info.labels(*labels, manifest.statistics or "none", str(manifest.row_coupling), max_run_rows).set(1)
        queue_seconds, run_seconds = self._queue_seconds.labels(*labels), self._run_seconds.labels(*labels)
        run_rows, run_requests = self._run_rows.labels(*labels), self._run_requests.labels(*labels)
        run_mini_batches = self._run_mini_batches.labels(*labels) if manifest.rule else None
        failed = self._failed_runs.labels(*labels)

        def report(run: RunReport) -> None:
            for seconds in run.queue_s:
                queue_seconds.observe(seconds)
            run_seconds.observe(run.run_s)
            run_rows.observe(run.rows)
            run_requests.observe(run.requests)
            if run_mini_batches:
                run_mini_batches.observe(run.units)
            if run.failed:
                failed.inc()

        return report

    def watch_queue(self, name: str, version: int, queued_rows: Callable[[], int]) -> None:
        """Ask for a model's queued rows whenever the metrics are read."""
        self._queued_rows.labels(name, str(version)).set_function(queued_rows)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the text that Prometheus reads and its content type, in the format that it accepts."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
