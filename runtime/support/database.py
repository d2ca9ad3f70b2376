"""The one SQLite file under the state directory: WAL, and one thread for all access.

Jobs and adapters keep their rows here; each adds its own tables. A transaction is a function of the connection: it is
committed when the function returns, and rolled back when it raises.
"""

import asyncio
import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from runtime.errors import PayloadTooLarge, StorageUnavailable
from runtime.support.durable import PRIVATE_FILE, make_directory, sync_directory, tighten

# -- migrations ------------------------------------------------------------------------------------
#
# Upgrades of the tables of older versions to this one. `PRAGMA user_version` is a file's version.
#
# The parts' schemas make missing tables (CREATE … IF NOT EXISTS); migrations change existing rows.


def _sum_up_steps(connection: sqlite3.Connection) -> None:
    """Fill in the trained tokens up to each step of a job, which version 1 stores; before, they were summed at each
    query."""
    connection.execute(
        "INSERT OR REPLACE INTO job_progress (job_id, step, trained_tokens) "
        "SELECT job_id, step, sum(tokens) OVER (PARTITION BY job_id ORDER BY step) FROM ("
        "SELECT job_id, step, json_extract(data, '$.trained_tokens') AS tokens, max(number) "
        "FROM job_events WHERE kind = 'step' GROUP BY job_id, step)"
    )


def _add_column(table: str, column: str, kind: str) -> Callable[[sqlite3.Connection], None]:
    """A migration that adds a column. New tables have it already."""

    def add(connection: sqlite3.Connection) -> None:
        if column not in {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")}:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")

    return add


def _index_chats(connection: sqlite3.Connection) -> None:
    """Index the chats among the responses by what lists of them are filtered by, in new tables too: their columns are
    in a table of an older version only now."""
    connection.execute(
        "CREATE INDEX IF NOT EXISTS chats_by_owner ON responses (tenant, created_at, model, metadata) "
        "WHERE metadata IS NOT NULL"
    )


def _fill_usage(table: str, owner: str, columns: Sequence[str]) -> Callable[[sqlite3.Connection], None]:
    """A migration that counts the rows that were there before `usage_schema` counted them."""

    def fill(connection: sqlite3.Connection) -> None:
        size = " + ".join(f"length({column})" for column in columns)
        connection.execute(
            f"INSERT OR REPLACE INTO {table}_usage SELECT {owner}, count(*), sum({size}) FROM {table} GROUP BY {owner}"
        )

    return fill


MIGRATIONS: tuple[tuple[str, Callable[[sqlite3.Connection], None]], ...] = (
    ("job_progress", _sum_up_steps),
    ("jobs", _add_column("jobs", "owner", "TEXT NOT NULL DEFAULT ''")),
    ("batches", _add_column("batches", "usage", "TEXT")),
    ("responses", _fill_usage("responses", "tenant", ("input", "response"))),
    ("feedback", _fill_usage("feedback", "owner", ("data",))),
    ("responses", _add_column("responses", "model", "TEXT")),
    ("responses", _add_column("responses", "metadata", "TEXT")),
    ("responses", _index_chats),
)
"""Migration from each version to the next, with the table that it changes."""

