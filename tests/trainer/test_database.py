"""The state directory's database: transactions, full disks, and one process at a time."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import StorageUnavailable
from runtime.trainer.database import Database, StateDirectoryInUse

SCHEMA = "CREATE TABLE IF NOT EXISTS t (x INTEGER PRIMARY KEY, y TEXT)"


def rows(database: Database) -> list[int]:
    return database.run(lambda c: [row["x"] for row in c.execute("SELECT x FROM t ORDER BY x")]).result()


def test_what_is_committed_is_there_after_reopening(tmp_path: Path) -> None:
    database = Database(tmp_path, [SCHEMA])
    database.run(lambda c: c.execute("INSERT INTO t VALUES (1, 'a')")).result()
    database.close()
    database.close()
    database = Database(tmp_path, [SCHEMA])
    assert rows(database) == [1]
    database.close()


def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path, [SCHEMA])

    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1, 'a')")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        database.run(work).result()
    assert rows(database) == []
    database.close()


def test_a_full_database_is_a_503_and_goes_on(tmp_path: Path) -> None:
    database = Database(tmp_path, [SCHEMA])
    pages = database.run(lambda c: c.execute("PRAGMA page_count").fetchone()[0]).result()
    database.run(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall()).result()
    with pytest.raises(StorageUnavailable, match="full"):
        database.run(lambda c: c.execute("INSERT INTO t VALUES (1, ?)", ("x" * 100_000,))).result()
    assert rows(database) == []
    database.run(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall()).result()
    database.run(lambda c: c.execute("INSERT INTO t VALUES (2, 'a')")).result()
    assert rows(database) == [2]
    database.close()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    database = Database(tmp_path, [SCHEMA])
    script = (
        "import sys; from pathlib import Path; from runtime.trainer.database import Database, StateDirectoryInUse\n"
        "try:\n    Database(Path(sys.argv[1]), [])\nexcept StateDirectoryInUse as error:\n    sys.exit(str(error))"
    )
    other = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "in use" in other.stderr
    with pytest.raises(StateDirectoryInUse):
        Database(tmp_path, [])
    database.close()
    Database(tmp_path, []).close()
