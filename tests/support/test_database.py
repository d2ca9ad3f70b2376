"""The state directory's database: transactions, full disks, and one process at a time."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.errors import StorageUnavailable
from runtime.support import database as migrations
from runtime.support.database import FILE, VERSION, Database, DatabaseCorrupt, DatabaseTooNew, StateDirectoryInUse
from runtime.trainer.jobs import rows as job_rows
from runtime.trainer.jobs import rows as schema
from runtime.trainer.jobs.rows import SCHEMAS
from tests.limited import FULL_DISK, run_limited

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


def test_a_cursor_does_not_outlive_its_transaction(tmp_path: Path) -> None:
    """A cursor that is freed on another thread would reset the statement that the database's thread is running: SQLite
    calls that misuse."""
    database = Database(tmp_path, [SCHEMA])
    values = [(number,) for number in range(200)]
    problems: list[BaseException] = []

    def delete() -> None:
        for _ in range(200):
            try:
                database.run(lambda c: c.executemany("DELETE FROM t WHERE x = ?", values)).result()
            except StorageUnavailable as error:
                problems.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=delete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []
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
        "import sys; from pathlib import Path; from runtime.support.database import Database, StateDirectoryInUse\n"
        "try:\n    Database(Path(sys.argv[1]), [])\nexcept StateDirectoryInUse as error:\n    sys.exit(str(error))"
    )
    other = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "in use" in other.stderr
    with pytest.raises(StateDirectoryInUse):
        Database(tmp_path, [])
    database.close()
    Database(tmp_path, []).close()


def test_a_new_database_has_this_version(tmp_path: Path) -> None:
    database = Database(tmp_path, SCHEMAS)
    assert database.run(lambda c: c.execute("PRAGMA user_version").fetchone()[0]).result() == VERSION
    database.close()


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    Database(tmp_path, SCHEMAS).close()
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(DatabaseTooNew, match=rf"newer version of Eft .*version {VERSION + 1}; .* up to {VERSION}"):
        Database(tmp_path, SCHEMAS)
    assert (tmp_path / FILE).read_bytes() == before


def test_an_older_version_is_migrated(tmp_path: Path) -> None:
    """The tables of before versions: trained tokens were added up when asked for, and a step may be there twice."""
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript(schema.SCHEMA)
    connection.executescript("DROP TRIGGER job_progress_sums; DROP TABLE job_progress; DROP TABLE job_discards;")
    connection.executescript("ALTER TABLE jobs DROP COLUMN owner;")
    connection.execute("INSERT INTO jobs (id, state, created_at, recipe, digest) VALUES ('j', 'running', 0, x'', '')")
    for number, (step, tokens) in enumerate([(1, 10), (2, 20), (3, 30), (2, 20), (3, 31)], 1):
        data = f'{{"step": {step}, "loss": 1.0, "trained_tokens": {tokens}, "seconds": 2.0}}'
        values = (number, step, data)
        connection.execute("INSERT INTO job_events VALUES ('j', ?, 0, 'info', 'step', ?, 'm', ?)", values)
    connection.commit()
    connection.close()
    for _ in range(2):
        database = Database(tmp_path, SCHEMAS)
        progress = database.run(lambda c: job_rows.progress(c, "j")).result()
        assert (progress.step, progress.trained_tokens, progress.step_seconds) == (3, 61, 2.0)
        assert database.run(lambda c: job_rows.get(c, "j")).result().owner == ""
        database.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database(tmp_path, [SCHEMA]).close()

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1, 'half')")
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, ("t", half)))
    monkeypatch.setattr(migrations, "VERSION", VERSION + 1)
    with pytest.raises(OSError, match="cannot be opened"):
        Database(tmp_path, [SCHEMA])
    monkeypatch.undo()
    database = Database(tmp_path, [SCHEMA])
    assert rows(database) == []
    database.close()


@pytest.mark.parametrize("damage", ["header", "page", "cut"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path, damage: str) -> None:
    database = Database(tmp_path, [SCHEMA])
    for x in range(200):
        values = (x, "y" * 500)
        database.run(lambda c, values=values: c.execute("INSERT INTO t VALUES (?, ?)", values)).result()  # type: ignore[misc]
    database.close()
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = b"no database here"
    elif damage == "page":
        data[8192:12288] = bytes(4096)
    else:
        del data[-9000:]
    path.write_bytes(data)
    with pytest.raises(DatabaseCorrupt, match="eft state rebuild") as caught:
        Database(tmp_path, [SCHEMA])
    assert str(tmp_path) not in str(caught.value)
    assert path.read_bytes() == data
    with pytest.raises(DatabaseCorrupt):  # and the directory is free
        Database(tmp_path, [SCHEMA])


@pytest.mark.parametrize("size", [0, 2048, 20_000])
def test_a_full_disk_at_the_start_is_an_os_error(tmp_path: Path, size: int) -> None:
    """Nothing can be written, or not all of the tables: the next start, with room, makes what is missing."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom runtime.support.database import Database\n"
        "from runtime.trainer.jobs.rows import SCHEMAS\n"
        + FULL_DISK.format(size=size)
        + "try:\n    Database(Path(sys.argv[1]), SCHEMAS)\n    print('opened')\n"
        "except OSError as error:\n    print(type(error).__name__, sys.argv[1] in str(error))"
    )
    assert run_limited(code, tmp_path / "state") == "OSError False"
    database = Database(tmp_path / "state", SCHEMAS)
    database.run(lambda c: c.execute("SELECT * FROM job_progress").fetchall()).result()
    database.close()


def test_the_files_are_for_this_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        database = Database(tmp_path / "state", [SCHEMA])
        database.run(lambda c: c.execute("INSERT INTO t VALUES (1, 'a')")).result()
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
        database.close()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert set(found) == {FILE, f"{FILE}-wal", f"{FILE}-shm", "lock"}
    assert set(found.values()) == {0o600}


def test_files_of_an_older_version_are_made_private(tmp_path: Path) -> None:
    Database(tmp_path, [SCHEMA]).close()
    (tmp_path / FILE).chmod(0o644)
    Database(tmp_path, [SCHEMA]).close()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_progress_takes_as_long_for_a_million_steps(tmp_path: Path) -> None:
    """By SQLite's own count of its virtual machine's steps, not by a clock."""

    def operations(steps: int) -> int:
        database = Database(tmp_path / str(steps), SCHEMAS)

        def fill(c: sqlite3.Connection) -> None:
            c.execute("INSERT INTO jobs (id, state, created_at, recipe, digest) VALUES ('j', 'running', 0, x'', '')")
            data = '{"type": "step", "loss": 1.0, "trained_tokens": 10, "seconds": 1.0, "step": 1, "tokens": 20}'
            values = ((n, n, data) for n in range(1, steps + 1))
            c.executemany("INSERT INTO job_events VALUES ('j', ?, 0, 'info', 'step', ?, 'm', ?)", values)

        def look(c: sqlite3.Connection) -> int:
            count = 0

            def tick() -> int:
                nonlocal count
                count += 1
                return 0

            c.set_progress_handler(tick, 10)
            found = job_rows.progress(c, "j")
            c.set_progress_handler(None, 10)
            assert (found.step, found.trained_tokens) == (steps, 10 * steps)
            return count

        database.run(fill).result()
        count = database.run(look).result()
        database.close()
        return count

    assert operations(20_000) < 2 * operations(100) + 20
