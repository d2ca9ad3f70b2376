"""Reading and changing rows, as parts of a transaction: every function takes the connection.

A state changes only through `move`, together with the event that records it.
"""

import sqlite3
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from runtime.adapters import store
from runtime.errors import Conflict, NotFound
from runtime.support.database import Database, select_page
from runtime.trainer.jobs.directories import LAUNCHED, ORIGIN, PREPARED
from runtime.trainer.jobs.records import (
    ENDED,
    TRANSITIONS,
    Job,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobFile,
    JobProgress,
    JobRecord,
    JobState,
    Note,
    ThinnedMetrics,
)

_RECENT = 20
"""Steps over which their mean time is taken."""

_COLUMNS = frozenset(
    {"name", "summary", "total_steps", "wanted", "attempts", "error_code", "error_message", "error_param", "adapter"}
)


def get(connection: sqlite3.Connection, job_id: str, owner: str | None = None, *, param: str = "job_id") -> Job:
    """The job. `owner`: tenant that asks; None may see every job. Raises `NotFound`, which names `param`."""
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None or owner not in (None, row["owner"]):
        raise NotFound(f"There is no job `{job_id[:100]}`.", param=param, code="job_not_found")
    return to_job(row)


def record(connection: sqlite3.Connection, job_id: str) -> JobRecord | None:
    """The record for the job's folder; None where there is no such job."""
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        return None
    return JobRecord(
        job=to_job(row),
        digest=row["digest"],
        idempotency_key=row["idempotency_key"],
        files=tuple(files(connection, job_id)),
    )


def files(connection: sqlite3.Connection, job_id: str) -> list[JobFile]:
    """Read the files of a job, in the order in which they were sent."""
    query = "SELECT name, stored_as, bytes FROM job_files WHERE job_id = ? ORDER BY stored_as"
    return [
        JobFile(name=row["name"], stored_as=row["stored_as"], bytes=row["bytes"])
        for row in connection.execute(query, (job_id,))
    ]


def move(connection: sqlite3.Connection, job_id: str, to: JobState, note: Note, **columns: Any) -> Job:
    """Change a job's state, and store the event that says so. Raises `Conflict` where `to` cannot follow."""
    job = get(connection, job_id)
    if to not in TRANSITIONS[job.state]:
        raise Conflict(f"The job is {job.state}: it cannot become {to}.", code="job_state")
    now = time.time()
    if to == "running" and job.started_at is None:
        columns["started_at"] = now
    if to in ENDED:
        columns["finished_at"] = now
        # Read by nothing now, but for what a failed job that is resumed goes on from.
        resumable = to == "failed" and trained_so_far(connection, job_id) is not None
        unneeded = (PREPARED, LAUNCHED) if resumable else (PREPARED, LAUNCHED, ORIGIN)
        discard(connection, [f"jobs/{job_id}/{name}" for name in unneeded])
    elif job.ended:
        columns |= {"finished_at": None, "error_code": None, "error_message": None, "error_param": None}
    if to != job.state and to not in ("running", "evaluating"):
        columns.setdefault("wanted", None)
    change(connection, job_id, state=to, **columns)
    append(connection, job_id, Note(note.message, note.level, {"status": to, **note.data}), now)
    return get(connection, job_id)


def fail(connection: sqlite3.Connection, job_id: str, error: JobError) -> Job:
    """Move a job to `failed`, with the reason."""
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
    """Set columns of a job."""
    assert columns.keys() <= _COLUMNS | {"state", "started_at", "finished_at"}
    assignments = ", ".join(f"{name} = ?" for name in columns)
    connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*columns.values(), job_id))


def append(connection: sqlite3.Connection, job_id: str, note: Note, now: float | None = None) -> None:
    """Store an event under the job's next number."""
    query = "SELECT coalesce(max(number), 0) + 1 FROM job_events WHERE job_id = ?"
    event = JobEvent(
        number=connection.execute(query, (job_id,)).fetchone()[0],
        created_at=time.time() if now is None else now,
        level=note.level,
        kind=note.kind,
        message=note.message,
        data=note.data,
    )
    insert_event(connection, job_id, event, step=note.step)


