"""One job at work: from reading its recipe to its last state, or to where it is put aside.

The run reports on the event loop; everything it reports is taken in order from one inbox, so that a step is
stored before the checkpoint that follows it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from runtime.errors import Conflict, RequestError, StorageUnavailable
from runtime.events import (
    CancelledEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    Report,
    RestartEvent,
    RunEvent,
    StepEvent,
)
from runtime.metrics import Metrics
from runtime.support.durable import error_code, patiently, reason
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.threads import WorkerThread, call_in_fresh_thread
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.loggers import CLOSE_SECONDS, JobLoggers
from runtime.trainer.jobs.records import (
    ADAPTER_FILES,
    Job,
    JobCheckpoint,
    JobEngine,
    JobError,
    Note,
    PreparedJob,
    RunHandle,
)
from runtime.trainer.jobs.store import JobStore, insist
from runtime.trainer.jobs.validation import failure_of

# -- checkpoints -----------------------------------------------------------------------------------
#
# Checkpoints of jobs: on disk first, then in the database, and no more of them than the recipe allows.


WriteSnapshot = Callable[[Path], None]
"""Writes a snapshot into an empty directory: see `RunHandle.take_snapshot`."""


class ResultRecord(Struct, frozen=True, kw_only=True):
    """The record in a result's folder."""

    step: int
    """Step of the result's weights."""
    reason: str


class Checkpoints:
    """Writes, finds and prunes them. One thread does the writing, so that the database stays free."""

    def __init__(self, store: JobStore, directories: JobDirectories, disk: WorkerThread) -> None:
        self._store = store
        self._directories = directories
        self._disk = disk

    async def has(self, job_id: str, step: int) -> bool:
        """True if that step has a checkpoint."""
        return any(known.step == step for known in await self._store.checkpoints(job_id))

    async def save(self, job_id: str, step: int, snapshot: WriteSnapshot, *, best: bool, limit: int | None) -> None:
        """Write one and commit its row, then drop the oldest beyond `limit`: never the newest, never the best.

        Only for a step that has none. Raises `OSError` and `StorageUnavailable`; what was there before is there
        still.
        """
        checkpoint = JobCheckpoint(step=step, best=best, created_at=time.time())
        await self._write(snapshot, self._directories.checkpoint(job_id, step), checkpoint)
        await self._store.add_checkpoint(job_id, checkpoint)
        failpoint("checkpoint.after_commit")
        await self._prune(job_id, limit)

    async def save_result(self, job_id: str, step: int, snapshot: WriteSnapshot, reason: str) -> Job:
        """The same for the result of a finished run; with the commit the job is evaluating."""
        await self._write(snapshot, self._directories.result(job_id), ResultRecord(step=step, reason=reason))
        job = await self._store.set_result(job_id, step, reason)
        failpoint("checkpoint.after_commit")
        return job

    async def newest(self, job_id: str) -> Path | None:
        """The directory to resume from."""
        known = await self._store.checkpoints(job_id)
        return self._directories.checkpoint(job_id, known[-1].step) if known else None

    async def _write(self, snapshot: WriteSnapshot, directory: Path, record: Struct) -> None:
        data = msgspec.json.encode(record)
        await patiently(lambda: self._disk.call(self._directories.write_snapshot, snapshot, directory, data))

    async def _prune(self, job_id: str, limit: int | None) -> None:
        known = await self._store.checkpoints(job_id)
        dropped = [] if limit is None else surplus(known, max(1, limit))
        if not dropped:
            return
        paths = [self._directories.relative(self._directories.checkpoint(job_id, step)) for step in dropped]
        await self._store.drop_checkpoints(job_id, dropped, paths)
        failpoint("checkpoint.after_drop")
        await self._store.forget_discards(await self._disk.call(self._directories.delete, paths))


async def delete_discarded(store: JobStore, directories: JobDirectories, disk: WorkerThread) -> None:
    """Delete from the disk what is noted to be deleted. Raises `StorageUnavailable`."""
    if paths := await store.discards():
        await store.forget_discards(await disk.call(directories.delete, paths))


def surplus(known: list[JobCheckpoint], limit: int) -> list[int]:
    """The steps to drop, oldest first, so that `limit` are left: or one more, where the best is old."""
    droppable = [checkpoint.step for checkpoint in known[:-1] if not checkpoint.best]
    return droppable[: max(0, len(known) - limit)]


_log = get_logger("jobs")

Outcome = Literal["paused", "cancelled", "finished"]


