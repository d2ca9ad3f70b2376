"""Reading and changing rows, as parts of a transaction: every function takes the connection.

A state changes only through `move`, together with the event that tells of it.
"""

import sqlite3
import time
from typing import Any

import msgspec

from runtime.errors import Conflict, NotFound
from runtime.trainer.jobs.records import Job, JobError, JobEvent, Note, Progress
from runtime.trainer.jobs.states import ENDED, TRANSITIONS, State

_RECENT = 20
"""Steps over which their mean time is taken."""

_COLUMNS = frozenset(
    {"name", "summary", "total_steps", "wanted", "attempts", "error_code", "error_message", "error_param", "adapter"}
)


def get(connection: sqlite3.Connection, job_id: str) -> Job:
    """Raises `NotFound`."""
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no job `{job_id[:100]}`.", param="job_id", code="job_not_found")
    return to_job(row)


def move(connection: sqlite3.Connection, job_id: str, to: State, note: Note, **columns: Any) -> Job:
    """Change a job's state, and store the event that says so. Raises `Conflict` where `to` cannot follow."""
    job = get(connection, job_id)
    if to not in TRANSITIONS[job.state]:
        raise Conflict(f"The job is {job.state}: it cannot become {to}.", code="job_state")
    now = time.time()
    if to == "running" and job.started_at is None:
        columns["started_at"] = now
    if to in ENDED:
        columns["finished_at"] = now
    if to != job.state and to not in ("running", "evaluating"):
        columns.setdefault("wanted", None)
    change(connection, job_id, state=to, **columns)
    append(connection, job_id, Note(note.message, note.level, {"status": to, **note.data}), now)
    return get(connection, job_id)


def fail(connection: sqlite3.Connection, job_id: str, error: JobError) -> Job:
    return move(
        connection,
        job_id,
        "failed",
        Note(error.message, "error", {"code": error.code}),
        error_code=error.code,
        error_message=error.message,
        error_param=error.param,
    )


def change(connection: sqlite3.Connection, job_id: str, **columns: Any) -> None:
    assert columns.keys() <= _COLUMNS | {"state", "started_at", "finished_at"}
    assignments = ", ".join(f"{name} = ?" for name in columns)
    connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*columns.values(), job_id))


def append(connection: sqlite3.Connection, job_id: str, note: Note, now: float | None = None) -> None:
    """Store an event under the job's next number."""
    connection.execute(
        "INSERT INTO job_events (job_id, number, created_at, level, kind, step, message, data) "
        "SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ? FROM job_events WHERE job_id = ?",
        (
            job_id,
            time.time() if now is None else now,
            note.level,
            note.kind,
            note.step,
            note.message,
            msgspec.json.encode(note.data).decode(),
            job_id,
        ),
    )


def progress(connection: sqlite3.Connection, job_id: str) -> Progress:
    """From the step events: what a resumed run reported again counts once."""
    last = connection.execute(
        "SELECT step, data FROM job_events WHERE job_id = ? AND kind = 'step' ORDER BY number DESC LIMIT ?",
        (job_id, _RECENT),
    ).fetchall()
    if not last:
        return Progress()
    data = [msgspec.json.decode(row["data"]) for row in last]
    trained = connection.execute(
        "SELECT sum(tokens) FROM (SELECT json_extract(data, '$.trained_tokens') AS tokens, max(number) "
        "FROM job_events WHERE job_id = ? AND kind = 'step' AND step <= ? GROUP BY step)",
        (job_id, last[0]["step"]),
    ).fetchone()[0]
    return Progress(
        step=last[0]["step"],
        loss=data[0]["loss"],
        trained_tokens=int(trained),
        step_seconds=sum(event["seconds"] for event in data) / len(data),
    )


def events(connection: sqlite3.Connection, job_id: str, after: int, limit: int) -> list[JobEvent]:
    """Numbered above `after`, oldest first."""
    query = "SELECT * FROM job_events WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?"
    return [to_event(row) for row in connection.execute(query, (job_id, after, limit))]


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """State → how many jobs are in it."""
    return dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())


def to_job(row: sqlite3.Row) -> Job:
    error = row["error_code"] and JobError(row["error_code"], row["error_message"], row["error_param"])
    return Job(
        id=row["id"],
        state=row["state"],
        name=row["name"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        recipe=row["recipe"],
        summary=msgspec.json.decode(row["summary"]),
        total_steps=row["total_steps"],
        wanted=row["wanted"],
        attempts=row["attempts"],
        error=error or None,
        adapter=row["adapter"],
    )


def to_event(row: sqlite3.Row) -> JobEvent:
    return JobEvent(
        number=row["number"],
        created_at=row["created_at"],
        level=row["level"],
        kind=row["kind"],
        message=row["message"],
        data=msgspec.json.decode(row["data"]),
    )
