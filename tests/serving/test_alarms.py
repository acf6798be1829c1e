"""Alarms, on an event loop whose time passes when the test says so."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from bln_serve.serving.alarms import Alarm


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self._when, self.call, self.cancelled = when, call, False

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """As much of an event loop as an alarm asks."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, call))
        return self.timers[-1]

    @property
    def pending(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.cancelled]

    def pass_until(self, now: float) -> None:
        while due := [timer for timer in self.pending if timer.when() <= now]:
            timer = min(due, key=Timer.when)
            self.now = max(self.now, timer.when())
            self.timers.remove(timer)
            timer.call()
        self.now = now


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def alarm(loop: Any) -> Alarm:
    return Alarm(loop)


def test_it_rings_once_at_its_time(loop: Loop, alarm: Alarm) -> None:
    rung: list[float] = []
    alarm.set(5, lambda: rung.append(loop.now))
    loop.pass_until(104.9)
    assert rung == []
    loop.pass_until(200)
    assert rung == [105]
    assert loop.pending == []


def test_setting_it_again_forgets_what_was(loop: Loop, alarm: Alarm) -> None:
    rung: list[str] = []
    alarm.set(5, lambda: rung.append("first"))
    loop.pass_until(104)
    alarm.set(5, lambda: rung.append("second"))
    loop.pass_until(108.9)
    assert rung == []
    loop.pass_until(109)
    assert rung == ["second"]


def test_it_may_be_set_to_an_earlier_time(loop: Loop, alarm: Alarm) -> None:
    rung: list[float] = []
    alarm.set(30, lambda: rung.append(-1))
    alarm.set(5, lambda: rung.append(loop.now))
    loop.pass_until(105)
    assert rung == [105]
    loop.pass_until(200)
    assert rung == [105]


def test_a_stopped_one_does_not_ring(loop: Loop, alarm: Alarm) -> None:
    rung: list[float] = []
    alarm.set(5, lambda: rung.append(loop.now))
    alarm.stop()
    loop.pass_until(200)
    assert rung == []
    alarm.set(5, lambda: rung.append(loop.now))
    loop.pass_until(300)
    assert rung == [205]


def test_a_thousand_requests_cost_the_loop_one_timer(loop: Loop, alarm: Alarm) -> None:
    rung: list[float] = []
    for number in range(1000):
        loop.pass_until(100 + number * 0.001)
        alarm.set(30, lambda: rung.append(loop.now))
        alarm.stop()
        alarm.set(30, lambda: rung.append(loop.now))
        assert len(loop.pending) == 1
    loop.pass_until(200)
    assert rung == pytest.approx([130.999], abs=1e-9)


def test_its_end_leaves_nothing_with_the_loop(loop: Loop, alarm: Alarm) -> None:
    alarm.set(30, lambda: None)
    alarm.end()
    assert loop.pending == [], "a connection that is gone would be kept by it"
    alarm.end()


def test_who_is_called_may_set_it_again(loop: Loop, alarm: Alarm) -> None:
    rung: list[float] = []

    def ring() -> None:
        rung.append(loop.now)
        if len(rung) < 3:
            alarm.set(5, ring)

    alarm.set(5, ring)
    loop.pass_until(200)
    assert rung == [105, 110, 115]


def test_uvloop_has_it_ring_too_however_short_the_time() -> None:
    """Its `call_at` returns something else, that knows no time, for what is due at once."""

    async def ring() -> None:
        loop = asyncio.get_running_loop()
        rung: list[str] = []
        alarm = Alarm(loop)
        alarm.set(0.0001, lambda: rung.append("first"))
        alarm.set(60, lambda: rung.append("never"))
        alarm.set(0.0001, lambda: rung.append("last"))
        while not rung:
            await asyncio.sleep(0.001)
        assert rung == ["last"]

    uvloop.run(asyncio.wait_for(ring(), 30))
