"""Workers that are ready only together: one of them in this process, the others by what they leave in the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bln_serve.serving.together import Together, WorkersReady, ready_file


def test_a_worker_is_ready_with_the_last_of_them_and_says_how_many_are_not(
    start: Callable[..., Any], golden_artifacts: Path, tmp_path: Path
) -> None:
    service = start(paths=[golden_artifacts / "digits_cnn"])
    workers = [Together(str(tmp_path), number, 3) for number in range(3)]
    service.catalog.workers_ready = workers[0].workers_ready

    def asked() -> tuple[int, dict[str, int]]:
        answer = service.get("/readyz")
        document = answer.json()
        assert document["ready"] is (answer.status_code == 200)
        assert service.get("/v2/health/ready").json() == {"ready": document["ready"]}
        assert (document["loading"], document["broken"]) == ([], [])
        return answer.status_code, document["workers"]

    for ready, worker in enumerate(workers):
        assert asked() == (503, {"ready": ready, "count": 3})
        worker.tell(ready=True)
    assert asked() == (200, {"ready": 3, "count": 3})
    workers[1].tell(ready=False)
    assert asked() == (503, {"ready": 2, "count": 3})
    workers[1].tell(ready=True)
    ready_file(str(tmp_path), 2).unlink()  # as the supervisor does when that one has died
    assert asked() == (503, {"ready": 2, "count": 3})


def test_one_process_says_nothing_of_workers(start: Callable[..., Any], golden_artifacts: Path) -> None:
    assert "workers" not in start(paths=[golden_artifacts / "digits_cnn"]).get("/readyz").json()


@pytest.mark.parametrize("told", [[True], [False], [True, False], [True, True], [False, False, True]])
def test_the_others_see_what_was_told_last(tmp_path: Path, told: list[bool]) -> None:
    worker, other = (Together(str(tmp_path), number, 2) for number in range(2))
    for ready in told:
        worker.tell(ready=ready)
    assert other.workers_ready() == WorkersReady(told[-1], 2)