def insert_event(connection: sqlite3.Connection, job_id: str, event: JobEvent, *, step: int | None = None) -> None:
    """Store an event as it is; its step, by default, is the one that its data names."""
    if step is None and event.kind not in ("message", "reading"):
        step = event.data["step"]
    connection.execute(
        "INSERT INTO job_events (job_id, number, created_at, level, kind, step, message, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job_id,
            event.number,
            event.created_at,
            event.level,
            event.kind,
            step,
            event.message,
            msgspec.json.encode(event.data).decode(),
        ),
    )


def add_checkpoint(connection: sqlite3.Connection, job_id: str, checkpoint: JobCheckpoint) -> None:
    """Insert a checkpoint; the best one so far is the only best one."""
    if checkpoint.best:
        connection.execute("UPDATE job_checkpoints SET best = 0 WHERE job_id = ?", (job_id,))
    connection.execute(
        "INSERT INTO job_checkpoints (job_id, step, best, created_at) VALUES (?, ?, ?, ?)",
        (job_id, checkpoint.step, checkpoint.best, checkpoint.created_at),
    )


def add_result(connection: sqlite3.Connection, job_id: str, step: int) -> None:
    """Record that the result of a finished run is on the disk."""
    connection.execute("INSERT INTO job_results (job_id, step) VALUES (?, ?)", (job_id, step))


def progress(connection: sqlite3.Connection, job_id: str) -> JobProgress:
    """From the last step events, in time that does not depend on how many there are. What a resumed run reported again
    counts once."""
    last = connection.execute(  # `+`: along the numbers, not along the index by step, which would have to be sorted
        "SELECT step, data, number FROM job_events WHERE job_id = ? AND +kind = 'step' ORDER BY number DESC LIMIT ?",
        (job_id, _RECENT),
    ).fetchall()
    fraction, finish = _under_way(connection, job_id, last[0]["number"] if last else 0)
    if not last:
        return JobProgress(fraction=fraction, finish=finish, rows_read=_rows_read(connection, job_id))
    data = [msgspec.json.decode(row["data"]) for row in last]
    query = "SELECT trained_tokens FROM job_progress WHERE job_id = ? AND step = ?"
    trained = connection.execute(query, (job_id, last[0]["step"])).fetchone()
    return JobProgress(
        step=last[0]["step"],
        loss=data[0]["loss"],
        trained_tokens=0 if trained is None else trained["trained_tokens"],
        step_seconds=sum(event["seconds"] for event in data) / len(data),
        fraction=fraction,
        finish=finish,
    )


def _rows_read(connection: sqlite3.Connection, job_id: str) -> int | None:
    row = connection.execute(
        "SELECT data FROM job_events WHERE job_id = ? AND +kind = 'reading' ORDER BY number DESC LIMIT 1", (job_id,)
    ).fetchone()
    return None if row is None else int(msgspec.json.decode(row["data"])["rows"])


def _under_way(connection: sqlite3.Connection, job_id: str, after: int) -> tuple[float | None, float | None]:
    """Share done of the activity under way, and the time at which the run will end, as reported after this event."""
    row = connection.execute(
        "SELECT created_at, data FROM job_events WHERE job_id = ? AND +kind = 'progress' AND number > ? "
        "ORDER BY number DESC LIMIT 1",
        (job_id, after),
    ).fetchone()
    if row is None:
        return None, None
    data = msgspec.json.decode(row["data"])
    left = data["seconds_left"]
    return data["fraction"], None if left is None else row["created_at"] + left


def events(connection: sqlite3.Connection, job_id: str, after: int, limit: int) -> list[JobEvent]:
    """Events numbered above `after`, oldest first."""
    query = "SELECT * FROM job_events WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?"
    return [to_event(row) for row in connection.execute(query, (job_id, after, limit))]


def drop_checkpoints(connection: sqlite3.Connection, job_id: str, steps: Collection[int]) -> None:
    """Delete the rows of these checkpoints."""
    values = [(job_id, step) for step in steps]
    connection.executemany("DELETE FROM job_checkpoints WHERE job_id = ? AND step = ?", values)


def trained_so_far(connection: sqlite3.Connection, job_id: str) -> str | None:
    """Name of what a job goes on from when it is resumed: its result or its newest checkpoint. None: it has neither."""
    if connection.execute("SELECT 1 FROM job_results WHERE job_id = ?", (job_id,)).fetchone() is not None:
        return "its result"
    query = "SELECT max(step) AS step FROM job_checkpoints WHERE job_id = ?"
    step = connection.execute(query, (job_id,)).fetchone()["step"]
    return None if step is None else f"the checkpoint of step {step}"


