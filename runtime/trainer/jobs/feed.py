"""Who waits for news of a job is woken. Holds no news: those are in the store, in order and numbered."""

import asyncio
from collections import defaultdict


class Feed:
    """Event loop only."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self.closed = False

    def touch(self, job_id: str) -> None:
        """Something new is stored of this job."""
        for future in self._waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Wake all, for the last time."""
        self.closed = True
        for job_id in list(self._waiting):
            self.touch(job_id)

    def ticket(self, job_id: str) -> "asyncio.Future[None]":
        """Done with the first change from now on: taken before a look into the store, so that nothing is missed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_result(None)
        else:
            self._waiting[job_id].add(future)
            future.add_done_callback(lambda _: self._drop(job_id, future))
        return future

    async def until(self, ticket: "asyncio.Future[None]", timeout: float) -> bool:
        """Wait for a ticket. False where nothing came in time. The ticket is used up."""
        done, _ = await asyncio.wait((ticket,), timeout=timeout)
        ticket.cancel()
        return bool(done)

    def _drop(self, job_id: str, future: "asyncio.Future[None]") -> None:
        waiting = self._waiting.get(job_id)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._waiting[job_id]
