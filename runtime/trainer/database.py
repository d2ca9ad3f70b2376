"""The one SQLite file under the state directory: WAL, and one thread that does everything with it.

Jobs and adapters keep their rows here; each brings the tables it needs. A transaction is a function of the
connection: it is committed when the function returns, and rolled back when it raises.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from runtime.errors import StorageUnavailable

T = TypeVar("T")


class StateDirectoryInUse(RuntimeError):
    """Another process has this state directory."""


class Database:
    """One connection on one thread. `run` and `call` may be used from any thread."""

    def __init__(self, directory: Path, schemas: Iterable[str], *, file: str = "eft.sqlite3") -> None:
        """Opens (and creates) `directory`/`file`; `schemas` are scripts of CREATE … IF NOT EXISTS.

        Raises `StateDirectoryInUse` when another process has the directory.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / "lock", "a")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StateDirectoryInUse(
                f"{directory} is in use by another Eft process: stop that one, or set trainer.state_dir."
            ) from None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._connection = self._thread.submit(_open, directory / file, tuple(schemas)).result()

    def run(self, work: Callable[[sqlite3.Connection], T]) -> "Future[T]":
        """Do `work` as one transaction, in order with all others. The future raises `StorageUnavailable`
        when the disk is full or broken, else what `work` raised."""
        return self._thread.submit(self._transaction, work)

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The same, awaited."""
        return await asyncio.wrap_future(self.run(work))

    def close(self) -> None:
        """Finish what is queued, and let the directory go. Any number of times."""
        if self._lock.closed:
            return
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        self._lock.close()

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                return work(self._connection)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise StorageUnavailable(f"The server cannot store this now: {error}.") from error


def _open(path: Path, schemas: tuple[str, ...]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    for schema in schemas:
        connection.executescript(schema)
    return connection
