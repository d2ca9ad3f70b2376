"""Reading recipes and their data before a job is queued, one at a time, off the event loop."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.errors import RequestError, StorageUnavailable
from runtime.events import ReadingEvent
from runtime.support.durable import error_code, patiently, reason, remove
from runtime.support.event_loop import cancel
from runtime.support.logs import get_logger
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs.directories import ORIGIN, JobDirectories
from runtime.trainer.jobs.followers import Journal
from runtime.trainer.jobs.records import JobEngine, JobError, JobFile, PreparedJob
from runtime.trainer.jobs.store import JobStore, insist

_log = get_logger("jobs")


class Validation:
    """From validating to queued. The client may wait a while, and then gets the error; a job without a waiting client
    fails with it instead."""

    def __init__(
        self,
        store: JobStore,
        directories: JobDirectories,
        journal: Journal,
        engine: JobEngine,
        on_queued: Callable[[], None],
    ) -> None:
        self._store = store
        self._directories = directories
        self._journal = journal
        self._engine = engine
        self._on_queued = on_queued
        self._reading = WorkerThread()
        self._trying = WorkerThread()
        """For dry runs: a job that is to start does not wait for them."""
        self._refused: set[str] = set()
        """Jobs that are being forgotten: `wait` waits for the reason, however long that takes."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._forgetting: set[asyncio.Task[None]] = set()
        self._waiters: Counter[str] = Counter()

    def begin(self, job_id: str) -> None:
        task = self._tasks[job_id] = asyncio.create_task(self._validate(job_id))
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def wait(self, job_id: str, timeout: float) -> None:
        """Wait until the job is queued, or for `timeout` seconds. Raises what is wrong with it."""
        task = self._tasks.get(job_id)
        if task is None:
            return
        self._waiters[job_id] += 1
        try:
            await asyncio.wait((task,), timeout=timeout)
            if job_id in self._refused:  # there is no job any more that could be shown
                await asyncio.wait((task,))
        finally:
            self._waiters[job_id] -= 1
            self._waiters += Counter()  # drops those at 0
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def prepare(self, recipe: bytes, files: list[JobFile], job_id: str) -> PreparedJob:
        """The prepared job of a recipe and the uploads of this job, whose data is read once, and kept in its folder
        until its end. Raises `RequestError`, `OSError`."""
        uploads = _paths(self._directories.uploads(job_id), files)
        kept = self._directories.prepared(job_id)
        async with self._reports(job_id) as report:
            return await patiently(lambda: self._reading.call(self._engine.prepare, recipe, uploads, kept, report))

    @asynccontextmanager
    async def _reports(self, job_id: str) -> AsyncIterator[Callable[[ReadingEvent], None]]:
        """Context with a function, for any thread, that has reports on the reading of a job stored until its end."""
        events = asyncio.Queue[ReadingEvent | None]()
        loop = asyncio.get_running_loop()

        def report(event: ReadingEvent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended in the meantime
                loop.call_soon_threadsafe(events.put_nowait, event)

        async def store() -> None:
            while (event := await events.get()) is not None:
                with contextlib.suppress(RequestError):  # a disk that is full, or a job that was deleted
                    await self._store.report(job_id, [event])

        task = asyncio.create_task(store())
        try:
            yield report
        except BaseException:
            await cancel(task)
            raise
        events.put_nowait(None)
        await task

    async def try_out(self, recipe: bytes, files: list[JobFile], folder: Path) -> PreparedJob:
        """The same of one that is not to become a job, with its files in `folder`. Its data stays for later jobs."""
        return await self._trying.call(self._engine.prepare, recipe, _paths(folder, files), None)

    async def close(self) -> None:
        """Give up what is being read: it is read again when the next process starts."""
        await cancel(*self._tasks.values(), *self._forgetting)

    async def _validate(self, job_id: str) -> None:
        try:
            await self._accept(job_id)
        except RequestError as error:
            job = await self._store.get(job_id)
            if job.state != "validating":
                prepared = self._directories.prepared(job_id)
                await self._reading.call(remove, prepared)
                await self._reading.call(remove, prepared.with_name(ORIGIN))
                return  # cancelled meanwhile
            if self._waiters[job_id]:
                self._refused.add(job_id)
                try:
                    await self._forget(job_id)
                finally:
                    self._refused.discard(job_id)
                raise
            failure = failure_of(error)
            await insist(lambda: self._store.fail(job_id, failure))
        except OSError as error:
            failure = JobError(error_code(error), f"The recipe's data cannot be read: {reason(error)}.")
            await insist(lambda: self._store.fail(job_id, failure))
        except Exception:
            _log.exception("validation_failed", job=job_id)
            message = "An internal error ended the reading of the recipe; the server's log has more."
            await self._store.fail(job_id, JobError("internal_error", message))

    async def _forget(self, job_id: str) -> None:
        try:
            await self._store.remove(job_id)
        except StorageUnavailable:  # the waiting client gets it now, and the row must still go
            await self._journal.refuse(job_id)
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
        for warning in prepared.summary.get("warnings", ()):
            _log.warning("recipe_warning", job=job_id, warning=warning)
        self._on_queued()


def failure_of(error: RequestError) -> JobError:
    """The job's form of the error that a request for the same would have been answered with."""
    if isinstance(error, StorageUnavailable):
        return JobError(error.cause, error.message)
    return JobError(error.code or error.type, error.message, error.param)


def _paths(folder: Path, files: list[JobFile]) -> dict[str, Path]:
    return {file.name: folder / file.stored_as for file in files}
