"""Rows of batches. Each method is one transaction, and moves a batch along `TRANSITIONS` only."""

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.batches.records import ENDED, FOLDER, STAMPED, TRANSITIONS, Batch, BatchUsage, LineError, State
from runtime.errors import Conflict, InvalidRequest, NotFound, TooManyRequests
from runtime.files import store as files
from runtime.files.store import StoredFile
from runtime.support.database import Database, select_page

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of lists, and in which they begin
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,
    output_lifetime INTEGER,
    model TEXT,
    errors TEXT NOT NULL DEFAULT '[]',
    output_file_id TEXT,
    error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    usage TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, number);
"""

MAX_SHOWN_ID = 100
"""Characters of an unknown id that an error repeats."""

_JSON = ("metadata", "errors", "usage")
_errors_decoder = msgspec.json.Decoder(list[LineError])
_usage_decoder = msgspec.json.Decoder(BatchUsage)
_ENDED = ", ".join(f"'{state}'" for state in sorted(ENDED))
_ENDED_AT = f"coalesce({', '.join(STAMPED[state] for state in sorted(ENDED))}, created_at)"
_OUTPUTS = (
    "SELECT files.* FROM files JOIN batches ON files.id IN (batches.output_file_id, batches.error_file_id) "
    "WHERE batches.id = ?"
)


def find(connection: sqlite3.Connection, batch_id: str, owner: str | None, *, param: str = "batch_id") -> Batch:
    """The batch. `owner`: tenant that asks; None may see every batch. Raises `NotFound`, which names `param`."""
    row = connection.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
    if row is None or owner not in (None, row["owner"]):
        raise NotFound(f"There is no batch `{batch_id[:MAX_SHOWN_ID]}`.", param=param, code="batch_not_found")
    return _to_batch(row)


def insert(connection: sqlite3.Connection, batch: Batch) -> None:
    """Add the row of a batch, within the caller's transaction."""
    names = Batch.__struct_fields__
    values = tuple(_to_column(name, getattr(batch, name)) for name in names)
    connection.execute(f"INSERT INTO batches ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", values)


