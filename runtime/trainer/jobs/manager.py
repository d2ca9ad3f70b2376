"""Jobs in order: stored when they are submitted, read at once, run as many at a time as the settings say.

Every action is stored before it is done, so a process that dies at any point leaves rows that say what to
do next: `start` reads them. Event loop only.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.errors import Conflict, EngineUnavailable, ModelLoading, RequestError, StorageUnavailable, TooManyRequests
from runtime.metrics import Metrics
from runtime.support.database import Database
from runtime.support.durable import make_directory, replace_file, storage_unavailable
from runtime.support.event_loop import cancel
from runtime.support.logs import get_logger
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.execution import Checkpoints, Execution, delete_discarded
from runtime.trainer.jobs.followers import EventFeed, EventTail, Journal
from runtime.trainer.jobs.records import (
    ENDED,
    STATES,
    Job,
    JobEngine,
    JobEvent,
    JobSubmission,
    Note,
    PreparedJob,
    new_record,
)
from runtime.trainer.jobs.retention import FOR_EVER, Keep, Retention
from runtime.trainer.jobs.store import JobStore, files_deleted
from runtime.trainer.jobs.validation import Validation
from runtime.trainer.launched.agent_process import end_left_behind
from settings.schema import TrainerSettings

if TYPE_CHECKING:
    from runtime.support.tracing import JobTraces

_log = get_logger("jobs")

MAX_NAMED = 5
"""Jobs that an error names."""

PATIENCE = 30.0
"""Seconds that the client of a new recipe waits for its errors."""


class JobManager:
    """Owns the jobs at work. Reads go straight to `store`."""

    def __init__(
        self,
        database: Database,
        directories: JobDirectories,
        engine: JobEngine,
        metrics: Metrics,
        *,
        max_waiting: int,
        max_running: int = 1,
        keep: Keep = FOR_EVER,
        follows_left: bool = False,
    ) -> None:
        """`max_waiting`: the most jobs that are validating or queued, `max_running`: that are at work. `keep`: for how
        long, once they have ended. `follows_left`: processes of launched jobs that an earlier server has left go on
        until it is their job's turn. The database stays the caller's to close."""
        self._follows_left = follows_left
        self.directories = directories
        self.feed = EventFeed()
        self.store = JobStore(database, self._changed)
        self.tail = EventTail(self.store, self.feed)
        self._engine = engine
        self._metrics = metrics
        self._traces: JobTraces | None = None
        self._max_waiting = max_waiting
        self._max_running = max_running
        self._disk = WorkerThread()
        self._checkpoints = Checkpoints(self.store, directories, self._disk)
        self._journal = Journal(self.store, directories, self._disk, self._told)
        self._validation = Validation(self.store, directories, self._journal, engine, self._wake_up)
        self._retention = Retention(self.store, directories, self._disk, keep, self._forget)
        self._journaling: asyncio.Task[None] | None = None
        self._pruning: asyncio.Task[None] | None = None
        self._deleting: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()
        """A job came to another state: what only the one before needs is to be deleted."""
        self._arriving = 0
        self._wake = asyncio.Event()
        self._lane: asyncio.Task[None] | None = None
        self._at_work: dict[str, Execution] = {}
        """By the ids of their jobs."""
        self._working: dict[Execution, asyncio.Task[None]] = {}
        """A task for each that has begun."""
        self._parked: dict[str, Execution] = {}
        """Paused jobs whose runs are still there, as long as no other is to start."""
        self._held: str | None = None
        """Reason why no job is taken or started for now."""
        self._stopping = False
        self._stopped = False

    def trace_with(self, traces: "JobTraces") -> None:
        """Make spans of what jobs do from now on."""
        self._traces = traces

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear up after the last process, and continue with what it left. Raises `StorageUnavailable`, `OSError`."""
        await delete_discarded(self.store, self.directories, self._disk)
        for job_id in await asyncio.to_thread(self.directories.refused):
            await self.store.remove(job_id)  # its folder goes with what was never finished
        kept = await self.store.kept()
        missing = await asyncio.to_thread(self.directories.sweep, kept)
        for job_id, steps in missing.items():
            await self.store.drop_checkpoints(job_id, steps)
            await self.store.note(job_id, Note(f"The checkpoints of the steps {steps} are gone.", "warning"))
        for job_id in await self.store.recover():
            self._validation.begin(job_id)
        for job_id in await asyncio.to_thread(self.directories.with_left_processes):
            known = self._follows_left and job_id in kept
            if not known or (await self.store.get(job_id)).state != "queued":
                await self._end_left_behind(job_id)
        for job_id in await asyncio.to_thread(self._without_record, kept):
            self._journal.touch(job_id, record=True)
        self._journaling = asyncio.create_task(self._journal.run())
        self._lane = asyncio.create_task(self._run_lane())
        self._pruning = asyncio.create_task(self._retention.run())
        self._deleting = asyncio.create_task(self._delete_unneeded())

    async def stop(self, timeout: float, *, crashed: bool = False) -> None:
        """Give the running jobs `timeout` seconds to write a checkpoint, and leave them for the next process.

        `crashed`: the engine is gone. The rows stay as they are, and the next process counts a crash. Any number
        of times.
        """
        if self._stopped:
            return
        self._stopping = True
        self.feed.close()
        await self._validation.close()
        at_work = list(self._at_work.values())
        suspended = [one.suspend() for one in at_work if not crashed]
        if any(suspended) and self._working:
            await asyncio.wait(self._working.values(), timeout=timeout)
        await cancel(self._lane, *self._working.values())
        if not crashed:
            for one in at_work:
                with contextlib.suppress(
                    StorageUnavailable
                ):  # then it counts as a crash: the rows still say what to do
                    await self.store.interrupt(one.id)
        self._unpark()
        await cancel(self._pruning, self._deleting)
        await cancel(self._journaling)
        with contextlib.suppress(StorageUnavailable):
            await self._journal.flush()
        self._stopped = True

    async def hold(self, why: str) -> None:
        """Take and start no job until `release`, and say `why`. Raises `Conflict`, and holds nothing, while there are
        jobs that have not ended: they were read, or have checkpoints, for the model that is served."""
        self._held = why
        try:
            unfinished = tuple(state for state in STATES if state not in ENDED)
            jobs, more = await self.store.page(after=None, limit=MAX_NAMED, states=unfinished)
            if jobs:
                named = ", ".join(f"{job.id} ({job.state})" for job, _ in jobs) + (", …" if more else "")
                raise Conflict(
                    f"There are jobs that have not ended, and they are for the model that is served: {named}. Wait for "
                    "them, or cancel them.",
                    code="jobs_unfinished",
                )
        except BaseException:
            self.release()
            raise

    def release(self, engine: JobEngine | None = None) -> None:
        """Take and start jobs again, on another engine where one is given."""
        if engine is not None:
            self._engine = engine
            self._validation.engine = engine
        self._held = None
        self._wake_up()

    # -- requests ------------------------------------------------------------------------------

    @staticmethod
    def new_id() -> str:
        """Id of a submission: its files go to `directories.incoming(id)` before it is handed in."""
        return f"ftjob-{secrets.token_hex(12)}"

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """Context for receiving and reading a submission's files: no more at once than jobs may wait. Raises
        `TooManyRequests`."""
        if self._arriving >= self._max_waiting:
            raise TooManyRequests(f"{self._arriving} recipes are being received already. Try again later.")
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def submit(self, submission: JobSubmission, *, patience: float = PATIENCE) -> tuple[Job, bool]:
        """Store a job and read its recipe; or give the one that the idempotency key made before, and False.

        Returns when the recipe is read, or after `patience` seconds. Raises a `RequestError` for what is wrong
        with the recipe, `Conflict` for a key or a name in use, `TooManyRequests`, `StorageUnavailable`: then
        nothing is stored.
        """
        self._require_running()
        try:
            await self._disk.call(self._take_in, submission)
            job, created = await self.store.create(submission, max_waiting=self._max_waiting)
        except BaseException as error:
            await self.discard(submission.id)
            if isinstance(error, OSError):
                raise storage_unavailable("The recipe cannot be stored", error) from error
            raise
        if created:
            if self._traces is not None:
                self._traces.expect(job.id)
            self._validation.begin(job.id)
        elif job.id != submission.id:
            await self.discard(submission.id)
        try:
            await self._validation.wait(job.id, patience)
        except RequestError as error:
            if self._traces is not None:
                self._traces.refuse(job.id, error.code)
            raise
        return await self.store.get(job.id), created

    async def copy_of(self, job_id: str, recipe: bytes, *, owner: str) -> JobSubmission:
        """A submission of another recipe with the data files of a job, which are in place. Raises `Conflict` where
        they were deleted, and `StorageUnavailable`."""
        self._require_running()
        files = await self.store.files(job_id)
        copy = self.new_id()
        try:
            await self._disk.call(self.directories.copy_uploads, job_id, copy, [file.stored_as for file in files])
        except FileNotFoundError as error:
            await self.discard(copy)
            raise files_deleted() from error
        except OSError as error:
            await self.discard(copy)
            raise storage_unavailable("The files cannot be stored", error) from error
        digest = hashlib.blake2b(recipe + job_id.encode()).hexdigest()
        return JobSubmission(id=copy, recipe=recipe, files=tuple(files), digest=digest, owner=owner)

    async def dry_run(self, submission: JobSubmission) -> PreparedJob:
        """Read a recipe and its files, and keep no job. Raises what is wrong with it."""
        self._require_running()
        try:
            folder = self.directories.incoming(submission.id)
            if not folder.exists():
                folder = self.directories.uploads(submission.id)
            return await self._validation.try_out(submission.recipe, list(submission.files), folder)
        finally:
            await self.discard(submission.id)

    async def discard(self, job_id: str) -> None:
        """Delete the files of a submission that came to nothing."""
        await self._disk.call(self.directories.discard, job_id)

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended, with its files, checkpoints and events. What it published stays. Raises
        `NotFound`, `Conflict`, `StorageUnavailable`."""
        folder = self.directories.relative(self.directories.folder(job_id))
        await self.store.delete(job_id, [folder])
        await self._forget(job_id)

    async def cancel(self, job_id: str) -> Job:
        """End a job: now, or after the step that is running. Raises `NotFound`, `Conflict`."""
        job = await self.store.cancel(job_id)
        if (parked := self._parked.pop(job_id, None)) is not None:
            parked.close()
        if (execution := self._at_work.get(job_id)) is not None:
            execution.cancel()
        return job

    async def pause(self, job_id: str) -> Job:
        """Hold a job: now, or after the step that is running. Raises `NotFound`, `Conflict`."""
        job = await self.store.pause(job_id)
        if job.state == "running" and (execution := self._at_work.get(job_id)) is not None:
            execution.pause()
        if job.state == "paused":  # it was not taken up yet, though its processes may go on
            await self._end_left_behind(job_id)
        return job

    async def _end_left_behind(self, job_id: str) -> None:
        """End the processes that an earlier server has left for a job which is not to go on now. The end of a job does
        the same, with its folder."""
        await self._disk.call(end_left_behind, self.directories.launched(job_id))

    async def resume(self, job_id: str) -> Job:
        """Resume a paused job: at once where its run is still there, else when it is its turn. A failed one goes on
        from its newest checkpoint, with its data files, and the base model that it has trained for. Raises `NotFound`,
        `Conflict`, `StorageUnavailable`."""
        self._require_running()
        state = (await self.store.get(job_id)).state
        task = next((task for one, task in self._working.items() if one.id == job_id), None)
        if task is not None and state in ("paused", "failed"):
            await asyncio.wait({task})  # it tidies up still; a paused one is parked then
        if state == "failed":  # what its end has left to be deleted is not to be deleted under the next run
            await delete_discarded(self.store, self.directories, self._disk)
        await self.check_resumable(job_id)
        job = await self.store.resume(
            job_id,
            base=self._engine.base_fingerprint,
            at_once=job_id in self._parked,
            max_running=self._max_running,
        )
        if job.state == "running":  # another job that has started since may have released the paused runs
            parked = self._parked.pop(job_id, None)
            self._begin(self._execution_of(job) if parked is None else parked)
        self._wake_up()
        return job

    async def check_resumable(self, job_id: str) -> None:
        """Raise `NotFound`, and `Conflict` where a job cannot go on, however long one waits."""
        job = await self.store.check_resumable(job_id, self._engine.base_fingerprint)
        if job.state == "failed":  # its data is read again
            uploads = self.directories.uploads(job_id)
            paths = [uploads / file.stored_as for file in await self.store.files(job_id)]
            if not await asyncio.to_thread(lambda: all(path.is_file() for path in paths)):
                raise files_deleted()

    async def can_resume(self, job_id: str) -> bool:
        """True where `check_resumable` raises no `Conflict`. Raises `NotFound`."""
        try:
            await self.check_resumable(job_id)
        except Conflict:
            return False
        return True

    # -- the lane ------------------------------------------------------------------------------

    async def _run_lane(self) -> None:
        """Start jobs, the first of the queue while there is room for it, until the process ends."""
        while not self._stopping:
            self._wake.clear()
            room = self._held is None and len(self._at_work) < self._max_running
            execution = await self._next() if room else None
            if execution is None:
                await self._wake.wait()
            else:
                self._begin(execution)

    def _begin(self, execution: Execution) -> None:
        self._at_work[execution.id] = execution
        self._working[execution] = task = asyncio.create_task(self._work(execution))
        task.add_done_callback(lambda _: self._working.pop(execution))

    async def _work(self, execution: Execution) -> None:
        await execution.work()
        del self._at_work[execution.id]
        if execution.cancelled:
            execution.close()
        elif execution.kept:
            self._parked[execution.id] = execution
        self._wake_up()

    async def _next(self) -> Execution | None:
        try:
            job = await self.store.start_next(max_running=self._max_running, memory=self._engine.memory_for_jobs)
        except Exception:
            _log.exception("cannot_start_a_job")
            asyncio.get_running_loop().call_later(5.0, self._wake_up)
            return None
        if job is None:
            return None
        self._unpark()
        return self._execution_of(job)

    def _execution_of(self, job: Job) -> Execution:
        async def prepare() -> PreparedJob:
            return await self._validation.prepare(job.recipe, await self.store.files(job.id), job.id)

        # Not one turn of the loop may pass from here until the lane holds it: a cancellation must find it.
        return Execution(job, prepare, self._engine, self._metrics, self.store, self.directories, self._checkpoints)

    def _take_in(self, submission: JobSubmission) -> None:
        """Move the files into place, and write the job's record beside them before there is a row."""
        self.directories.take_in(submission.id)
        path = self.directories.record(submission.id)
        make_directory(path.parent)
        replace_file(path, msgspec.json.encode(new_record(submission)))

    def _without_record(self, job_ids: Iterable[str]) -> list[str]:
        """Jobs of an older version, whose folders have no record."""
        return [job_id for job_id in job_ids if not self.directories.record(job_id).exists()]

    async def _forget(self, job_id: str) -> None:
        """Delete the files of a job whose row is gone."""
        self.tail.forget(job_id)
        await self._journal.discard(job_id)
        await delete_discarded(self.store, self.directories, self._disk)

    async def _delete_unneeded(self) -> None:
        """Delete what is noted to be deleted whenever a job has changed its state, until cancelled."""
        while True:
            await self._moved.wait()
            self._moved.clear()
            try:
                await delete_discarded(self.store, self.directories, self._disk)
            except StorageUnavailable as error:  # the next change or start has another try
                _log.warning("cannot_delete", reason=error.message)

    def _unpark(self) -> None:
        """Release the paused runs, those that still tidy up among them; their jobs continue from their checkpoints."""
        for execution in (*self._parked.values(), *(one for one in self._at_work.values() if one.paused)):
            execution.close()
        self._parked.clear()

    def _wake_up(self) -> None:
        self._wake.set()

    def _changed(self, job_id: str, counts: dict[str, int] | None) -> None:
        if counts is not None:
            self._moved.set()
            self._metrics.on_jobs({state: counts.get(state, 0) for state in STATES})
        if job_id:
            self.feed.touch(job_id)
            self._journal.touch(job_id, record=counts is not None)

    def _told(self, job_id: str, event: JobEvent) -> None:
        """Log a change of a job's state, and trace it, steps and evaluations; events come in order, a little late."""
        if (state := event.data.get("status")) is not None:
            (_log.warning if event.level == "error" else _log.info)("job", job=job_id, state=state, note=event.message)
            if self._traces is not None:
                self._traces.on_state(job_id, state, event.created_at, event.data)
        elif event.kind in ("step", "eval", "answers") and self._traces is not None:
            self._traces.on_report(job_id, event.kind, event.created_at, event.data)

    def _require_running(self) -> None:
        if self._stopping:
            raise EngineUnavailable("The server is shutting down.")
        if self._held is not None:
            raise ModelLoading(self._held)


# -- opening ---------------------------------------------------------------------------------------
#
# Jobs from a database and the engine, for as long as a block lasts.


@asynccontextmanager
async def running_jobs(
    database: Database, directory: Path, engine: JobEngine, metrics: Metrics, settings: TrainerSettings
) -> AsyncIterator[JobManager]:
    """A started manager over the state `directory`, whose database has the tables of `jobs.rows`.

    Leaving the block without a call of `stop` interrupts the jobs at work. Raises `StorageUnavailable` and
    `OSError` where the state cannot be read.
    """
    keep = Keep(jobs=settings.keep_jobs, checkpoints=settings.keep_checkpoints, uploads=settings.keep_uploads)
    directories = JobDirectories(directory)
    manager = JobManager(
        database,
        directories,
        engine,
        metrics,
        max_waiting=settings.max_queued_jobs,
        max_running=settings.max_running_jobs,
        keep=keep,
        follows_left=settings.outlive_server,
    )
    try:
        await manager.start()
        yield manager
    finally:
        await manager.stop(0.0)