VERSION = len(MIGRATIONS)
"""Version of the tables in this version of Eft."""


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Migrate tables from `version`, 0 for new ones too, to `VERSION`: all of it, or nothing."""
    if version == VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for table, change in MIGRATIONS[version:]:
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None:
                change(connection)
        connection.execute(f"PRAGMA user_version = {VERSION}")


T = TypeVar("T")

FILE = "eft.sqlite3"
LEAST_ROOM = 64 * 1024
"""Least free space in bytes: the index of the WAL alone takes half of it."""
LOCK = "lock"


class StateDirectoryInUse(RuntimeError):
    """Another process has this state directory."""


class DatabaseUnusable(RuntimeError):
    """The file exists, and this version of Eft must not change it. The message names the remedy."""


class DatabaseCorrupt(DatabaseUnusable):
    """SQLite finds the file damaged."""


class DatabaseTooNew(DatabaseUnusable):
    """A newer version of Eft made the file."""


_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}
_CAUSES = {sqlite3.SQLITE_FULL: "disk_full", sqlite3.SQLITE_READONLY: "storage_read_only"}


class Database:
    """One connection on one thread. `run` and `call` may be used from any thread."""

    frozen: str | None = None
    """Reason why nothing can be stored, set from the start, else None; never a path."""
    _lock: int | None = None

    def __init__(self, directory: Path, schemas: Iterable[str], *, file: str = FILE) -> None:
        """Opens (and creates) `directory`/`file`; `schemas` are scripts of CREATE … IF NOT EXISTS.

        Raises `StateDirectoryInUse` when another process has the directory, `OSError` where it cannot be written,
        `DatabaseCorrupt`, `DatabaseTooNew`.
        """
        make_directory(directory)
        descriptor = lock(directory)
        try:
            self._start(lambda: _open(directory / file, tuple(schemas)))
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    @classmethod
    def in_memory(cls, load: Callable[[sqlite3.Connection], None], reason: str) -> "Database":
        """A database filled by `load` and read-only afterwards, for this `reason`."""
        database = cls.__new__(cls)
        database.frozen = reason

        def fill() -> sqlite3.Connection:
            connection = connect(":memory:")
            load(connection)
            connection.execute("PRAGMA query_only = ON")
            return connection

        database._start(fill)
        return database

    def _start(self, opened: Callable[[], sqlite3.Connection]) -> None:
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        try:
            self._connection = self._thread.submit(opened).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def run(self, work: Callable[[sqlite3.Connection], T]) -> "Future[T]":
        """Run `work` as one transaction, in order with all others. The future raises `StorageUnavailable` when the disk
        is full or broken, else the error of `work`. A cursor that `work` returns is closed."""
        return self._thread.submit(self._transaction, work)

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As `run`, awaited."""
        return await asyncio.wrap_future(self.run(work))

    def compact(self) -> None:
        """Release the disk space of deleted rows. Takes as long as copying the file, and as much space."""
        self._thread.submit(self._connection.execute, "VACUUM").result()

    def close(self) -> None:
        """Finish queued transactions, and release the directory. May be called any number of times."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        if self._lock is not None:
            os.close(self._lock)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE" if self.frozen is None else "BEGIN")
                result = work(self._connection)
                # An open cursor shares its statement with later ones of the same text (sqlite3 caches statements), and
                # resets it when it is freed: on another thread, that is in the middle of a later transaction.
                if isinstance(result, sqlite3.Cursor):
                    result.close()
                return result
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            text = self.frozen or f"The server cannot store this now: {error}."
            raise StorageUnavailable(text, cause=_CAUSES.get(_primary(error), "")) from error


def lock(directory: Path) -> int:
    """A descriptor that holds the directory until it is closed. Raises `StateDirectoryInUse`, `OSError`."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise StateDirectoryInUse(
            f"{directory} is in use by another Eft process: stop that one, or set trainer.state_dir."
        ) from None
    return descriptor


def check(connection: sqlite3.Connection, name: str) -> int:
    """The version of the tables. Raises `DatabaseCorrupt`, `DatabaseTooNew`, `sqlite3.Error`."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)").fetchall()]
    if found != ["ok"]:
        raise _corrupt(name, " ".join("; ".join(found).split()))
    if version > VERSION:
        raise DatabaseTooNew(
            f"The database {name} was made by a newer version of Eft (its tables have version {version}; this one "
            f"knows up to {VERSION}). Use that version, or put back a backup from before the update."
        )
    return version


def _open(path: Path, schemas: tuple[str, ...]) -> sqlite3.Connection:
    try:
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
            sync_directory(path.parent)
        for file in path.parent.glob(f"{path.name}*"):
            tighten(file)
        connection = connect(path)
        try:
            _prepare(connection, path, schemas)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        if _primary(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _corrupt(path.name, str(error)) from error
        raise OSError(_errno(error, path.parent), f"the database cannot be opened: {error}") from error
    return connection


def _corrupt(name: str, found: str) -> DatabaseCorrupt:
    return DatabaseCorrupt(
        f"The database {name} is damaged ({found[:300]}). Put back a backup of it, or run `eft state rebuild`, which "
        "moves it aside and makes a new one from the folders beside it; then start the server again."
    )


def _errno(error: sqlite3.Error, directory: Path) -> int:
    """Error code of a SQLite error. SQLite reports a full disk as an I/O error if the failed write was no page of the
    database."""
    primary = _primary(error)
    if primary == sqlite3.SQLITE_IOERR:
        room = os.statvfs(directory)
        if room.f_bavail * room.f_frsize < LEAST_ROOM:
            return errno.ENOSPC
    return _ERRNO.get(primary, errno.EIO)


def _prepare(connection: sqlite3.Connection, path: Path, schemas: tuple[str, ...]) -> None:
    version = check(connection, path.name)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    for schema in schemas:
        connection.executescript(schema)
    migrate(connection, version)


def connect(path: Path | str) -> sqlite3.Connection:
    """A connection without Python's own transactions. Nothing is read yet."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def select_page(
    connection: sqlite3.Connection,
    table: str,
    where: Mapping[str, Sequence[object]],
    *,
    owner: str | None,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> tuple[list[sqlite3.Row], bool]:
    """At most `limit` rows of a table with the columns `number`, `id` and `owner`, and whether there are more.

    `where`: condition → its values. `owner`: whose rows; None: everyone's. `after`: id of the row, which is there,
    behind which the page begins.
    """
    conditions = dict(where)
    if owner is not None:
        conditions["owner = ?"] = (owner,)
    if after is not None:
        sign = "<" if newest_first else ">"
        conditions[f"number {sign} (SELECT number FROM {table} WHERE id = ?)"] = (after,)
    order = "DESC" if newest_first else "ASC"
    query = f"SELECT * FROM {table} WHERE {' AND '.join(conditions) or '1'} ORDER BY number {order} LIMIT ?"
    values = [value for some in conditions.values() for value in some]
    found = connection.execute(query, (*values, limit + 1)).fetchall()
    return found[:limit], len(found) > limit