class BatchStore:
    """Rows of batches, in the state directory's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, batch: Batch, *, max_unfinished: int) -> None:
        """Store a batch as validating, and hold its input file.

        Raises `NotFound` for no such file, `InvalidRequest` for one of another purpose, `TooManyRequests`."""

        def work(c: sqlite3.Connection) -> None:
            file = files.find(c, batch.input_file_id, batch.owner, param="input_file_id")
            if file.purpose != "batch":
                raise InvalidRequest(
                    f"input_file_id must name a file with the purpose batch; the purpose of `{file.id}` is "
                    f"{file.purpose}.",
                    param="input_file_id",
                )
            query = f"SELECT count(*) FROM batches WHERE status NOT IN ({_ENDED})"
            if c.execute(query).fetchone()[0] >= max_unfinished:
                raise TooManyRequests(f"{max_unfinished} batches have not ended yet. Try again later.", retry_after=60)
            insert(c, batch)
            files.hold(c, file.id, batch.id)

        await self._database.call(work)

    async def get(self, batch_id: str, owner: str | None) -> Batch:
        """As `find`."""
        return await self._database.call(lambda c: find(c, batch_id, owner))

    async def page(
        self, owner: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Batch], bool]:
        """Batches from behind the batch `after`, and whether there are more. Raises `NotFound`."""

        def work(c: sqlite3.Connection) -> tuple[list[Batch], bool]:
            if after is not None:
                find(c, after, owner, param="after")
            rows, more = select_page(c, "batches", {}, owner=owner, after=after, limit=limit, newest_first=newest_first)
            return [_to_batch(row) for row in rows], more

        return await self._database.call(work)

    async def unfinished(self) -> list[Batch]:
        """The batches that have not ended, the oldest first."""
        query = f"SELECT * FROM batches WHERE status NOT IN ({_ENDED}) ORDER BY number"
        return await self._database.call(lambda c: [_to_batch(row) for row in c.execute(query)])

    async def ids(self) -> set[str]:
        return await self._database.call(lambda c: {row["id"] for row in c.execute("SELECT id FROM batches")})

    async def input_file(self, batch: Batch) -> StoredFile:
        """Row of the input file, which is held as long as the batch has not ended."""

        def work(c: sqlite3.Connection) -> StoredFile:
            row = c.execute("SELECT * FROM files WHERE id = ?", (batch.input_file_id,)).fetchone()
            assert row is not None, "a held file was deleted"
            return files.to_file(row)

        return await self._database.call(work)

    async def move(self, batch_id: str, to: State, **columns: Any) -> Batch:
        """Change a batch's state. Raises `Conflict` where `to` cannot follow."""
        return await self._database.call(lambda c: _move(c, batch_id, to, columns))

    async def cancel(self, batch_id: str, owner: str | None) -> Batch:
        """Mark a batch to be cancelled; one that is marked already stays so. Raises `NotFound`, `Conflict`."""

        def work(c: sqlite3.Connection) -> Batch:
            batch = find(c, batch_id, owner)
            return batch if batch.status == "cancelling" else _move(c, batch_id, "cancelling", {})

        return await self._database.call(work)

    async def end(self, batch_id: str, to: State, outputs: Sequence[StoredFile], **columns: Any) -> Batch:
        """Move a batch to its end, together with the rows of the files that it wrote."""

        def work(c: sqlite3.Connection) -> Batch:
            for file in outputs:
                files.insert(c, file)
            files.release(c, batch_id)
            return _move(c, batch_id, to, columns)

        return await self._database.call(work)

    async def due(self, keep_seconds: float) -> list[str]:
        """Ids of the batches that ended over `keep_seconds` ago, and none of whose output files is used."""
        return await self._database.call(lambda c: _due(c, keep_seconds))

    async def prune(self, keep_seconds: float) -> tuple[list[str], list[StoredFile]]:
        """Delete the rows of the batches that are due, and of the files that they wrote; their folders are noted to be
        deleted. Returns the ids, and the files."""

        def work(c: sqlite3.Connection) -> tuple[list[str], list[StoredFile]]:
            gone = list[StoredFile]()
            due = _due(c, keep_seconds)
            for batch_id in due:
                for row in c.execute(_OUTPUTS, (batch_id,)).fetchall():
                    file = files.to_file(row)
                    files.drop(c, file)
                    gone.append(file)
                c.execute("DELETE FROM batches WHERE id = ?", (batch_id,))
                files.discard(c, f"{FOLDER}/{batch_id}")
            return due, gone

        return await self._database.call(work)


def _due(connection: sqlite3.Connection, keep_seconds: float) -> list[str]:
    query = (
        f"SELECT id FROM batches WHERE status IN ({_ENDED}) AND {_ENDED_AT} < ? AND NOT EXISTS ("
        "SELECT 1 FROM file_uses WHERE file_id IN (output_file_id, error_file_id)) ORDER BY number"
    )
    return [row["id"] for row in connection.execute(query, (time.time() - keep_seconds,))]


def _move(connection: sqlite3.Connection, batch_id: str, to: State, columns: dict[str, Any]) -> Batch:
    batch = find(connection, batch_id, None)
    if to not in TRANSITIONS[batch.status]:
        raise Conflict(f"The batch is {batch.status}: it cannot become {to}.", param="batch_id", code="batch_state")
    changed = {"status": to, STAMPED[to]: int(time.time()), **columns}
    assert changed.keys() <= set(Batch.__struct_fields__)
    assignments = ", ".join(f"{name} = ?" for name in changed)
    values = [_to_column(name, value) for name, value in changed.items()]
    connection.execute(f"UPDATE batches SET {assignments} WHERE id = ?", (*values, batch_id))
    return find(connection, batch_id, None)


def _to_column(name: str, value: object) -> object:
    return msgspec.json.encode(value).decode() if name in _JSON and value is not None else value


def _to_batch(row: sqlite3.Row) -> Batch:
    columns = {name: row[name] for name in Batch.__struct_fields__}
    columns["metadata"] = row["metadata"] and msgspec.json.decode(row["metadata"])
    columns["usage"] = row["usage"] and _usage_decoder.decode(row["usage"])
    columns["errors"] = _errors_decoder.decode(row["errors"])
    return Batch(**columns)
