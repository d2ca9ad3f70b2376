"""Reading recipes and their data before a job is queued, one at a time, off the event loop."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from runtime.errors import RequestError, StorageUnavailable
from runtime.logs import get_logger
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.journal import Journal
from runtime.trainer.jobs.ports import PreparedJob, Preparer
from runtime.trainer.jobs.records import JobError, JobFile
from runtime.trainer.jobs.store import JobStore, insist
from runtime.trainer.jobs.threads import Worker

_log = get_logger("jobs")


class Validation:
    """From validating to queued. Who asked may wait a while, and is then told what is wrong; a job that nobody
    waits for fails with it instead."""

    def __init__(
        self,
        store: JobStore,
        directories: JobDirectories,
        journal: Journal,
        preparer: Preparer,
        on_queued: Callable[[], None],
    ) -> None:
        self._store = store
        self._directories = directories
        self._journal = journal
        self._preparer = preparer
        self._on_queued = on_queued
        self._reading = Worker()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._forgetting: set[asyncio.Task[None]] = set()
        self._waiters: Counter[str] = Counter()

    def begin(self, job_id: str) -> None:
        task = self._tasks[job_id] = asyncio.create_task(self._validate(job_id))
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def wait(self, job_id: str, timeout: float) -> None:
        """Until the job is queued, or for `timeout` seconds. Raises what is wrong with it."""
        task = self._tasks.get(job_id)
        if task is None:
            return
        self._waiters[job_id] += 1
        try:
            await asyncio.wait((task,), timeout=timeout)
        finally:
            self._waiters[job_id] -= 1
            self._waiters += Counter()  # drops those at 0
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def prepare(self, recipe: bytes, files: list[JobFile], job_id: str) -> PreparedJob:
        """What the preparer makes of a recipe and the uploads of this job. Raises `RequestError`."""
        folder = self._directories.uploads(job_id)
        uploads: dict[str, Path] = {file.name: folder / file.stored_as for file in files}
        return await self._reading.call(self._preparer.prepare, recipe, uploads)

    async def close(self) -> None:
        """Give up what is being read: it is read again when the next process starts."""
        tasks = [*self._tasks.values(), *self._forgetting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _validate(self, job_id: str) -> None:
        try:
            await self._accept(job_id)
        except RequestError as error:
            job = await self._store.get(job_id)
            if job.state != "validating":
                return  # cancelled meanwhile
            if self._waiters[job_id]:
                await self._forget(job_id)
                raise
            failure = JobError(error.code or error.type, error.message, error.param)
            await insist(lambda: self._store.fail(job_id, failure))
        except Exception:
            _log.exception("validation_failed", job=job_id)
            message = "An internal error ended the reading of the recipe; the server's log has more."
            await self._store.fail(job_id, JobError("internal_error", message))

    async def _forget(self, job_id: str) -> None:
        try:
            await self._store.remove(job_id)
        except StorageUnavailable:  # who waits is to hear of it now, and the row must still go
            task = asyncio.create_task(self._forget_later(job_id))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)
        else:
            await self._journal.discard(job_id)

    async def _forget_later(self, job_id: str) -> None:
        await insist(lambda: self._store.remove(job_id))
        await self._journal.discard(job_id)

    async def _accept(self, job_id: str) -> None:
        job = await self._store.get(job_id)
        prepared = await self.prepare(job.recipe, await self._store.files(job_id), job_id)
        await self._store.accept(job_id, prepared)
        self._on_queued()
