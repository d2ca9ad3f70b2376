"""The event loop: tasks that run beside other work until they end or are cancelled, and the loop's delay."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from runtime.support.logs import get_logger

LAG_SAMPLE_SECONDS = 5.0
"""Time between samples of the loop's delay: an idle server must stay idle."""

_log = get_logger(__name__)


async def cancel(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel the tasks that there are, and return when they have ended, however they end."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` beside the block, and cancel it at the block's end. Its own error ends only itself, and is logged."""
    task = asyncio.create_task(_logged(work))
    try:
        yield
    finally:
        await cancel(task)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        _log.exception("background_task_failed", task=getattr(work, "__qualname__", ""))


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for `event` for at most this long; False when it is not set then."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


class BackgroundTasks:
    """Tasks by the ids under which they are found and cancelled."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, id: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which handles its own errors."""
        task = self._tasks[id] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(id, None))

    async def cancel(self, id: str) -> None:
        """Cancel the work of this id, if it still runs, and wait until it has ended."""
        await cancel(self._tasks.get(id))

    async def cancel_all(self) -> None:
        """Cancel all, and wait until they have ended."""
        await cancel(*self._tasks.values())


class LagSampler:
    """The longest delay of the event loop since the last call of `take`."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def take(self) -> float:
        """Longest delay in seconds, including one more measurement over one turn of the loop."""
        due = time.monotonic()
        await asyncio.sleep(0)
        worst = max(self._worst, time.monotonic() - due)
        self._worst = 0.0
        return worst

    async def run(self) -> None:
        """Sample every few seconds, until cancelled."""
        while True:
            due = time.monotonic() + LAG_SAMPLE_SECONDS
            await asyncio.sleep(LAG_SAMPLE_SECONDS)
            self._worst = max(self._worst, time.monotonic() - due)
