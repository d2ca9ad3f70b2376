"""Rows of batches from their folders, in case the database is lost. Existing rows have priority.

A batch that had not ended goes on when a server is started: its output files say what is answered.
"""

import sqlite3
from pathlib import Path

import msgspec

from runtime.batches.output import ERRORS, OUTPUT
from runtime.batches.records import FOLDER, RECORD, BatchRecord
from runtime.batches.store import insert
from runtime.files import store as files
from runtime.files.recovery import insert_missing
from runtime.support.durable import PARTIAL, reason


def folders(directory: Path) -> list[Path]:
    """The folders of batches in a state directory."""
    return [path.parent for path in sorted((directory / FOLDER).glob(f"*/{RECORD}")) if PARTIAL not in path.parent.name]


def adopt(connection: sqlite3.Connection, directory: Path) -> tuple[list[str], list[str]]:
    """Make rows for the batches that have a folder and no row, and for the files that they wrote. Part of a
    transaction, after the rows of other files.

    Returns their ids, the oldest first, and what could not be adopted, each with the reason.
    """
    found, problems = [], list[str]()
    for folder in folders(directory):
        if connection.execute("SELECT 1 FROM batches WHERE id = ?", (folder.name,)).fetchone() is not None:
            continue
        try:
            found.append(_read(folder, connection))
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            problems.append(f"{FOLDER}/{folder.name}: {RECORD}: {why}")
    found.sort(key=lambda record: record.batch.created_at)
    for record in found:
        insert(connection, record.batch)
        if not record.batch.ended:
            files.hold(connection, record.batch.input_file_id, record.batch.id)
        present = [file for file in record.outputs if (directory / file.path).exists()]  # others were deleted
        insert_missing(connection, directory, present, problems)
    return [record.batch.id for record in found], problems


def _read(folder: Path, connection: sqlite3.Connection) -> BatchRecord:
    """The record in a batch's folder. Raises `OSError`, and `ValueError` where there can be no row of it."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=BatchRecord)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    batch = record.batch
    written = {f"{FOLDER}/{folder.name}/{name}" for name in (OUTPUT, ERRORS)}
    if batch.id != folder.name or not {file.path for file in record.outputs} <= written:
        raise ValueError(f"it is that of {batch.id}")
    query = "SELECT 1 FROM files WHERE id = ?"
    if not batch.ended and connection.execute(query, (batch.input_file_id,)).fetchone() is None:
        raise ValueError(f"the batch had not ended, and its input file {batch.input_file_id} is not there")
    return record
