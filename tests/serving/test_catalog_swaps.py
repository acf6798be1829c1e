"""What becomes of a version that is replaced: of those who have found it, of its session, of its memory."""

import asyncio
import ctypes
import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.repositories import Repository

from bln_serve.runtime import OnnxSession
from bln_serve.serving import background as background_calls
from bln_serve.serving import catalog, loading, memory
from bln_serve.serving.background import Background
from bln_serve.serving.served_model import Users

IMAGES = {"instances": [[[0.0] * 8] * 8] * 2}
DEADLINE_S = 30

SWAPS = 10


@pytest.fixture
def watch(models: Repository, start: Callable[..., Any]) -> Callable[..., Any]:
    """Start a service that looks at the repository all the time."""
    return lambda **values: start(**{"paths": [models.path], "repository_poll_s": 0.02, **values})


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet[OnnxSession]]:
    """The sessions there are. The collector is off: nothing of them may wait for it."""
    made: weakref.WeakSet[OnnxSession] = weakref.WeakSet()
    real = OnnxSession.__init__

    def note(self: OnnxSession, *arguments: Any, **more: Any) -> None:
        made.add(self)
        real(self, *arguments, **more)

    monkeypatch.setattr(OnnxSession, "__init__", note)
    gc.disable()
    yield made
    gc.enable()


def resident_mb() -> float:
    """Return the memory of this process that is in use, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_a_request_that_has_found_a_version_is_answered_by_it_whatever_comes(
    models: Repository, watch: Callable[..., Any], sessions: weakref.WeakSet[OnnxSession]
) -> None:
    """Its body is not there yet when the next version takes over."""
    models.put("digits_cnn", "digits/1")
    service = watch()
    content = json.dumps(IMAGES).encode()

    async def body(go_on: asyncio.Event) -> AsyncIterator[bytes]:
        yield content[:10]
        await go_on.wait()
        yield content[10:]

    async def scenario() -> Any:
        go_on = asyncio.Event()
        headers = {"content-type": "application/json"}
        found = asyncio.create_task(service._client.post("/predict", content=body(go_on), headers=headers))
        async with asyncio.timeout(DEADLINE_S):
            while not service.catalog.readiness().served[0].users._count:
                await asyncio.sleep(0.005)
            models.put("digits_rnn", "digits/2")
            while service.serves() != 2:
                await asyncio.sleep(0.005)
        later = await service._client.post("/predict", json=IMAGES)
        status = (await service._client.get("/v1/models/digits")).json()["model_version_status"]
        go_on.set()
        return await found, later, {each["version"]: each["state"] for each in status}

    found, later, states = service.run(scenario())
    assert (found.status_code, found.json()["version"]) == (200, 1)
    assert (later.status_code, later.json()["version"]) == (200, 2)
    assert states == {"1": "UNLOADING", "2": "AVAILABLE"}
    service.until(lambda: len(sessions) == 1)


def test_what_is_queued_for_a_version_that_has_left_is_refused_at_the_end_of_the_time_to_shut_down(
    models: Repository, watch: Callable[..., Any]
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    (old,) = service.catalog.readiness().served
    models.put("digits_cnn", "digits/2")
    with old.users:
        service.until(lambda: service.serves() == 2)
        assert old in service.catalog._everyone()
        old.queue._queued_rows = 7
        assert service.catalog.abort() == 7
        assert old.queue._aborted


def test_nobody_uses_what_everybody_has_left() -> None:
    async def scenario() -> None:
        users = Users()
        await users.gone()
        with users:
            waiting = asyncio.create_task(users.gone())
            with users:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, DEADLINE_S)

    asyncio.run(scenario())


def test_sessions_and_threads_end_with_their_versions(
    models: Repository, watch: Callable[..., Any], sessions: weakref.WeakSet[OnnxSession]
) -> None:
    """Without the collector, which no longer looks at what was there when the service became ready."""
    models.put("digits_cnn", "digits/1")
    service = watch()
    for version in range(2, SWAPS + 2):
        models.put("digits_cnn", f"digits/{version}")
        service.until(lambda version=version: service.serves() == version)
        assert service.post("/predict", json=IMAGES).status_code == 200
        models.take_away(f"digits/{version - 1}")
        service.until(lambda: len(sessions) == 1 and not service.catalog._leaving)
        service.until(lambda: not service.catalog._some_left and not service.catalog.background_busy)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("run-")]
    assert len(threads) <= 2, "each version's thread ends with it"


def test_what_was_freed_between_what_is_still_in_use_is_given_back() -> None:
    """glibc itself gives back what lies at the end alone."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    memory.give_back()
    blocks = [np.ones(7500) for _ in range(1500)]  # 90 MB, each below the size for which the system is asked alone
    in_use = resident_mb()
    blocks = blocks[::50]
    kept = resident_mb()
    memory.give_back()
    assert resident_mb() < in_use - 70
    assert kept > in_use - 20, "otherwise this shows nothing"


def test_a_version_whose_loading_hangs_does_not_hold_up_the_end(
    models: Repository, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models.put("digits_cnn", "digits/1")
    service = watch()
    go_on = threading.Event()
    monkeypatch.setattr(catalog, "load", lambda *_, **__: go_on.wait(DEADLINE_S) and loading.load(*_, **__))
    models.put("digits_cnn", "digits/2")
    service.until(lambda: service.catalog._trying is not None)
    began = time.monotonic()
    service.run(service.catalog.close())
    assert time.monotonic() - began < DEADLINE_S / 2
    assert service.catalog.background_busy
    go_on.set()


def test_the_background_hands_over_what_a_function_returns_or_raises() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        background = Background()
        assert await background.call(lambda: threading.current_thread().daemon)
        with pytest.raises(ZeroDivisionError):
            await background.call(fail)
        while background.busy:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_cancelled_caller_of_the_background_goes_on_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    begun, go_on = threading.Event(), threading.Event()

    async def scenario() -> Background:
        background = Background()

        def work() -> None:
            begun.set()
            go_on.wait(DEADLINE_S)

        waiting = asyncio.create_task(background.call(work))
        await asyncio.to_thread(begun.wait, DEADLINE_S)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return background

    background = asyncio.run(scenario())
    assert background.busy
    go_on.set()
    background._threads[0].join(DEADLINE_S)
    assert not background.busy
    assert "exception" not in caplog.text


def test_a_caller_cancelled_before_its_thread_has_begun_leaves_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    begins, called = threading.Event(), []

    class LateThread(threading.Thread):
        def run(self) -> None:
            begins.wait(DEADLINE_S)
            super().run()

    monkeypatch.setattr(background_calls, "Thread", LateThread)

    async def scenario() -> Background:
        background = Background()
        waiting = asyncio.create_task(background.call(lambda: called.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return background

    background = asyncio.run(scenario())
    begins.set()
    background._threads[0].join(DEADLINE_S)
    assert not background.busy
    assert called == []
