"""What becomes of a request whose body does not come or whose client leaves, on a loop whose time the tests pass."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from support.queues import in_time, the_loop, turns

from bln_serve.errors import BodyTimeoutError
from bln_serve.serving.visits import LOOK_EVERY_S, ClientGoneError, Visit, Visits

DISCONNECT = {"type": "http.disconnect"}


class Client:
    """Sends what a test tells it to, and then nothing."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    async def receive(self) -> Mapping[str, Any]:
        return await self.events.get()


def arrive(visits: Visits, client: Client, work: Any, *, time_s: float = 30, idle_s: float = 10) -> asyncio.Task[Any]:
    """Have a request that is answered by `work(visit)`."""

    async def visit() -> Any:
        now = the_loop().now
        with Visit(visits, client.receive, now, now + time_s, idle_s) as present:
            return await work(present)

    return asyncio.create_task(visit())


async def for_ever(visit: Visit) -> None:
    await asyncio.Event().wait()


async def after_its_body(visit: Visit) -> None:
    visit.has_come(5)
    await for_ever(visit)


async def look() -> None:
    """Pass the time until the next look."""
    the_loop().pass_time(LOOK_EVERY_S)
    await turns(10)


async def until_nobody_is_looked_after() -> None:
    await look()
    await look()


@in_time
async def test_a_body_that_is_not_there_in_time_is_given_up() -> None:
    task = arrive(Visits(), Client(), for_ever, time_s=5, idle_s=100)
    await turns()
    the_loop().pass_time(4)
    await turns(10)
    assert not task.done()
    the_loop().pass_time(1)
    with pytest.raises(BodyTimeoutError, match="within the request's time. Received: 0 bytes.*--request-timeout-s"):
        await task
    assert task.cancelling() == 0
    await until_nobody_is_looked_after()


@in_time
async def test_a_body_that_stops_coming_is_given_up_and_one_that_drips_is_not() -> None:
    present: list[Visit] = []

    async def read(visit: Visit) -> None:
        present.append(visit)
        await for_ever(visit)

    task = arrive(Visits(), Client(), read, time_s=100, idle_s=2)
    await turns()
    for size in (3, 4):
        the_loop().pass_time(1.5)
        await turns(10)
        present[0].comes(size)
    assert not task.done()
    the_loop().pass_time(2.1)
    with pytest.raises(BodyTimeoutError, match="without a pause of 2 s. Received: 4 bytes of it.*--idle-timeout-s"):
        await task
    await until_nobody_is_looked_after()


@in_time
async def test_a_body_that_has_come_is_never_late() -> None:
    task = arrive(Visits(), Client(), after_its_body, time_s=1, idle_s=1)
    await turns()
    the_loop().pass_time(50)
    await turns(10)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    await until_nobody_is_looked_after()


@in_time
async def test_a_client_that_leaves_is_noticed_and_its_request_cancelled() -> None:
    client = Client()
    task = arrive(Visits(), client, after_its_body)
    await turns()
    client.events.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    client.events.put_nowait(DISCONNECT)
    await turns(10)
    assert not task.done()  # nobody looks so soon
    await look()
    with pytest.raises(ClientGoneError):
        await task
    assert task.cancelling() == 0
    await until_nobody_is_looked_after()


@in_time
async def test_what_was_answered_before_is_not_looked_after() -> None:
    visits, client = Visits(), Client()

    async def answer(visit: Visit) -> str:
        visit.has_come(5)
        return "answer"

    assert await arrive(visits, client, answer) == "answer"
    client.events.put_nowait(DISCONNECT)
    await until_nobody_is_looked_after()
    assert client.events.qsize() == 1
    assert len(the_loop().timers) == 1


@in_time
async def test_another_cancellation_is_no_client_that_left() -> None:
    task = arrive(Visits(), Client(), after_its_body)
    await look()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_nobody_is_looked_after()


@in_time
async def test_both_at_once_is_a_cancellation() -> None:
    client = Client()
    task = arrive(Visits(), client, after_its_body)
    await turns()
    await look()
    client.events.put_nowait(DISCONNECT)
    await turns(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_nobody_is_looked_after()


@in_time
async def test_one_that_leaves_takes_no_other_with_it() -> None:
    visits, clients = Visits(), [Client() for _ in range(3)]
    tasks = [arrive(visits, client, after_its_body) for client in clients]
    await turns()
    await look()
    clients[1].events.put_nowait(DISCONNECT)
    await turns(10)
    assert [task.done() for task in tasks] == [False, True, False]
    assert isinstance(tasks[1].exception(), ClientGoneError)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await until_nobody_is_looked_after()


@in_time
async def test_an_error_of_its_own_is_its_outcome() -> None:
    async def fail(visit: Visit) -> None:
        visit.has_come(5)
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await arrive(Visits(), Client(), fail)
    await until_nobody_is_looked_after()
