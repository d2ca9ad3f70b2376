"""Rows of jobs from their folders, in case the database is lost: `job.json`, the log, the checkpoints."""

from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

import msgspec
from msgspec import Struct

from runtime.support.durable import PARTIAL, reason
from runtime.trainer.jobs import rows
from runtime.trainer.jobs.directories import CHECKPOINT_RECORD, JobDirectories
from runtime.trainer.jobs.execution import ResultRecord
from runtime.trainer.jobs.records import Job, JobCheckpoint, JobEvent, JobRecord, Note

S = TypeVar("S", bound=Struct)


def adopt(connection: Connection, directories: JobDirectories) -> tuple[list[str], list[str]]:
    """Make rows for the jobs that have a folder and no row. Part of a transaction.

    Returns their ids, in the order of submission, and what could not be made a row of, with the reason. A job
    that had not ended continues when a server is started.
    """
    records, problems = [], []
    for folder in sorted(directories.root.glob("*")):
        if PARTIAL in folder.name or not folder.is_dir():
            continue
        if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (folder.name,)).fetchone() is not None:
            continue
        try:
            record = _read(directories.record(folder.name), JobRecord)
            if record.job.id != folder.name:
                raise ValueError(f"it is that of {record.job.id}")
        except ValueError as error:
            problems.append(f"jobs/{folder.name}: job.json: {error}")
        else:
            records.append(record)
    records.sort(key=lambda record: record.job.created_at)
    for record in records:
        _insert(connection, record)
        _add_events(connection, record.job.id, directories.log(record.job.id), problems)
        _add_checkpoints(connection, record.job.id, directories, problems)
        rows.append(
            connection, record.job.id, Note("Made again from the job's folder: the database was lost.", "warning")
        )
    return [record.job.id for record in records], problems


def _read(path: Path, type_: type[S]) -> S:
    """Decode a file. Raises `ValueError` with the reason."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except OSError as error:
        raise ValueError(reason(error)) from error
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def _insert(connection: Connection, record: JobRecord) -> None:
    job, key = record.job, record.idempotency_key
    taken = connection.execute("SELECT 1 FROM jobs WHERE idempotency_key = ?", (key,)).fetchone() is not None
    columns = _columns(job) | {"digest": record.digest, "idempotency_key": None if taken else key}
    places = ", ".join("?" * len(columns))
    connection.execute(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({places})", tuple(columns.values()))
    connection.executemany(
        "INSERT INTO job_files (job_id, name, stored_as, bytes) VALUES (?, ?, ?, ?)",
        [(job.id, file.name, file.stored_as, file.bytes) for file in record.files],
    )


def _columns(job: Job) -> dict[str, object]:
    error = job.error
    return {
        "id": job.id,
        "state": job.state,
        "name": job.name,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "recipe": job.recipe,
        "summary": msgspec.json.encode(job.summary).decode(),
        "total_steps": job.total_steps,
        "wanted": job.wanted,
        "attempts": 0,
        "error_code": error and error.code,
        "error_message": error and error.message,
        "error_param": error and error.param,
        "adapter": job.adapter,
        "owner": job.owner,
    }


def _add_events(connection: Connection, job_id: str, log: Path, problems: list[str]) -> None:
    """Add the events that the log has: it is written a little behind the store."""
    if not log.exists():
        return
    last = 0
    with open(log, "rb") as lines:
        for line in lines:
            try:
                event = msgspec.json.decode(line, type=JobEvent)
            except msgspec.MsgspecError:
                problems.append(f"jobs/{job_id}: log.jsonl is damaged after event {last}: what follows is left out")
                return
            if event.number > last:
                last = event.number
                rows.insert_event(connection, job_id, event)


def _add_checkpoints(connection: Connection, job_id: str, directories: JobDirectories, problems: list[str]) -> None:
    for folder in sorted(directories.checkpoint(job_id, 0).parent.glob("step-*")):
        if ".partial" in folder.name:
            continue
        try:
            found = _read(folder / CHECKPOINT_RECORD, JobCheckpoint)
            if folder.name != f"step-{found.step}":
                raise ValueError(f"it is that of step {found.step}")
        except ValueError as error:
            problems.append(f"jobs/{job_id}/checkpoints/{folder.name}: {CHECKPOINT_RECORD}: {error}")
            continue
        rows.add_checkpoint(connection, job_id, found)
    if directories.result(job_id).is_dir():
        try:
            result = _read(directories.result(job_id) / CHECKPOINT_RECORD, ResultRecord)
        except ValueError as error:
            problems.append(f"jobs/{job_id}/result: {CHECKPOINT_RECORD}: {error}")
        else:
            rows.add_result(connection, job_id, result.step)
