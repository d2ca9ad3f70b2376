"""Blocking work off the event loop, in the order in which it was asked for."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from runtime.apart import call_apart

T = TypeVar("T")


class Worker:
    """Does one thing after the other, apart from the event loop and the engine."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Future[Any]] = set()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`. When the caller is cancelled, the function still runs to its end, and
        what was asked for later waits for it."""
        task = asyncio.ensure_future(self._in_turn(function, *args))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _in_turn(self, function: Callable[..., T], *args: Any) -> T:
        async with self._turn:
            return await call_apart(function, *args)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # known to whoever still waits; nobody else is to be told