def require_same_base(connection: sqlite3.Connection, job: Job, base: str) -> None:
    """Raise `Conflict` where a job has trained, for a base model of another fingerprint than `base`. Jobs of older
    versions do not name theirs."""
    known = job.summary.get("base_fingerprint", base)
    if known != base and trained_so_far(connection, job.id) is not None:
        raise Conflict(
            f"The job has trained for other weights of the base model ({job.summary.get('base_model')}) than those "
            "that are served now. Serve that model and resume the job there, or start it again, as a new job.",
            code="base_model_changed",
        )


def require_ended(connection: sqlite3.Connection, job_id: str, *, before: float | None = None) -> None:
    """Raise `NotFound`, and `Conflict` for a job that has not ended, or not until the time `before`, in seconds since
    the epoch."""
    job = get(connection, job_id)
    if not job.ended:
        raise Conflict(
            f"The job is {job.state}: only one that has ended can be deleted. Cancel it first.", code="job_state"
        )
    if before is not None and ended_at(job) >= before:
        raise Conflict("The job has ended again since.", code="job_state")


def ended_at(job: Job) -> float:
    """Time of an ended job's end, in seconds since the epoch; that of its creation where an older version knew none."""
    return job.finished_at or job.created_at


def discard(connection: sqlite3.Connection, paths: list[str]) -> None:
    """Note what is to be deleted from the disk: a process that dies before it is done leaves that to the next."""
    connection.executemany("INSERT OR IGNORE INTO job_discards (path) VALUES (?)", [(path,) for path in paths])


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """State → number of jobs in it."""
    return dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())


def to_job(row: sqlite3.Row) -> Job:
    """The job of a row."""
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
        owner=row["owner"],
    )


def to_event(row: sqlite3.Row) -> JobEvent:
    """The event of a row."""
    return JobEvent(
        number=row["number"],
        created_at=row["created_at"],
        level=row["level"],
        kind=row["kind"],
        message=row["message"],
        data=msgspec.json.decode(row["data"]),
    )


# -- reading ---------------------------------------------------------------------------------------
#
# Queries about jobs. Each method is one transaction, and changes nothing.


