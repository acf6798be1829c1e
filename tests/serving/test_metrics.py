"""What Prometheus reads: of one process, and of several that share a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bln_serve.artifact import Artifact
from bln_serve.manifest import Manifest
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.queued import RunReport

RUN = RunReport(parts=3, requests=2, rows=6, units=3, queue_s=(0.001, 0.002, 0.003), run_s=0.004, failed=False)


@pytest.fixture
def manifest(golden_artifacts: Path) -> Manifest:
    return Artifact.open(golden_artifacts / "digits_rnn" / "1").manifest


def samples(metrics: Metrics) -> dict[str, float]:
    text, content_type = metrics.exposition("")
    assert content_type.startswith("text/plain")
    return read(text.decode())


def read(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_requests_are_counted_by_status_and_reason() -> None:
    metrics = Metrics()
    for status, reason in ((200, ""), (200, ""), (422, "MiniBatch"), (503, "Overloaded"), (503, "Overloaded")):
        metrics.answered(status, 0.25, reason)
    seen = samples(metrics)
    assert [seen[f'bln_requests_total{{status="{status}"}}'] for status in (200, 422, 503)] == [2, 1, 2]
    assert [seen[f'bln_refusals_total{{reason="{reason}"}}'] for reason in ("MiniBatch", "Overloaded")] == [1, 2]
    assert (seen["bln_request_seconds_count"], seen["bln_request_seconds_sum"]) == (5, 1.25)
    assert seen['bln_request_seconds_bucket{le="0.2"}'] == 0
    assert seen['bln_request_seconds_bucket{le="0.5"}'] == 5


def test_waiting_and_computing_are_apart(manifest: Manifest) -> None:
    metrics = Metrics()
    metrics.serve("digits", 3, manifest, 32)(RUN)
    seen = samples(metrics)
    labels = '{model="digits",version="3"}'
    assert (seen[f"bln_queue_seconds_count{labels}"], seen[f"bln_run_seconds_count{labels}"]) == (3, 1)
    assert seen[f"bln_queue_seconds_sum{labels}"] == pytest.approx(0.006)
    assert seen[f"bln_run_seconds_sum{labels}"] == 0.004
    rows, requests, mini_batches = (
        seen[f"bln_run_{what}_sum{labels}"] for what in ("rows", "requests", "mini_batches")
    )
    assert (rows, requests, mini_batches) == (6, 2, 3)
    assert seen[f"bln_failed_runs_total{labels}"] == 0


def test_queued_rows_are_those_of_the_moment_they_are_read(manifest: Manifest) -> None:
    metrics = Metrics()
    queued = 7
    metrics.serve("digits", 3, manifest, 32)
    metrics.watch_queue("digits", 3, lambda: queued)
    assert samples(metrics)['bln_queued_rows{model="digits",version="3"}'] == 7
    queued = 0
    assert samples(metrics)['bln_queued_rows{model="digits",version="3"}'] == 0


def test_of_a_version_that_left_only_what_was_counted_stays(manifest: Manifest) -> None:
    metrics = Metrics()
    for version in (3, 4, 3):  # and it may come back
        metrics.serve("digits", version, manifest, 32)(RUN)
        metrics.watch_queue("digits", version, lambda: 5)
        metrics.leave("digits", version, manifest, 32)
    seen = samples(metrics)
    assert not [name for name in seen if name.startswith(("bln_model_info", "bln_queued_rows"))]
    assert seen['bln_run_rows_sum{model="digits",version="3"}'] == 12


PROCESS = """
import sys
from pathlib import Path
from bln_serve.artifact import Artifact
from bln_serve.serving import metrics
from bln_serve.serving.queued import RunReport

metrics.share(int(sys.argv[1]))
mine = metrics.Metrics()
manifest = Artifact.open(Path(sys.argv[2])).manifest
report = mine.serve("digits", 3, manifest, 32)
mine.watch_queue("digits", 3, lambda: 5)
if "leave" in sys.argv:
    mine.leave("digits", 3, manifest, 32)
report(RunReport(parts=3, requests=2, rows=6, units=3, queue_s=(0.5,), run_s=0.25, failed=True))
mine.in_flight += 1
mine.answered(200, 0.25, "")
mine.answered(422, 0.25, "MiniBatch")
sys.stdout.write(mine.exposition("")[0].decode())
"""


def process(folder: Path, golden_artifacts: Path, number: int, *more: str) -> dict[str, float]:
    """Run a process that counts a little, and return what it reports at its end."""
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS, str(number), str(golden_artifacts / "digits_rnn" / "1"), *more],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return read(ended.stdout)


def test_processes_that_share_a_folder_report_the_sum(tmp_path: Path, golden_artifacts: Path) -> None:
    first = process(tmp_path, golden_artifacts, 0)
    both = process(tmp_path, golden_artifacts, 1)
    labels = '{model="digits",version="3"}'
    for name, value in (
        ('bln_requests_total{status="200"}', 1),
        ('bln_refusals_total{reason="MiniBatch"}', 1),
        (f"bln_failed_runs_total{labels}", 1),
        ("bln_request_seconds_count", 2),
        ('bln_request_seconds_bucket{le="0.5"}', 2),
        ("bln_request_seconds_sum", 0.5),
        (f"bln_run_rows_sum{labels}", 6),
        (f"bln_queued_rows{labels}", 5),
        ("bln_requests_in_flight", 1),
    ):
        assert (first[name], both[name]) == (value, 2 * value), name
    (info,) = [name for name in both if name.startswith("bln_model_info{")]
    assert both[info] == 1
    assert not [name for name in both if "pid" in name]


def test_who_takes_a_dead_process_s_place_goes_on_counting(tmp_path: Path, golden_artifacts: Path) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    process(tmp_path, golden_artifacts, 0)
    files = sorted(file.name for file in tmp_path.iterdir())
    mark_process_dead(0, str(tmp_path))
    again = process(tmp_path, golden_artifacts, 0)
    assert again['bln_requests_total{status="200"}'] == 2
    assert again["bln_requests_in_flight"] == 1, "what the dead one had in flight is gone with it"
    assert sorted(file.name for file in tmp_path.iterdir()) == files, "however often it dies, the folder does not grow"


def test_a_version_that_left_is_not_served_by_several_either(tmp_path: Path, golden_artifacts: Path) -> None:
    seen = process(tmp_path, golden_artifacts, 0, "leave")
    assert not [name for name in seen if name.startswith("bln_model_info")]
    assert seen['bln_queued_rows{model="digits",version="3"}'] == 0