class JobFailed(Exception):
    """The job is to end as failed."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message, param)


class Execution:
    """Event loop only. `work` is called once, and again after each pause that kept the run."""

    def __init__(
        self,
        job: Job,
        prepare: Callable[[], Awaitable[PreparedJob]],
        engine: JobEngine,
        metrics: Metrics,
        store: JobStore,
        directories: JobDirectories,
        checkpoints: Checkpoints,
    ) -> None:
        self.id = job.id
        self._prepare = prepare
        self._engine = engine
        self._metrics = metrics
        self._store = store
        self._directories = directories
        self._checkpoints = checkpoints
        self._prepared: PreparedJob | None = None
        self._handle: RunHandle | None = None
        self._inbox: asyncio.Queue[RunEvent] = asyncio.Queue()
        self.cancelled = False
        self.paused = False
        """True once its run stands still and the pause is stored, though `work` may have loggers to end."""
        self._pausing = False
        self._suspending = False
        self._loggers: JobLoggers | None = None
        self._logger_problems: asyncio.Queue[str] = asyncio.Queue()

    # -- requests from outside -----------------------------------------------------------------

    def cancel(self) -> None:
        """End at the next step."""
        self.cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def pause(self) -> None:
        """Stand still at the next step; `work` then returns, with the run kept."""
        self._pausing = True
        if self._handle is not None:
            self._handle.pause()

    def suspend(self) -> bool:
        """Pause because the process ends. False where there is nothing to wait for: no run has begun."""
        self._suspending = True
        self.pause()
        return self._handle is not None

    @property
    def kept(self) -> bool:
        """True if the run is still there, to continue without reading a checkpoint."""
        return self._handle is not None

    def close(self) -> None:
        """Release the run."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    # -- the work ------------------------------------------------------------------------------

    async def work(self) -> None:
        """Bring the job to an end or to a pause, both stored. Raises nothing but a cancellation."""
        self.paused = False
        try:
            self.paused = await self._work() == "paused"
        except JobFailed as failure:
            await self._fail(failure.error)
        except RequestError as error:
            await self._fail(failure_of(error))
        except OSError as error:
            await self._fail(JobError(error_code(error), f"The job cannot go on: {reason(error)}."))
        except Exception:
            _log.exception("job_failed", job=self.id)
            await self._fail(JobError("internal_error", "An internal error ended the job; the server's log has more."))
        finally:
            self._metrics.on_train_pause(self.id)
            if not self.paused:
                self.close()
        await self._offer(none=True)
        await self._end_loggers()

    def _log_to(self, prepared: PreparedJob) -> None:
        if prepared.recipe is None or not prepared.recipe.loggers or self._loggers is not None:
            return
        loop = asyncio.get_running_loop()

        def told(problem: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._logger_problems.put_nowait, problem)

        self._loggers = JobLoggers(prepared.recipe, self.id, self._directories.folder(self.id), told)

    async def _end_loggers(self) -> None:
        """Have the loggers write what they have, and report the ones that failed."""
        if self._loggers is not None and (thread := self._loggers.end()) is not None:
            await call_in_fresh_thread(thread.join, CLOSE_SECONDS)
            await asyncio.sleep(0)  # what its last calls have put on the loop
        self._loggers = None
        await self._tell_logger_problems()

    async def _tell_logger_problems(self) -> None:
        while not self._logger_problems.empty():
            note = Note(self._logger_problems.get_nowait(), "warning")
            with contextlib.suppress(StorageUnavailable):
                await self._store.note(self.id, note)

    async def _work(self) -> Outcome:
        if self._prepared is None:
            await self._store.check_base(self.id, self._engine.base_fingerprint)
            self._prepared = await self._prepare()
        step = await self._store.result(self.id)
        if step is None:
            outcome = await self._train(self._prepared)
            if outcome != "finished":
                return outcome
            step = await self._store.result(self.id)
            assert step is not None
            await self._publish(self._prepared, step)
        else:  # trained before the process ended; what was left to do is done now
            await self._store.move(self.id, "evaluating", Note("The training was done before; going on from there."))
            await self._publish(self._prepared, step)
        return "finished"

    async def _train(self, prepared: PreparedJob) -> Outcome:
        self._log_to(prepared)
        if self._handle is not None:
            self._handle.resume()
        else:
            if self.cancelled:
                await self._store.move(self.id, "cancelled", Note("Cancelled."))
                return "cancelled"
            source = await self._checkpoints.newest(self.id)
            if source is not None:
                await self._store.note(self.id, Note(f"Going on from the checkpoint {source.name}."))
            self._handle = self._engine.start(self.id, prepared, source, self._inbox.put_nowait)
        # These were requested while there was no run.
        if self.cancelled:
            self._handle.cancel()
        elif self._pausing:
            self._handle.pause()
        await self._offer()
        return await self._follow(self._handle)

    async def _follow(self, handle: RunHandle) -> Outcome:
        """Store and act on the events of the run, until one says that it stands still."""
        while True:
            reports: list[Report] = []
            event: RunEvent | None = await self._inbox.get()
            while isinstance(event, Report):
                self._measure(event)
                reports.append(event)
                event = None if self._inbox.empty() else self._inbox.get_nowait()
            if reports:
                await self._store.report(self.id, reports)
                await self._tell_logger_problems()
            if event is not None and (outcome := await self._take(handle, event)) is not None:
                return outcome

    def _measure(self, event: Report) -> None:
        if self._loggers is not None:
            self._loggers.note(event)
        if isinstance(event, StepEvent):
            self._metrics.on_train_step(event, self.id)
        elif isinstance(event, EvalEvent):
            self._metrics.on_eval(event)

    async def _take(self, handle: RunHandle, event: RunEvent) -> Outcome | None:
        """Act on an event that is no report."""
        match event:
            case CheckpointEvent():
                await self._save(handle, event.step, best=event.best)
            case RestartEvent():
                note = Note(f"{event.message} Started again from the newest checkpoint.", "warning")
                await self._store.note(self.id, note)
            case PausedEvent():
                await self._save(handle, event.step, best=False)
                self._pausing = False
                if self._suspending:
                    await self._store.interrupt(self.id)
                    return "paused"
                note = Note(f"Paused after step {event.step}.")
                job = await self._store.move(self.id, "paused", note, unless_cancelled=True)
                return "paused" if job.state == "paused" else "cancelled"
            case FinishedEvent():
                snapshot = await handle.take_snapshot(event.step)
                with _disk_failures("the result"):
                    await self._checkpoints.save_result(self.id, event.best_step, snapshot, event.reason)
                return "finished"
            case CancelledEvent():
                await self._store.move(self.id, "cancelled", Note(f"Cancelled after step {event.step}."))
                return "cancelled"
            case FailedEvent():
                raise JobFailed(event.code, event.message)
        return None

    async def _save(self, handle: RunHandle, step: int, *, best: bool) -> None:
        snapshot = await handle.take_snapshot(step)
        if await self._checkpoints.has(self.id, step):
            return  # one was due at the step at which the run was paused: it is the same
        assert self._prepared is not None
        limit = self._prepared.summary.get("save_total_limit")
        with _disk_failures(f"the checkpoint of step {step}"):
            await self._checkpoints.save(self.id, step, snapshot, best=best, limit=limit)
        await self._offer()

    async def _offer(self, *, none: bool = False) -> None:
        """Make the checkpoints available to requests, or `none` of them any more. Errors there do not fail the job."""
        if self._prepared is None or self._prepared.result_files != ADAPTER_FILES:
            return
        try:
            known = [] if none else await self._store.checkpoints(self.id)
            folders = {one.step: self._directories.checkpoint(self.id, one.step) / ADAPTER_FILES for one in known}
            await self._engine.offer(name=self._prepared.name or self.id, job_id=self.id, folders=folders)
        except Exception:
            _log.exception("checkpoints_not_offered", job=self.id)

    async def _publish(self, prepared: PreparedJob, step: int) -> None:
        metrics = await self._store.gate_metrics(self.id, step)
        good, why = prepared.publish_when(metrics)
        gate = {"gate": {"condition": prepared.publish.when, "met": good, "reason": why, "metrics": metrics}}
        if not good:
            note = Note(f"Trained, and not published: {why}", "warning", gate)
            await self._store.move(self.id, "succeeded", note, unless_cancelled=True)
            return
        note = Note(f"Publishing: {why}" if why else "Publishing.", data=gate)
        job = await self._store.move(self.id, "publishing", note, unless_cancelled=True)
        if job.state == "cancelled":
            return
        label = await patiently(
            lambda: self._engine.publish(
                name=job.name or self.id,
                source=self._directories.result(self.id) / prepared.result_files,
                job_id=self.id,
                step=step,
                metrics=metrics,
            )
        )
        # It is published, and must not be called failed, however long the disk is full.
        asking = prepared.summary.get("how_to_ask")
        if prepared.result_files != ADAPTER_FILES:
            asking = f"Serve it: eft models swap {label}, or eft serve {label}."
        elif asking:
            asking = f"Ask it {asking}"
        note = Note(" ".join(filter(None, [f"Published as {label}.", asking])))
        await insist(lambda: self._store.move(self.id, "succeeded", note, adapter=label))

    async def _fail(self, error: JobError) -> None:
        """Release the run, then store the failure: so nothing is held while the disk is full."""
        self.close()
        _log.warning("job_failed", job=self.id, code=error.code, reason=error.message)
        with contextlib.suppress(Conflict):  # it has an end already
            await insist(lambda: self._store.fail(self.id, error))


@contextlib.contextmanager
def _disk_failures(what: str) -> Iterator[None]:
    """A disk that is full or broken ends the job, by name; the checkpoints before stay."""
    try:
        yield
    except OSError as error:
        code = error_code(error)
        known = code != "storage_unavailable"
        raise JobFailed(code if known else "checkpoint_failed", f"Cannot write {what}: {reason(error)}.") from error
