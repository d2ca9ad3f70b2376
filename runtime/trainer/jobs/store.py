"""Storage of jobs in the state directory's database. Each method is one transaction.

Nothing here runs anything: `runtime.trainer.jobs.manager` does, after it has stored what it is about to do.
"""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

import msgspec

from runtime.errors import Conflict, StorageUnavailable, TooManyRequests
from runtime.events import AnswersEvent, ProgressEvent, ReadingEvent, Report, StepEvent
from runtime.support.database import Database
from runtime.trainer.jobs import rows
from runtime.trainer.jobs.directories import ORIGIN
from runtime.trainer.jobs.records import (
    AT_WORK,
    ENDED,
    WAITING,
    Job,
    JobCheckpoint,
    JobError,
    JobState,
    JobSubmission,
    Level,
    Note,
    PreparedJob,
)
from runtime.trainer.jobs.rows import JobReader
from settings.units import show_duration

T = TypeVar("T")

MAX_CRASHES = 3
"""Starts in a row without a checkpoint after which a job that took the process with it is not tried again."""


def files_deleted() -> Conflict:
    """Error for a job whose uploads are needed and were deleted."""
    return Conflict(
        "The data files of this job were deleted (trainer.keep_uploads): send the recipe and the files anew.",
        code="files_deleted",
    )


RETRY = 5.0
"""Seconds between two tries to store something, while the disk is full."""


async def insist(store: Callable[[], Awaitable[T]]) -> T:
    """Store what has happened already, retrying until there is room for it."""
    while True:
        try:
            return await store()
        except StorageUnavailable:
            await asyncio.sleep(RETRY)