def usage_schema(table: str, owner: str, columns: Sequence[str]) -> str:
    """Schema of what `RowRetention` needs beside a table with a column `created_at`: how many rows each owner has, and
    the bytes of their `columns`, counted as rows come and go. `owner`: name of the owner's column."""
    new, old = (" + ".join(f"length({row}.{column})" for column in columns) for row in ("new", "old"))
    return f"""
CREATE INDEX IF NOT EXISTS {table}_by_owner ON {table} ({owner}, created_at);
CREATE TABLE IF NOT EXISTS {table}_usage (
    owner TEXT PRIMARY KEY,
    rows INTEGER NOT NULL,
    bytes INTEGER NOT NULL
);
CREATE TRIGGER IF NOT EXISTS {table}_added AFTER INSERT ON {table} BEGIN
    INSERT INTO {table}_usage VALUES (new.{owner}, 1, {new})
        ON CONFLICT (owner) DO UPDATE SET rows = rows + 1, bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER IF NOT EXISTS {table}_changed AFTER UPDATE ON {table} BEGIN
    UPDATE {table}_usage SET bytes = bytes + ({new}) - ({old}) WHERE owner = new.{owner};
END;
CREATE TRIGGER IF NOT EXISTS {table}_deleted AFTER DELETE ON {table} BEGIN
    UPDATE {table}_usage SET rows = rows - 1, bytes = bytes - ({old}) WHERE owner = old.{owner};
    DELETE FROM {table}_usage WHERE owner = old.{owner} AND rows = 0;
END;
"""


class RowRetention:
    """Retention of the rows of a table that has a `usage_schema`: by age, by the number of an owner's rows, and by the
    bytes of all. Rows of one owner are never deleted for the number of another's; for the bytes, the oldest rows go of
    the owner that has the most."""

    def __init__(
        self,
        table: str,
        owner: str,
        *,
        keep_seconds: float | None,
        max_rows: int,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`owner`: name of the owner's column; None as `keep_seconds`: rows do not age; `max_rows`: of an owner."""
        self._table = table
        self._delete_oldest = (
            f"DELETE FROM {table} WHERE rowid IN "
            f"(SELECT rowid FROM {table} WHERE {owner} = ? ORDER BY created_at, rowid LIMIT ?)"
        )
        self._keep_seconds = keep_seconds
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._clock = clock

    def check(self, size: int) -> None:
        """Raise `PayloadTooLarge` for a row of `size` bytes that `delete` would delete even if it were the only one."""
        if size > self._max_bytes:
            raise PayloadTooLarge(
                f"This cannot be stored: it has {size} bytes, and all {self._table} together may have "
                f"{self._max_bytes} (the setting {self._table}.max_{self._table}_total)."
            )

    def count(self, connection: sqlite3.Connection) -> int:
        """Number of rows that `delete` would delete."""
        connection.execute("SAVEPOINT due")
        try:
            return self.delete(connection)
        finally:
            connection.execute("ROLLBACK TO due")
            connection.execute("RELEASE due")

    def delete(self, connection: sqlite3.Connection) -> int:
        """Delete the rows that are due; returns their number."""
        gone = 0
        if self._keep_seconds is not None:
            query = f"DELETE FROM {self._table} WHERE created_at < ?"
            gone = connection.execute(query, (self._clock() - self._keep_seconds,)).rowcount
        query = f"SELECT owner, rows - ? FROM {self._table}_usage WHERE rows > ?"
        for owner, surplus in connection.execute(query, (self._max_rows, self._max_rows)).fetchall():
            gone += connection.execute(self._delete_oldest, (owner, surplus)).rowcount
        query = f"SELECT owner, max(bytes), sum(bytes) FROM {self._table}_usage"
        while True:
            owner, _, total = connection.execute(query).fetchone()  # SQLite's `owner` is that of the max
            if total is None or total <= self._max_bytes:
                return gone
            gone += connection.execute(self._delete_oldest, (owner, 1)).rowcount


def _primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
