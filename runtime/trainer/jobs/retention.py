"""Retention of ended jobs: of their rows and events, their checkpoints, and the files sent along.

A row goes first, together with a note of what is to be deleted; then the files; then the note. A process that dies in
between leaves the note, and the next one continues.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from msgspec import Struct

from runtime.errors import Conflict, NotFound, StorageUnavailable
from runtime.support.logs import get_logger
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.execution import delete_discarded
from runtime.trainer.jobs.rows import ended_at
from runtime.trainer.jobs.store import JobStore

FIRST_LOOK = 30.0
"""Seconds after the start."""
PERIOD = 3600.0
"""Seconds between two looks, at most: it is sooner where something is kept for a shorter time."""

_log = get_logger("jobs")


class Keep(Struct, frozen=True, kw_only=True):
    """Seconds after a job's end; None: for ever."""

    jobs: float | None = None
    """Everything of it; what it published stays."""
    checkpoints: float | None = None
    uploads: float | None = None


FOR_EVER = Keep()


class Due(Struct, frozen=True):
    """A part of one job that is to be deleted."""

    job_id: str
    what: Literal["job", "checkpoints", "uploads"]


class Retention:
    """Event loop only."""

    def __init__(
        self,
        store: JobStore,
        directories: JobDirectories,
        disk: WorkerThread,
        keep: Keep,
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        """`forget` deletes the files of a job whose row is gone."""
        self._store = store
        self._directories = directories
        self._disk = disk
        self._keep = keep
        self._forget = forget

    async def run(self) -> None:
        """Prune from time to time, until cancelled."""
        limits = [limit for limit in (self._keep.jobs, self._keep.checkpoints, self._keep.uploads) if limit is not None]
        if not limits:
            return
        pause = min(FIRST_LOOK, *limits)
        while True:
            await asyncio.sleep(pause)
            pause = min(PERIOD, *limits)
            try:
                await self.prune()
            except StorageUnavailable as error:
                _log.warning("cannot_prune", reason=error.message)
            except Exception:
                _log.exception("cannot_prune")

    async def due(self, now: float | None = None) -> list[Due]:
        """The parts of jobs that have been kept for long enough. Raises `StorageUnavailable`."""
        now = time.time() if now is None else now
        found = []
        for job in await self._store.ended():
            age = now - ended_at(job)
            if _over(age, self._keep.jobs):
                found.append(Due(job.id, "job"))
                continue
            if _over(age, self._keep.checkpoints) and await self._store.checkpoints(job.id):
                found.append(Due(job.id, "checkpoints"))
            if _over(age, self._keep.uploads) and await asyncio.to_thread(self._directories.uploads(job.id).exists):
                found.append(Due(job.id, "uploads"))
        return found

    async def prune(self, now: float | None = None) -> list[Due]:
        """Delete what has been kept for long enough. Raises `StorageUnavailable`."""
        now = time.time() if now is None else now
        done = []
        for due in await self.due(now):
            try:
                await self._drop(due, now)
            except (NotFound, Conflict):
                continue  # it was deleted or resumed meanwhile
            done.append(due)
            _log.info("pruned", job=due.job_id, what=due.what)
        await delete_discarded(self._store, self._directories, self._disk)
        return done

    async def _drop(self, due: Due, now: float) -> None:
        """Raises `Conflict` for a job that has been resumed since `due` read it, even if it has ended again."""
        directories, job_id, keep = self._directories, due.job_id, self._keep
        limit = {"job": keep.jobs, "checkpoints": keep.checkpoints, "uploads": keep.uploads}[due.what]
        assert limit is not None, "what is kept for ever is never due"
        ended_before = now - limit
        if due.what == "job":
            folder = directories.relative(directories.folder(job_id))
            await self._store.delete(job_id, [folder], ended_before=ended_before)
            await self._forget(job_id)
        elif due.what == "checkpoints":
            steps = [checkpoint.step for checkpoint in await self._store.checkpoints(job_id)]
            folders = [directories.relative(directories.checkpoint(job_id, step)) for step in steps]
            await self._store.prune(job_id, folders, ended_before=ended_before, checkpoints=steps)
        else:
            uploads = directories.relative(directories.uploads(job_id))
            await self._store.prune(job_id, [uploads], ended_before=ended_before)


def _over(age: float, limit: float | None) -> bool:
    return limit is not None and age > limit
