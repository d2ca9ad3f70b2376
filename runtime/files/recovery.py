"""Rows of files from their folders, in case the database is lost. Existing rows have priority."""

import sqlite3
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from runtime.files.store import CONTENT, FOLDER, RECORD, StoredFile, insert
from runtime.support.durable import PARTIAL, reason


def folders(directory: Path) -> list[Path]:
    """The folders of whole files in a state directory."""
    return [path.parent for path in sorted((directory / FOLDER).glob(f"*/{RECORD}")) if PARTIAL not in path.parent.name]


def adopt(connection: sqlite3.Connection, directory: Path) -> tuple[list[str], list[str]]:
    """Make rows for the files that have a folder and no row. Part of a transaction.

    Returns their ids, the oldest first, and the folders that could not be adopted, each with the reason.
    """
    found, problems = [], []
    # Times of creation are whole seconds: those of the records tell files of one second apart.
    for folder in sorted(folders(directory), key=lambda folder: (folder / RECORD).stat().st_mtime_ns):
        try:
            file = _read(folder)
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            problems.append(f"{FOLDER}/{folder.name}: {RECORD}: {why}")
        else:
            found.append(file)
    found.sort(key=lambda file: file.created_at)
    return insert_missing(connection, directory, found, problems), problems


def insert_missing(
    connection: sqlite3.Connection, directory: Path, files: Iterable[StoredFile], problems: list[str]
) -> list[str]:
    """Make rows for the files that have none, and are as long on the disk as they were. Returns their ids."""
    made = []
    for file in files:
        query = "SELECT 1 FROM files WHERE id = ? OR path = ?"
        if connection.execute(query, (file.id, file.path)).fetchone() is not None:
            continue
        try:
            found = (directory / file.path).lstat()
        except OSError as error:
            problems.append(f"{file.path}: {reason(error)}")
            continue
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.bytes:
            problems.append(f"{file.path}: it is not the file of {file.bytes} bytes that it was")
            continue
        insert(connection, file)
        made.append(file.id)
    return made


def _read(folder: Path) -> StoredFile:
    """The record in a file's folder. Raises `OSError`, and `ValueError` where it does not fit the folder."""
    try:
        file = msgspec.json.decode((folder / RECORD).read_bytes(), type=StoredFile)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    if file.id != folder.name or file.path != f"{FOLDER}/{folder.name}/{CONTENT}":
        raise ValueError(f"it is that of {file.id}")
    return file
