"""One call at a time for each key, in threads, whatever becomes of those who wait for the result.

A thread cannot be stopped. Where a client leaves, the call that its request has begun therefore runs to its end, and
the next call of that key begins only then. Knows nothing of streams or HTTP. Used by `stream_app`.
"""

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Turns:
    """For one event loop; a key costs nothing while nobody uses it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Task[Any]] = set()  # the loop itself keeps tasks weakly only

    async def take(self, key: str, call: Callable[[], T]) -> T:
        """The result of `call`, made in a thread after all earlier calls of the key have ended.

        Cancelled while it waits for its turn, it makes no call.
        """
        lock = self._locks.setdefault(key, asyncio.Lock())
        await lock.acquire()
        # In a context of its own: what cancels the caller must not reach the calls that this one makes.
        turn = asyncio.create_task(_run(call, lock), context=Context())
        self._running.add(turn)
        turn.add_done_callback(self._running.discard)
        return await asyncio.shield(turn)


async def _run(call: Callable[[], T], lock: asyncio.Lock) -> T:
    try:
        return await asyncio.to_thread(call)
    finally:
        lock.release()
