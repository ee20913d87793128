"""Calls of one key never overlap, also where their callers leave."""

import asyncio
import threading

import pytest

from serve_apps.turns import Turns


def test_a_caller_that_leaves_does_not_let_the_next_one_in() -> None:
    """The first call ends when the second is allowed to, were it to begin too early: then it would be seen inside."""
    began, may_end, inside = threading.Event(), threading.Event(), 0

    def first() -> None:
        nonlocal inside
        inside += 1
        began.set()
        may_end.wait(30)
        inside -= 1

    async def scene() -> tuple[int, int]:
        turns = Turns()
        leaving = asyncio.create_task(turns.take("stream", first))
        await asyncio.to_thread(began.wait, 30)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        second = asyncio.create_task(turns.take("stream", lambda: inside))
        other = await turns.take("another", lambda: inside)
        for _ in range(100):  # all that can happen before the first call ends
            await asyncio.sleep(0)
        assert not second.done()
        may_end.set()
        return other, await second

    assert asyncio.run(scene()) == (1, 0)


def test_a_caller_that_leaves_before_its_turn_calls_nothing() -> None:
    began, may_end, calls = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        began.set()
        may_end.wait(30)

    async def scene() -> None:
        turns = Turns()
        running = asyncio.create_task(turns.take("stream", first))
        await asyncio.to_thread(began.wait, 30)
        leaving = asyncio.create_task(turns.take("stream", lambda: calls.append("left")))
        staying = asyncio.create_task(turns.take("stream", lambda: calls.append("stayed")))
        await asyncio.sleep(0)
        leaving.cancel()
        may_end.set()
        await asyncio.gather(running, staying)

    asyncio.run(scene())
    assert calls == ["stayed"]


def test_a_failed_call_is_its_callers_and_the_next_one_begins() -> None:
    async def scene() -> int:
        turns = Turns()
        with pytest.raises(ZeroDivisionError):
            await turns.take("stream", lambda: 1 // 0)
        return await turns.take("stream", lambda: 7)

    assert asyncio.run(scene()) == 7
