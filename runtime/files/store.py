"""Stored files: what one is, and their rows.

Each method of the store is one transaction; the functions are parts of the transactions of others.
A file is written and synced before its row is added, and its row is deleted before it is. `file_uses` names the files
that something still reads, which must stay; `file_discards` the paths that are to be deleted from the disk.
"""

import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Literal, get_args

import msgspec
from msgspec import Struct

from runtime.errors import Conflict, NotFound
from runtime.support.database import Database, select_page

UploadPurpose = Literal["fine-tune", "batch", "user_data", "evals", "assistants", "vision"]
"""Purposes of uploads, as OpenAI lists them. Fine-tuning jobs and batches read only files of their own purpose; files
of the others are stored and given back."""

UPLOAD_PURPOSES: tuple[UploadPurpose, ...] = get_args(UploadPurpose)

BATCH_OUTPUT = "batch_output"
"""Purpose of the files that a batch writes."""

PURPOSES: tuple[str, ...] = (*UPLOAD_PURPOSES, BATCH_OUTPUT)
"""Purposes that a stored file may have."""

FOLDER = "files"
"""Folder in the state directory; each file has a folder of its own there, named for its id."""
CONTENT, RECORD = "content", "file.json"
"""In a file's folder: its bytes, and a copy of its row, in case the row is lost."""

MAX_FILENAME = 255
"""Characters of a file's name."""

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 86400
"""Bounds of `expires_after.seconds`, OpenAI's."""


class StoredFile(Struct, frozen=True, kw_only=True):
    """One file. Times are seconds since the epoch."""

    id: str
    owner: str
    """Tenant label of the key that it belongs to; "" where no key is required."""
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    path: str
    """Path below the state directory. No client sees it."""

    def expired(self, now: float) -> bool:
        """True once it is to be deleted: from then on it is not found any more."""
        return self.expires_at is not None and self.expires_at <= now


def encode_record(file: StoredFile) -> bytes:
    """A file's row, as it lies beside the file."""
    return msgspec.json.format(msgspec.json.encode(file))


# -- rows ------------------------------------------------------------------------------------------


SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of lists
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    path TEXT NOT NULL UNIQUE  -- below the state directory
);