class JobStore(JobReader):
    """Jobs, their files, events, checkpoints and results."""

    def __init__(self, database: Database, on_change: Callable[[str, dict[str, int] | None], None]) -> None:
        """`on_change` is called on the event loop after each change of a job: with the new counts by state where
        a state may have changed, and None where events were stored."""
        super().__init__(database)
        self._on_change = on_change
        self._waiting_for_memory: set[str] = set()
        """Jobs with a note that they wait for it."""

    # -- coming and going ----------------------------------------------------------------------

    async def create(self, submission: JobSubmission, *, max_waiting: int) -> tuple[Job, bool]:
        """Store a job as validating; or give the job that this idempotency key made before, and False.

        Raises `Conflict` for a key that came with another body, and `TooManyRequests`.
        """

        def work(c: sqlite3.Connection) -> tuple[Job, bool]:
            key = submission.idempotency_key
            if key is not None:
                row = c.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
                if row is not None and row["owner"] != submission.owner:
                    raise Conflict(
                        "This Idempotency-Key belongs to a job of another API key: send another.",
                        param="Idempotency-Key",
                        code="idempotency_key_reused",
                    )
                if row is not None and row["digest"] != submission.digest:
                    raise Conflict(
                        "This Idempotency-Key was used with another recipe or other files.",
                        param="Idempotency-Key",
                        code="idempotency_key_reused",
                    )
                if row is not None:
                    return rows.to_job(row), False
            by_state = rows.counts(c)
            if sum(by_state.get(state, 0) for state in WAITING) >= max_waiting:
                raise TooManyRequests(f"{max_waiting} jobs are waiting already. Try again later.", retry_after=60)
            c.execute(
                "INSERT INTO jobs (id, state, created_at, attempts, recipe, digest, idempotency_key, owner) "
                "VALUES (?, 'validating', ?, 1, ?, ?, ?, ?)",
                (submission.id, time.time(), submission.recipe, submission.digest, key, submission.owner),
            )
            files = [(submission.id, file.name, file.stored_as, file.bytes) for file in submission.files]
            c.executemany("INSERT INTO job_files (job_id, name, stored_as, bytes) VALUES (?, ?, ?, ?)", files)
            rows.append(
                c, submission.id, Note("Created; reading the recipe and its data.", data={"status": "validating"})
            )
            return rows.get(c, submission.id), True

        return await self._changing(submission.id, work)

    async def remove(self, job_id: str) -> None:
        """Delete a job that failed before a client got its id."""

        def work(c: sqlite3.Connection) -> None:
            c.execute("DELETE FROM jobs WHERE id = ? AND state = 'validating'", (job_id,))

        await self._changing(job_id, work)

    async def delete(self, job_id: str, paths: list[str], *, ended_before: float | None = None) -> None:
        """Delete a job that has come to its end, with all that is stored of it; `paths` go from the disk next.

        Raises `NotFound`, and `Conflict` for one that has not, or not before this time, in seconds since the epoch.
        """

        def work(c: sqlite3.Connection) -> None:
            rows.require_ended(c, job_id, before=ended_before)
            c.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            rows.discard(c, paths)

        await self._changing(job_id, work)

    async def accept(self, job_id: str, prepared: PreparedJob) -> Job:
        """From validating to queued. Raises `Conflict` while another job of that name is not at its end."""

        name = prepared.name or job_id

        def work(c: sqlite3.Connection) -> Job:
            _refuse_same_name(c, name, job_id)
            for warning in prepared.summary.get("warnings", ()):
                rows.append(c, job_id, Note(warning, "warning"))
            return rows.move(
                c,
                job_id,
                "queued",
                Note(f"The recipe is valid: {prepared.total_steps} steps. Queued."),
                name=name,
                summary=msgspec.json.encode(prepared.summary).decode(),
                total_steps=prepared.total_steps,
                attempts=0,
            )

        return await self._changing(job_id, work)

    # -- states --------------------------------------------------------------------------------

    async def start_next(self, *, max_running: int, memory: Callable[[], int]) -> Job | None:
        """Start the first of the queue, of those of the highest priority. None where none waits, `max_running` are at
        work, or it does not fit beside these into `memory`, in bytes. A job alone always starts. A launched job has
        devices of its own: it takes none of that memory, and another one waits for the devices, others not for it."""

        def work(c: sqlite3.Connection) -> Job | None:
            beside = _at_work(c)
            if len(beside) >= max_running:
                return None
            devices_taken = any(job.summary.get("launched") for job in beside)
            row = c.execute(
                f"SELECT * FROM jobs WHERE state = 'queued' {_LAUNCHABLE if devices_taken else ''} {_IN_TURN} LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            job = rows.to_job(row)
            if beside and (problem := _lacks_memory(job, beside, memory())):
                if job.id not in self._waiting_for_memory:
                    self._waiting_for_memory.add(job.id)
                    rows.append(c, job.id, Note(problem))
                return None
            return rows.move(c, job.id, "running", Note("Started."), attempts=job.attempts + 1)

        job = await self._changing("", work)
        if job is not None:
            self._on_change(job.id, None)
        return job

    async def move(
        self, job_id: str, to: JobState, note: Note, *, unless_cancelled: bool = False, adapter: str | None = None
    ) -> Job:
        """Change a job's state. Raises `Conflict` where `to` cannot follow on it. `unless_cancelled`: a job whose end
        was requested meanwhile becomes cancelled instead."""

        def work(c: sqlite3.Connection) -> Job:
            if unless_cancelled and rows.get(c, job_id).wanted == "cancel":
                return rows.move(c, job_id, "cancelled", Note("Cancelled."))
            return rows.move(c, job_id, to, note, **({} if adapter is None else {"adapter": adapter}))

        return await self._changing(job_id, work)

    async def fail(self, job_id: str, error: JobError) -> Job:
        return await self._changing(job_id, lambda c: rows.fail(c, job_id, error))

    async def interrupt(self, job_id: str) -> None:
        """Note that the process ends in good order with this job at work: that is no crash. No-op for any other job."""

        def work(c: sqlite3.Connection) -> None:
            job = rows.get(c, job_id)
            if job.state in AT_WORK:
                note = Note("Interrupted: the server is stopping. It goes on when the server is back.", "warning")
                rows.move(c, job_id, "interrupted", note, attempts=max(0, job.attempts - 1), wanted=job.wanted)

        await self._changing(job_id, work)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job that is not at work, and mark one that is. Raises `Conflict` for one that cannot be."""

        def work(c: sqlite3.Connection) -> Job:
            job = rows.get(c, job_id)
            if job.state in ("running", "evaluating"):
                if job.wanted != "cancel":
                    rows.change(c, job_id, wanted="cancel")
                    rows.append(c, job_id, Note("Cancelling after the step that is running."))
                return rows.get(c, job_id)
            if job.state == "publishing" or job.ended:
                raise Conflict(f"The job is {job.state}: it cannot be cancelled.", code="job_state")
            return rows.move(c, job_id, "cancelled", Note("Cancelled."))

        return await self._changing(job_id, work)

    async def pause(self, job_id: str) -> Job:
        """Pause a queued job, and mark a running one. Raises `Conflict` for any other."""

        def work(c: sqlite3.Connection) -> Job:
            job = rows.get(c, job_id)
            if job.state == "running" and job.wanted != "cancel":
                if job.wanted is None:
                    rows.change(c, job_id, wanted="pause")
                    rows.append(c, job_id, Note("Pausing after the step that is running."))
                return rows.get(c, job_id)
            if job.state != "queued":
                what = "being cancelled" if job.wanted == "cancel" else job.state
                raise Conflict(f"The job is {what}: it cannot be paused.", code="job_state")
            return rows.move(c, job_id, "paused", Note("Paused before it started."))

        return await self._changing(job_id, work)

    async def check_resumable(self, job_id: str, base: str) -> Job:
        """The job, if by its rows it can be resumed. `base`: fingerprint of the base model's weights. Raises
        `NotFound`, `Conflict`."""
        return await self._database.call(lambda c: _require_resumable(c, job_id, base))

    async def check_base(self, job_id: str, base: str) -> None:
        """Raise `Conflict` where what the job has trained is for a base model of another fingerprint than `base`."""
        await self._database.call(lambda c: rows.require_same_base(c, rows.get(c, job_id), base))

    async def resume(self, job_id: str, *, base: str, at_once: bool, max_running: int) -> Job:
        """Make a paused job running, where its run is still there (`at_once`) and fewer than `max_running` are at work,
        else queued; and a failed one queued. Raises `Conflict` also where `check_resumable` does."""

        def work(c: sqlite3.Connection) -> Job:
            job = _require_resumable(c, job_id, base)
            if job.state == "failed":
                _refuse_same_name(c, job.name or job.id, job.id)
                note = Note(f"Resumed: queued, to go on from {rows.trained_so_far(c, job_id)}.")
                return rows.move(c, job_id, "queued", note, attempts=0)
            if at_once and len(_at_work(c)) < max_running:
                return rows.move(c, job_id, "running", Note("Resumed."))
            return rows.move(c, job_id, "queued", Note("Resumed: queued."))

        return await self._changing(job_id, work)

    async def recover(self) -> list[str]:
        """Queue again, or give up, what the last process left at work. Called once, when a process starts.

        Returns the ids of the jobs whose recipes are to be read again.
        """

        def work(c: sqlite3.Connection) -> list[str]:
            for row in c.execute("SELECT * FROM jobs ORDER BY number").fetchall():
                _recover(c, rows.to_job(row))
            query = "SELECT id FROM jobs WHERE state = 'validating' ORDER BY number"
            return [row["id"] for row in c.execute(query).fetchall()]

        return await self._changing("", work)

    # -- what a run reports --------------------------------------------------------------------

    async def report(self, job_id: str, events: Sequence[Report | ReadingEvent]) -> None:
        """Store steps, evaluations and progress, as one transaction. Raises `NotFound`."""

        def work(c: sqlite3.Connection) -> None:
            rows.get(c, job_id)
            for event in events:
                rows.append(c, job_id, _note(event))

        await self._events(job_id, work)

    async def add_checkpoint(self, job_id: str, checkpoint: JobCheckpoint) -> None:
        """Store a checkpoint whose directory is in place: from now on the job resumes from it."""

        def work(c: sqlite3.Connection) -> None:
            rows.add_checkpoint(c, job_id, checkpoint)
            rows.change(c, job_id, attempts=0)
            data = {"checkpoint": checkpoint.step, "best": checkpoint.best}
            rows.append(c, job_id, Note(f"Checkpoint at step {checkpoint.step}.", data=data))

        await self._events(job_id, work)

    async def drop_checkpoints(self, job_id: str, steps: list[int], paths: Sequence[str] = ()) -> None:
        """Delete their rows. Their directories, `paths`, go next: nothing may name what is half deleted."""

        def work(c: sqlite3.Connection) -> None:
            rows.drop_checkpoints(c, job_id, steps)
            rows.discard(c, list(paths))

        await self._events(job_id, work)

    async def prune(
        self, job_id: str, paths: list[str], *, ended_before: float, checkpoints: Collection[int] = ()
    ) -> None:
        """Delete the rows of these checkpoints of an ended job, and note `paths` that are to be deleted next. Raises
        `NotFound`, and `Conflict` as `delete` does."""

        def work(c: sqlite3.Connection) -> None:
            rows.require_ended(c, job_id, before=ended_before)
            rows.drop_checkpoints(c, job_id, checkpoints)
            rows.discard(c, paths)
            if rows.trained_so_far(c, job_id) is None:
                rows.discard(c, [f"jobs/{job_id}/{ORIGIN}"])

        await self._events(job_id, work)

    async def discard(self, paths: list[str]) -> None:
        """Note paths that are to be deleted next."""
        await self._events("", lambda c: rows.discard(c, paths))

    async def forget_discards(self, paths: list[str]) -> None:
        """Drop the notes of paths that are gone from the disk."""
        query = "DELETE FROM job_discards WHERE path = ?"
        await self._events("", lambda c: c.executemany(query, [(path,) for path in paths]))

    async def set_result(self, job_id: str, step: int, reason: str) -> Job:
        """Store that training is over and its result is on disk; the job is evaluating from here on."""

        def work(c: sqlite3.Connection) -> Job:
            rows.add_result(c, job_id, step)
            how = "Stopped early" if reason == "early_stopping" else "All steps are done"
            return rows.move(c, job_id, "evaluating", Note(f"{how}; the result is that of step {step}."), attempts=0)

        return await self._changing(job_id, work)

    async def note(self, job_id: str, note: Note) -> None:
        await self._events(job_id, lambda c: rows.append(c, job_id, note))

    # -- transactions --------------------------------------------------------------------------

    async def _changing(self, job_id: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """A transaction after which a job may be in another state."""
        result, counts = await self._database.call(lambda c: (work(c), rows.counts(c)))
        self._on_change(job_id, counts)
        return result

    async def _events(self, job_id: str, work: Callable[[sqlite3.Connection], object]) -> None:
        await self._database.call(work)
        self._on_change(job_id, None)


_IN_TURN = "ORDER BY COALESCE(json_extract(summary, '$.job_priority'), 0) DESC, number"
"""The order in which queued jobs start."""


_LAUNCHABLE = "AND NOT COALESCE(json_extract(summary, '$.launched'), 0)"
"""Jobs that may start while the devices of launched ones are taken."""


def _at_work(c: sqlite3.Connection) -> list[Job]:
    states = ", ".join(f"'{state}'" for state in sorted(AT_WORK))
    return [rows.to_job(row) for row in c.execute(f"SELECT * FROM jobs WHERE state IN ({states})").fetchall()]


def _lacks_memory(job: Job, beside: Sequence[Job], memory: int) -> str | None:
    """The reason where a job does not fit beside those at work into `memory` bytes."""
    own, taken = _memory_of(job), sum(map(_memory_of, beside))
    if own == 0 or taken == 0 or own + taken <= memory:
        return None
    need, there, room = (f"{size / 2**20:.0f} MiB" for size in (own, taken, memory))
    return f"Waits for memory: it takes {need} beside {there} of the jobs at work, and these may take {room} together."


def _memory_of(job: Job) -> int:
    """Bytes beside the base model; 0 on devices of its own."""
    return 0 if job.summary.get("launched") else int(job.summary.get("memory_bytes", 0))


def _refuse_same_name(c: sqlite3.Connection, name: str, job_id: str) -> None:
    """Raise `Conflict` where another job that has not ended is to make this adapter."""
    ended = ", ".join(f"'{state}'" for state in sorted(ENDED))
    # In any case of letters: an adapter's name is the same then.
    query = f"SELECT id FROM jobs WHERE name = ? COLLATE NOCASE AND id != ? AND state NOT IN ({ended})"
    other = c.execute(query, (name, job_id)).fetchone()
    if other is not None:
        raise Conflict(
            f"The job `{other['id']}` is making an adapter `{name}` already; wait for its end, or cancel it.",
            param="name",
            code="adapter_name_in_use",
        )


def _require_resumable(c: sqlite3.Connection, job_id: str, base: str) -> Job:
    job = rows.get(c, job_id)
    if job.state not in ("paused", "failed"):
        message = f"The job is {job.state}: only one that is paused or has failed can be resumed."
        raise Conflict(message, code="job_state")
    rows.require_same_base(c, job, base)
    if job.state == "failed" and rows.trained_so_far(c, job_id) is None:
        message = "The job has failed without a checkpoint to go on from: send its recipe again, as a new job."
        raise Conflict(message, code="job_state")
    query = "SELECT 1 FROM job_discards JOIN job_files ON job_id = ?1 WHERE path = 'jobs/' || ?1 || '/uploads'"
    if job.state == "failed" and c.execute(query, (job_id,)).fetchone() is not None:
        raise files_deleted()
    return job


def _recover(c: sqlite3.Connection, job: Job) -> None:
    crashed = job.attempts >= MAX_CRASHES
    error = JobError("crash_loop", f"The server ended {job.attempts} times in a row while this job was at work.")
    if job.state == "validating":
        if crashed:
            rows.fail(c, job.id, error)
        else:
            rows.change(c, job.id, attempts=job.attempts + 1)
        return
    if job.state in AT_WORK:
        note = Note("Interrupted: the server ended while the job was at work.", "warning")
        rows.move(c, job.id, "interrupted", note, wanted=job.wanted)
    elif job.state != "interrupted":
        return
    if job.wanted == "cancel":
        rows.move(c, job.id, "cancelled", Note("Cancelled."))
    elif crashed:
        rows.fail(c, job.id, error)
    elif job.wanted == "pause":
        rows.move(c, job.id, "paused", Note("Paused."))
    else:
        rows.move(c, job.id, "queued", Note("Queued again; it goes on from its newest checkpoint."))


def _note(event: Report | ReadingEvent) -> Note:
    data = msgspec.to_builtins(event)
    if isinstance(event, ProgressEvent):
        what = f"Step {event.step + 1} of {event.total_steps}" if event.activity == "train" else "The evaluation"
        left = "" if event.seconds_left is None else f"; about {show_duration(event.seconds_left)} left"
        return Note(f"{what} is {event.fraction:.0%} done{left}.", data=data, kind="progress", step=event.step)
    if isinstance(event, ReadingEvent):
        return Note(f"Read {event.rows:,} rows so far, {event.tokens:,} tokens.", data=data, kind="reading")
    if isinstance(event, StepEvent):
        message = f"Step {event.step}: loss {event.loss:.4f}"
        return Note(message, data=data, kind="step", step=event.step)
    if isinstance(event, AnswersEvent):
        rate = event.tokens / event.seconds if event.seconds > 0 else 0.0
        message = f"{event.rows} answers at step {event.step}: {event.tokens} tokens, {rate:.0f} a second"
        message = ". ".join([message, *event.problems])
        level: Level = "warning" if event.problems else "info"
        return Note(message, level, data=data, kind="answers", step=event.step)
    found = ", ".join(f"{name} {value:.4f}" for name, value in event.named.items())
    return Note(f"Evaluation at step {event.step}: {found}", data=data, kind="eval", step=event.step)