class JobReader:
    """Jobs, their files, events, checkpoints and results, as they are stored."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """The job. `owner`: tenant that asks; None may see every job. Raises `NotFound`."""
        return await self._database.call(lambda c: get(c, job_id, owner))

    async def describe(self, job_id: str) -> tuple[Job, JobProgress]:
        return await self._database.call(lambda c: (get(c, job_id), progress(c, job_id)))

    async def page(
        self,
        *,
        after: str | None,
        limit: int,
        states: tuple[str, ...],
        owner: str | None = None,
        newest_first: bool = True,
        matches: Callable[[Job], bool] = lambda job: True,
    ) -> tuple[list[tuple[Job, JobProgress]], bool]:
        """Jobs from behind the job `after`, and whether there are more. `owner`: as in `get`. `matches`: a filter by
        what the rows have no column for. Raises `NotFound`."""

        def work(c: sqlite3.Connection) -> tuple[list[tuple[Job, JobProgress]], bool]:
            if after is not None:
                get(c, after, owner, param="after")
            where = {f"state IN ({', '.join('?' * len(states))})": states} if states else {}
            found: list[Job] = []
            behind, more = after, True
            while more and len(found) <= limit:
                rows, more = select_page(
                    c, "jobs", where, owner=owner, after=behind, limit=limit + 1, newest_first=newest_first
                )
                found += filter(matches, map(to_job, rows))
                behind = rows[-1]["id"] if rows else behind
            return [(job, progress(c, job.id)) for job in found[:limit]], len(found) > limit

        return await self._database.call(work)

    async def files(self, job_id: str) -> list[JobFile]:
        return await self._database.call(lambda c: files(c, job_id))

    async def events(self, job_id: str, *, after: int, limit: int) -> tuple[Job, list[JobEvent]]:
        """The events numbered above `after`, oldest first. Raises `NotFound`."""
        return await self._database.call(lambda c: (get(c, job_id), events(c, job_id, after, limit)))

    async def latest_events(self, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
        """The newest events first, of those numbered below `before`. Raises `NotFound`."""
        query = "SELECT * FROM job_events WHERE job_id = ? AND number < ? ORDER BY number DESC LIMIT ?"

        def work(c: sqlite3.Connection) -> list[JobEvent]:
            get(c, job_id)
            return [to_event(row) for row in c.execute(query, (job_id, 2**53 if before is None else before, limit))]

        return await self._database.call(work)

    async def events_after(self, job_id: str, number: int, limit: int) -> list[JobEvent]:
        """The same, and nothing for a job that is not there."""
        return await self._database.call(lambda c: events(c, job_id, number, limit))

    async def metrics(self, job_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Steps and evaluations above step `after`, each step once, as `StepEvent` and `EvalEvent` have them."""
        query = (
            "SELECT data, max(number) FROM job_events WHERE job_id = ? AND kind IN ('step', 'eval') "
            "AND step > ? GROUP BY step, kind ORDER BY step, kind DESC LIMIT ?"
        )

        def work(c: sqlite3.Connection) -> list[dict[str, Any]]:
            get(c, job_id)
            return [msgspec.json.decode(row["data"]) for row in c.execute(query, (job_id, after, limit))]

        return await self._database.call(work)

    async def thinned_metrics(self, job_id: str, *, limit: int) -> ThinnedMetrics:
        """`metrics` of the whole job: at most `limit` steps and as many evaluations, evenly, the last ones among
        them."""
        query = (
            "WITH places AS (SELECT kind, step, max(number) AS number, "
            "row_number() OVER (PARTITION BY kind ORDER BY step DESC) - 1 AS place, "
            "count(*) OVER (PARTITION BY kind) AS total "
            "FROM job_events WHERE job_id = ?1 AND kind IN ('step', 'eval') GROUP BY kind, step) "
            "SELECT places.kind, total, data FROM places JOIN job_events USING (number) "
            "WHERE job_id = ?1 AND place % ((total + ?2 - 1) / ?2) = 0 ORDER BY places.step, places.kind DESC"
        )

        def work(c: sqlite3.Connection) -> ThinnedMetrics:
            get(c, job_id)
            found = c.execute(query, (job_id, limit)).fetchall()
            totals = {row["kind"]: int(row["total"]) for row in found}
            rows = [msgspec.json.decode(row["data"]) for row in found]
            return ThinnedMetrics(rows=rows, steps=totals.get("step", 0), evaluations=totals.get("eval", 0))

        return await self._database.call(work)

    async def gate_metrics(self, job_id: str, step: int) -> dict[str, float]:
        """Metrics of the weights of `step`: `train_loss`, `train_accuracy` and `train_` and the name for those of the
        loss; the same with `eval_` of the last evaluation up to then, and with `base_` of the one before the first
        step. Unknown values and NaN are left out."""
        query = (
            "SELECT data FROM job_events WHERE job_id = ? AND kind = ? AND step <= ? "
            "ORDER BY step DESC, number DESC LIMIT 1"
        )

        def work(c: sqlite3.Connection) -> dict[str, float]:
            metrics: dict[str, float] = {"step": step}
            for kind, prefix, most in (("step", "train", step), ("eval", "eval", step), ("eval", "base", 0)):
                row = c.execute(query, (job_id, kind, most)).fetchone()
                if row is not None:
                    data = msgspec.json.decode(row["data"])
                    named = {"loss": data["loss"], "accuracy": data["accuracy"], **data.get("metrics", {})}
                    # None: not a number.
                    metrics |= {f"{prefix}_{name}": value for name, value in named.items() if value is not None}
            return metrics

        return await self._database.call(work)

    async def answers(self, job_id: str) -> list[dict[str, Any]]:
        """The first and the last generated answers, as `AnswersEvent` has them; one where they are the same, and none
        where none were generated."""
        query = "SELECT data FROM job_events WHERE job_id = ? AND +kind = 'answers' ORDER BY number {} LIMIT 1"

        def work(c: sqlite3.Connection) -> list[dict[str, Any]]:
            get(c, job_id)
            rows = [c.execute(query.format(order), (job_id,)).fetchone() for order in ("ASC", "DESC")]
            found = [msgspec.json.decode(row["data"]) for row in rows if row is not None]
            return found[:1] if found and found[0] == found[-1] else found

        return await self._database.call(work)

    async def gate(self, job_id: str) -> dict[str, Any] | None:
        """The decision of the recipe's gate: condition, met, reason, metrics. None before it."""
        query = (
            "SELECT data FROM job_events WHERE job_id = ? AND +kind = 'message' "
            "AND json_extract(data, '$.gate') IS NOT NULL ORDER BY number DESC LIMIT 1"
        )
        row = await self._database.call(lambda c: c.execute(query, (job_id,)).fetchone())
        return None if row is None else msgspec.json.decode(row["data"])["gate"]

    async def checkpoints(self, job_id: str) -> list[JobCheckpoint]:
        """Oldest first."""
        query = "SELECT step, best, created_at FROM job_checkpoints WHERE job_id = ? ORDER BY step"
        return await self._database.call(
            lambda c: [
                JobCheckpoint(step=row["step"], best=bool(row["best"]), created_at=row["created_at"])
                for row in c.execute(query, (job_id,))
            ]
        )

    async def result(self, job_id: str) -> int | None:
        """The step whose weights the finished result has."""
        query = "SELECT step FROM job_results WHERE job_id = ?"
        row = await self._database.call(lambda c: c.execute(query, (job_id,)).fetchone())
        return None if row is None else row["step"]

    async def kept(self) -> dict[str, tuple[set[int], bool]]:
        """Job id → the steps of its checkpoints, and whether it has a result: all that may be on disk."""

        def work(c: sqlite3.Connection) -> dict[str, tuple[set[int], bool]]:
            results = {row["job_id"] for row in c.execute("SELECT job_id FROM job_results")}
            found = {row["id"]: (set[int](), row["id"] in results) for row in c.execute("SELECT id FROM jobs")}
            for row in c.execute("SELECT job_id, step FROM job_checkpoints"):
                found[row["job_id"]][0].add(row["step"])
            return found

        return await self._database.call(work)

    async def discards(self) -> list[str]:
        """Paths below the state directory that are to be deleted from the disk."""
        return await self._database.call(lambda c: [row["path"] for row in c.execute("SELECT path FROM job_discards")])

    async def record(self, job_id: str) -> JobRecord | None:
        """All that is stored of a job but its events and checkpoints; None where it is gone."""
        return await self._database.call(lambda c: record(c, job_id))

    async def ended(self) -> list[Job]:
        """The jobs that have come to their end, the oldest first."""
        states = ", ".join(f"'{state}'" for state in sorted(ENDED))
        query = f"SELECT * FROM jobs WHERE state IN ({states}) ORDER BY finished_at"
        return await self._database.call(lambda c: [to_job(row) for row in c.execute(query)])


