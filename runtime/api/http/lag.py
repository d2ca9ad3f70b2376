"""Delay of the event loop, sampled every few seconds and at each scrape: an idle server must stay idle."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from litestar import Litestar

INTERVAL = 5.0


class LagSampler:
    """The longest delay since the last call of `take`."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def take(self) -> float:
        """Longest delay in seconds, including one more measurement over one turn of the loop."""
        due = time.monotonic()
        await asyncio.sleep(0)
        worst = max(self._worst, time.monotonic() - due)
        self._worst = 0.0
        return worst

    async def _run(self) -> None:
        while True:
            due = time.monotonic() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self._worst = max(self._worst, time.monotonic() - due)

    @contextlib.asynccontextmanager
    async def running(self, app: Litestar) -> AsyncIterator[None]:
        """Sample while the app runs, as one of its lifespans."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
