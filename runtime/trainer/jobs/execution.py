"""One job at work: from reading its recipe to its last state, or to where it is put aside.

The run reports on the event loop; everything it reports is taken in order from one inbox, so that a step is
stored before the checkpoint that follows it.
"""

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal

from runtime.errors import Conflict, RequestError, StorageUnavailable
from runtime.logs import get_logger
from runtime.trainer.events import (
    CancelledEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    RunEvent,
    StepEvent,
)
from runtime.trainer.jobs.checkpoints import Checkpoints
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.ports import Ports, PreparedJob, RunHandle
from runtime.trainer.jobs.records import Job, JobError, Note
from runtime.trainer.jobs.store import JobStore, insist

_log = get_logger("jobs")

ADAPTER_FILES = "adapter_files"
"""Where in a result the adapter is."""

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
        ports: Ports,
        store: JobStore,
        directories: JobDirectories,
        checkpoints: Checkpoints,
    ) -> None:
        self.id = job.id
        self._prepare = prepare
        self._ports = ports
        self._store = store
        self._directories = directories
        self._checkpoints = checkpoints
        self._prepared: PreparedJob | None = None
        self._handle: RunHandle | None = None
        self._inbox: asyncio.Queue[RunEvent] = asyncio.Queue()
        self.cancelled = False
        self._pausing = False
        self._suspending = False

    # -- asked for from outside ----------------------------------------------------------------

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
        """Whether the run is still there, to go on without reading a checkpoint."""
        return self._handle is not None

    def close(self) -> None:
        """Let the run go."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    # -- the work ------------------------------------------------------------------------------

    async def work(self) -> None:
        """Bring the job to an end or to a pause, both stored. Raises nothing but a cancellation."""
        paused = False
        try:
            paused = await self._work() == "paused"
        except JobFailed as failure:
            await self._fail(failure.error)
        except StorageUnavailable as error:
            await self._fail(JobError("storage_unavailable", error.message))
        except RequestError as error:
            await self._fail(JobError(error.code or error.type, error.message, error.param))
        except Exception:
            _log.exception("job_failed", job=self.id)
            await self._fail(JobError("internal_error", "An internal error ended the job; the server's log has more."))
        finally:
            if not paused:
                self.close()
        await self._offer(none=True)

    async def _work(self) -> Outcome:
        if self._prepared is None:
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
        if self._handle is not None:
            self._handle.resume()
        else:
            if self.cancelled:
                await self._store.move(self.id, "cancelled", Note("Cancelled."))
                return "cancelled"
            source = await self._checkpoints.newest(self.id)
            if source is not None:
                await self._store.note(self.id, Note(f"Going on from the checkpoint {source.name}."))
            self._handle = self._ports.runs.start(self.id, prepared, source, self._inbox.put_nowait)
        # Asked for while there was no run to tell.
        if self.cancelled:
            self._handle.cancel()
        elif self._pausing:
            self._handle.pause()
        await self._offer()
        return await self._follow(self._handle)

    async def _follow(self, handle: RunHandle) -> Outcome:
        """Take in what the run reports, until it says that it stands still."""
        while True:
            reports: list[StepEvent | EvalEvent] = []
            event: RunEvent | None = await self._inbox.get()
            while isinstance(event, StepEvent | EvalEvent):
                self._measure(event)
                reports.append(event)
                event = None if self._inbox.empty() else self._inbox.get_nowait()
            if reports:
                await self._store.report(self.id, reports)
            if event is not None and (outcome := await self._take(handle, event)) is not None:
                return outcome

    def _measure(self, event: StepEvent | EvalEvent) -> None:
        if isinstance(event, StepEvent):
            self._ports.meters.on_train_step(event)
        else:
            self._ports.meters.on_eval(event)

    async def _take(self, handle: RunHandle, event: RunEvent) -> Outcome | None:
        """Act on an event that is no report."""
        match event:
            case CheckpointEvent():
                await self._save(handle, event.step, best=event.best)
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
        if await self._checkpoints.has(self.id, step):
            return  # one was due at the step at which the run was paused: it says the same
        assert self._prepared is not None
        snapshot = await handle.take_snapshot(step)
        limit = self._prepared.summary.get("save_total_limit")
        with _disk_failures(f"the checkpoint of step {step}"):
            await self._checkpoints.save(self.id, step, snapshot, best=best, limit=limit)
        await self._offer()

    async def _offer(self, *, none: bool = False) -> None:
        """Let the checkpoints be asked for, or none any more. What goes wrong there is not the job's fault."""
        if self._prepared is None:
            return
        try:
            known = [] if none else await self._store.checkpoints(self.id)
            folders = {one.step: self._directories.checkpoint(self.id, one.step) / ADAPTER_FILES for one in known}
            await self._ports.publisher.offer(name=self._prepared.name or self.id, job_id=self.id, folders=folders)
        except Exception:
            _log.exception("checkpoints_not_offered", job=self.id)

    async def _publish(self, prepared: PreparedJob, step: int) -> None:
        metrics = await self._store.gate_metrics(self.id, step)
        good, why = prepared.publish_when(metrics)
        if not good:
            note = Note(f"Trained, and not published: {why}", "warning")
            await self._store.move(self.id, "succeeded", note, unless_cancelled=True)
            return
        note = Note(f"Publishing: {why}" if why else "Publishing.")
        job = await self._store.move(self.id, "publishing", note, unless_cancelled=True)
        if job.state == "cancelled":
            return
        label = await self._ports.publisher.publish(
            name=job.name or self.id,
            source=self._directories.result(self.id) / ADAPTER_FILES,
            job_id=self.id,
            step=step,
            metrics=metrics,
        )
        # It is published, and must not be called failed, however long the disk is full.
        note = Note(f"Published as {label}.")
        await insist(lambda: self._store.move(self.id, "succeeded", note, adapter=label))

    async def _fail(self, error: JobError) -> None:
        """The run is gone before, so that nothing is held while the disk is full."""
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
        code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "checkpoint_failed"
        raise JobFailed(code, f"Cannot write {what}: {error.strerror or type(error).__name__}.") from error