# -- schema ----------------------------------------------------------------------------------------
#
# The tables of jobs, for `runtime.support.database.Database`.

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of the queue
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    name TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    recipe BLOB NOT NULL,
    summary TEXT NOT NULL DEFAULT '{}',
    total_steps INTEGER,
    wanted TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    error_param TEXT,
    adapter TEXT,
    digest TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    owner TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);

CREATE TABLE IF NOT EXISTS job_files (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    stored_as TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (job_id, name)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS job_events (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    created_at REAL NOT NULL,
    level TEXT NOT NULL,
    kind TEXT NOT NULL,
    step INTEGER,
    message TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job_id, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS job_events_by_step ON job_events (job_id, kind, step, number);

CREATE TABLE IF NOT EXISTS job_progress (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    trained_tokens INTEGER NOT NULL,  -- of all steps up to this one, each counted once
    PRIMARY KEY (job_id, step)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS job_progress_sums AFTER INSERT ON job_events WHEN NEW.kind = 'step' BEGIN
    INSERT OR REPLACE INTO job_progress (job_id, step, trained_tokens) VALUES (
        NEW.job_id, NEW.step, coalesce(json_extract(NEW.data, '$.trained_tokens'), 0) + coalesce((
            SELECT trained_tokens FROM job_progress WHERE job_id = NEW.job_id AND step < NEW.step
            ORDER BY step DESC LIMIT 1), 0));
END;

CREATE TABLE IF NOT EXISTS job_checkpoints (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    best INTEGER NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (job_id, step)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS job_results (
    job_id TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL  -- whose weights they are
);

CREATE TABLE IF NOT EXISTS job_discards (
    path TEXT PRIMARY KEY  -- below the state directory: on the disk, and to be deleted
) WITHOUT ROWID;
"""


# -- schemas ---------------------------------------------------------------------------------------
#
# Every part's tables; one database has them all.

SCHEMAS = (store.SCHEMA, SCHEMA)