CREATE TABLE IF NOT EXISTS file_uses (
    file_id TEXT NOT NULL REFERENCES files (id),
    user TEXT NOT NULL,  -- id of the batch that reads it
    PRIMARY KEY (file_id, user)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS file_discards (
    path TEXT PRIMARY KEY
) WITHOUT ROWID;
"""

MAX_SHOWN_ID = 100
"""Characters of an unknown id that an error repeats."""


def find(connection: sqlite3.Connection, file_id: str, owner: str | None, *, param: str = "file_id") -> StoredFile:
    """The file. `owner`: tenant that asks; None may see every file. Raises `NotFound`, which names `param`."""
    row = connection.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
    found = None if row is None else to_file(row)
    if found is None or found.expired(time.time()) or owner not in (None, found.owner):
        raise NotFound(f"There is no file `{file_id[:MAX_SHOWN_ID]}`.", param=param, code="file_not_found")
    return found


def insert(connection: sqlite3.Connection, file: StoredFile) -> None:
    """Insert a file's row."""
    names = ", ".join(StoredFile.__struct_fields__)
    marks = ", ".join("?" * len(StoredFile.__struct_fields__))
    values = tuple(getattr(file, name) for name in StoredFile.__struct_fields__)
    connection.execute(f"INSERT INTO files ({names}) VALUES ({marks})", values)


def hold(connection: sqlite3.Connection, file_id: str, user: str) -> None:
    """Keep a file from being deleted until `user` releases it."""
    connection.execute("INSERT OR IGNORE INTO file_uses (file_id, user) VALUES (?, ?)", (file_id, user))


def release(connection: sqlite3.Connection, user: str) -> None:
    """Release the files that `user` holds."""
    connection.execute("DELETE FROM file_uses WHERE user = ?", (user,))


def to_file(row: sqlite3.Row) -> StoredFile:
    """The file of a row."""
    return StoredFile(**{name: row[name] for name in StoredFile.__struct_fields__})


class FileStore:
    """Rows of files, in the state directory's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, file_id: str, owner: str | None, *, param: str = "file_id") -> StoredFile:
        """As `find`."""
        return await self._database.call(lambda c: find(c, file_id, owner, param=param))

    async def add(self, file: StoredFile) -> None:
        """Store the row of a file that is on the disk."""
        await self._database.call(lambda c: insert(c, file))

    async def page(
        self, owner: str | None, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Files behind the file `after`, and whether there are more. Raises `NotFound`."""

        def work(c: sqlite3.Connection) -> tuple[list[StoredFile], bool]:
            if after is not None:
                find(c, after, owner, param="after")
            where: dict[str, Sequence[object]] = {"(expires_at IS NULL OR expires_at > ?)": (time.time(),)}
            if purpose is not None:
                where["purpose = ?"] = (purpose,)
            rows, more = select_page(
                c, "files", where, owner=owner, after=after, limit=limit, newest_first=newest_first
            )
            return [to_file(row) for row in rows], more

        return await self._database.call(work)

    async def delete(self, file_id: str, owner: str | None) -> StoredFile:
        """Delete the row of a file, and note its path to be deleted. Raises `NotFound`, and `Conflict` while it is
        used."""

        def work(c: sqlite3.Connection) -> StoredFile:
            file = find(c, file_id, owner)
            used = c.execute("SELECT user FROM file_uses WHERE file_id = ?", (file_id,)).fetchone()
            if used is not None:
                raise Conflict(
                    f"The file is used by `{used['user']}`: wait for its end, or cancel it, and delete the file then.",
                    param="file_id",
                    code="file_in_use",
                )
            drop(c, file)
            return file

        return await self._database.call(work)

    async def due(self, keep_seconds: float | None) -> list[StoredFile]:
        """The files that are not used and have expired, or were made over `keep_seconds` ago."""
        return await self._database.call(lambda c: _due(c, keep_seconds))

    async def expire(self, keep_seconds: float | None) -> list[StoredFile]:
        """Delete the rows of the files that are due, as `delete` does."""

        def work(c: sqlite3.Connection) -> list[StoredFile]:
            found = _due(c, keep_seconds)
            for file in found:
                drop(c, file)
            return found

        return await self._database.call(work)

    async def paths(self) -> set[str]:
        """Paths of all files."""
        return await self._database.call(lambda c: {row["path"] for row in c.execute("SELECT path FROM files")})

    async def total_bytes(self) -> int:
        query = "SELECT coalesce(sum(bytes), 0) FROM files"
        return await self._database.call(lambda c: int(c.execute(query).fetchone()[0]))

    async def discards(self) -> list[str]:
        """Paths that are to be deleted from the disk."""
        query = "SELECT path FROM file_discards"
        return await self._database.call(lambda c: [row["path"] for row in c.execute(query)])

    async def forget_discards(self, paths: Iterable[str]) -> None:
        """Drop the notes of paths that are gone from the disk."""
        values = [(path,) for path in paths]
        await self._database.call(lambda c: c.executemany("DELETE FROM file_discards WHERE path = ?", values))


def drop(connection: sqlite3.Connection, file: StoredFile) -> None:
    """Delete the row of a file, and note what is to be deleted from the disk: the file, or its folder."""
    connection.execute("DELETE FROM files WHERE id = ?", (file.id,))
    path = PurePath(file.path)
    discard(connection, str(path.parent) if path.parts[0] == FOLDER and len(path.parts) > 2 else file.path)


def discard(connection: sqlite3.Connection, path: str) -> None:
    """Note a path below the state directory that is to be deleted."""
    connection.execute("INSERT OR IGNORE INTO file_discards (path) VALUES (?)", (path,))


def _due(connection: sqlite3.Connection, keep_seconds: float | None) -> list[StoredFile]:
    now = time.time()
    query = (
        "SELECT * FROM files WHERE (expires_at <= ? OR created_at < ?) AND id NOT IN (SELECT file_id FROM file_uses) "
        "ORDER BY number"
    )
    oldest = -1.0 if keep_seconds is None else now - keep_seconds
    return [to_file(row) for row in connection.execute(query, (now, oldest))]
