"""Jobs in order: stored when they are asked for, read at once, run one at a time.

Whatever is about to be done is stored first, so a process that dies at any point leaves rows that say what to
do next: `start` reads them. Event loop only.
"""

import asyncio
import contextlib
import secrets

from runtime.errors import EngineUnavailable, StorageUnavailable
from runtime.logs import get_logger
from runtime.trainer.database import Database
from runtime.trainer.jobs.checkpoints import Checkpoints
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.execution import Execution
from runtime.trainer.jobs.feed import Feed
from runtime.trainer.jobs.journal import Journal
from runtime.trainer.jobs.ports import Ports, PreparedJob
from runtime.trainer.jobs.records import Job, Note, Submission
from runtime.trainer.jobs.states import STATES
from runtime.trainer.jobs.store import JobStore
from runtime.trainer.jobs.threads import Worker
from runtime.trainer.jobs.validation import Validation

_log = get_logger("jobs")

PATIENCE = 30.0
"""Seconds that who posts a recipe waits to hear what is wrong with it."""


class JobManager:
    """Owns the job that runs. What is only read goes straight to `store`."""

    def __init__(self, database: Database, directories: JobDirectories, ports: Ports, *, max_waiting: int) -> None:
        """`max_waiting`: the most jobs that are validating or queued. The database stays the caller's to close."""
        self.directories = directories
        self.feed = Feed()
        self.store = JobStore(database, self._changed)
        self._ports = ports
        self._max_waiting = max_waiting
        self._disk = Worker()
        self._checkpoints = Checkpoints(self.store, directories, self._disk)
        self._journal = Journal(self.store, directories, self._disk)
        self._validation = Validation(self.store, directories, self._journal, ports.preparer, self._wake_up)
        self._journaling: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._lane: asyncio.Task[None] | None = None
        self._current: Execution | None = None
        """The job at work."""
        self._parked: Execution | None = None
        """A paused job whose run is still there, as long as no other wants to start."""
        self._stopping = False
        self._stopped = False

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear up after the last process, and go on with what it left. Raises `StorageUnavailable`."""
        missing = await asyncio.to_thread(self.directories.sweep, await self.store.kept())
        for job_id, steps in missing.items():
            await self.store.drop_checkpoints(job_id, steps)
            await self.store.note(job_id, Note(f"The checkpoints of the steps {steps} are gone.", "warning"))
        for job_id in await self.store.recover():
            self._validation.begin(job_id)
        self._journaling = asyncio.create_task(self._journal.run())
        self._lane = asyncio.create_task(self._run_lane())

    async def stop(self, timeout: float, *, crashed: bool = False) -> None:
        """Give the running job `timeout` seconds to write a checkpoint, and leave it for the next process.

        `crashed`: the engine is gone. The rows stay as they are, and the next process counts a crash. Any number
        of times.
        """
        if self._stopped:
            return
        self._stopping = True
        self.feed.close()
        await self._validation.close()
        current = self._current
        if current is not None and not crashed and current.suspend() and self._lane is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._lane), timeout)
        await _end(self._lane)
        if current is not None and not crashed:
            with contextlib.suppress(StorageUnavailable):  # then it counts as a crash: the rows still say what to do
                await self.store.interrupt(current.id)
        self._unpark()
        await _end(self._journaling)
        with contextlib.suppress(StorageUnavailable):
            await self._journal.flush()
        self._stopped = True

    # -- what can be asked for -----------------------------------------------------------------

    @staticmethod
    def new_id() -> str:
        """For a submission: its files go to `directories.uploads(id)` before it is handed in."""
        return f"ftjob-{secrets.token_hex(12)}"

    async def submit(self, submission: Submission, *, patience: float = PATIENCE) -> tuple[Job, bool]:
        """Store a job and read its recipe; or give the one that the idempotency key made before, and False.

        Returns when the recipe is read, or after `patience` seconds. Raises a `RequestError` for what is wrong
        with the recipe, `Conflict` for a key or a name in use, `TooManyRequests`, `StorageUnavailable`: then
        nothing is stored.
        """
        self._require_running()
        try:
            job, created = await self.store.create(submission, max_waiting=self._max_waiting)
        except BaseException:
            self.directories.discard(submission.id)
            raise
        if created:
            self._validation.begin(job.id)
        elif job.id != submission.id:
            self.directories.discard(submission.id)
        await self._validation.wait(job.id, patience)
        return await self.store.get(job.id), created

    async def dry_run(self, submission: Submission) -> PreparedJob:
        """Read a recipe and its files, and keep nothing. Raises what is wrong with it."""
        self._require_running()
        try:
            return await self._validation.prepare(submission.recipe, list(submission.files), submission.id)
        finally:
            self.directories.discard(submission.id)

    async def cancel(self, job_id: str) -> Job:
        """End a job: now, or after the step that is running. Raises `NotFound`, `Conflict`."""
        job = await self.store.cancel(job_id)
        if self._parked is not None and self._parked.id == job_id:
            self._unpark()
        if self._current is not None and self._current.id == job_id:
            self._current.cancel()
        return job

    async def pause(self, job_id: str) -> Job:
        """Hold a job: now, or after the step that is running. Raises `NotFound`, `Conflict`."""
        job = await self.store.pause(job_id)
        if job.state == "running" and self._current is not None and self._current.id == job_id:
            self._current.pause()
        return job

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on: at once where its run is still there, else when it is its turn."""
        self._require_running()
        parked = self._parked
        job = await self.store.resume(job_id, at_once=parked is not None and parked.id == job_id)
        if job.state == "running":
            self._current, self._parked = parked, None
        self._wake_up()
        return job

    # -- the lane ------------------------------------------------------------------------------

    async def _run_lane(self) -> None:
        """Run jobs, the one that was resumed or else the first of the queue, until the process ends."""
        while not self._stopping:
            self._wake.clear()
            if self._current is None:
                self._current = await self._next()
            if self._current is None:
                await self._wake.wait()
                continue
            await self._work(self._current)

    async def _work(self, execution: Execution) -> None:
        await execution.work()
        self._current = None
        if execution.cancelled:
            execution.close()
        elif execution.kept:
            self._parked = execution

    async def _next(self) -> Execution | None:
        try:
            job = await self.store.start_next()
        except Exception:
            _log.exception("cannot_start_a_job")
            asyncio.get_running_loop().call_later(5.0, self._wake_up)
            return None
        if job is None:
            return None
        self._unpark()

        async def prepare() -> PreparedJob:
            return await self._validation.prepare(job.recipe, await self.store.files(job.id), job.id)

        # Not one turn of the loop may pass from here until the lane holds it: a cancellation must find it.
        return Execution(job, prepare, self._ports, self.store, self.directories, self._checkpoints)

    def _unpark(self) -> None:
        """The paused run makes room; its job goes on from its checkpoint."""
        if self._parked is not None:
            self._parked.close()
            self._parked = None

    def _wake_up(self) -> None:
        self._wake.set()

    def _changed(self, job_id: str, counts: dict[str, int] | None) -> None:
        if counts is not None:
            self._ports.meters.on_jobs({state: counts.get(state, 0) for state in STATES})
        if job_id:
            self.feed.touch(job_id)
            self._journal.touch(job_id)

    def _require_running(self) -> None:
        if self._stopping:
            raise EngineUnavailable("The server is shutting down.")


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
