"""`eft state`: what is in a state directory, deleting what is old, and making a database again."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from runtime.batches.manager import BatchManager
from runtime.engine.state import SCHEMAS
from runtime.feedback import Feedback, FeedbackStore
from runtime.files.library import FileLibrary
from runtime.responses import ResponseStore, StoredResponse
from runtime.support.database import FILE, Database
from runtime.support.logs import configure
from settings.api import FeedbackSettings, FileSettings, ResponseSettings
from settings.schema import ObservabilitySettings
from tests.cli.conftest import Eft
from tests.trainer.jobs.fakes import World


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    configure(ObservabilitySettings(log_level="error"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """With a job that has ended."""
    directory = tmp_path / "state"

    async def fill() -> None:
        world = World(directory)
        await world.start()
        job = await world.submit("name: a", "steps: 3", "every: 1")
        await world.until(job.id, "succeeded")
        await world.settle()
        await world.stop()

    asyncio.run(fill())
    return directory


def job_of(state: Path) -> Path:
    (folder,) = (state / "jobs").iterdir()
    return folder


def test_what_takes_how_much_room(eft: Eft, state: Path) -> None:
    done = eft("state", "du", "--state-dir", state)
    assert done.code == 0
    for word in ("database", "adapters", "1 jobs", job_of(state).name, "checkpoints", "result", "lost+found", "free"):
        assert word in done.out
    found = json.loads(eft("state", "du", "--state-dir", state, "--json").out)
    sizes = [path.stat().st_size for path in job_of(state).rglob("*") if path.is_file()]
    (job,) = found["jobs"]
    assert job["uploads"] + job["checkpoints"] + job["result"] + job["other"] == sum(sizes)


def test_the_room_of_prepared_data(eft: Eft, state: Path) -> None:
    """A file that a job has a name for too counts once; the ones used longest ago go."""
    folder = state / "prepared"
    folder.mkdir()
    for number, name in enumerate(("new", "old", "older")):
        (folder / f"{name}.bin").write_bytes(b"0123456789")
        used = time.time() - 100 * number
        os.utime(folder / f"{name}.bin", (used, used))
    (folder / "a.bin.partial-1").write_bytes(b"01234")
    before = json.loads(eft("state", "du", "--state-dir", state, "--json").out)["jobs"]
    os.link(folder / "new.bin", job_of(state) / "examples.bin")
    found = json.loads(eft("state", "du", "--state-dir", state, "--json").out)
    assert (found["prepared"], found["jobs"]) == ({"count": 4, "bytes": 35}, before)
    assert "4 sets, for later jobs" in eft("state", "du", "--state-dir", state).out
    aged = eft("state", "prune", "--state-dir", state, "--keep-uploads", "150s", "--dry-run").out.splitlines()
    assert sorted(aged) == [f"prepared/{name} would be deleted" for name in ("a.bin.partial-1", "older.bin")]
    prune = ("state", "prune", "--state-dir", state, "--prepared-cache", "15")
    gone = ["prepared/a.bin.partial-1", "prepared/old.bin", "prepared/older.bin"]
    assert sorted(eft(*prune, "--dry-run").out.splitlines()) == [f"{name} would be deleted" for name in gone]
    assert sorted(eft(*prune).out.splitlines()) == [f"{name} deleted" for name in gone]
    assert [path.name for path in folder.iterdir()] == ["new.bin"]


def test_deleting_what_is_old(eft: Eft, state: Path) -> None:
    folder = job_of(state)
    done = eft("state", "prune", "--state-dir", state)
    assert (done.code, done.out) == (0, "There is nothing to delete.\n")
    old = ("state", "prune", "--state-dir", state, "--keep-checkpoints", "1ms")
    assert eft(*old, "--dry-run").out == f"{folder.name}: checkpoints would be deleted\n"
    assert (folder / "checkpoints" / "step-2").is_dir()
    assert eft(*old).out == f"{folder.name}: checkpoints deleted\n"
    assert not (folder / "checkpoints" / "step-2").exists()
    assert (folder / "result").is_dir()
    assert eft("state", "prune", "--state-dir", state, "--keep-jobs", "1ms").out == f"{folder.name}: the job deleted\n"
    assert not folder.exists()


@pytest.fixture
def busy(tmp_path: Path) -> Path:
    """With a file, a batch that has ended, and a stored response; all made a hundred seconds ago."""
    directory, then = tmp_path / "state", int(time.time()) - 100

    async def fill() -> None:
        database = Database(directory, SCHEMAS)
        library = FileLibrary(database, directory, FileSettings())
        await library.start()
        for purpose in ("user_data", "batch"):
            async with library.receiving() as upload:
                await upload.write(b"0123456789")
                file = await library.keep(upload, owner="", purpose=purpose, filename="a", lifetime=None)
        manager = BatchManager(database, directory, library, FileSettings(), max_line=100)
        batch = await manager.create(
            owner="",
            endpoint="/v1/completions",
            input_file_id=file.id,
            completion_window="1h",
            window_seconds=60,
            metadata=None,
            output_lifetime=None,
        )
        await manager.store.end(batch.id, "failed", [])
        await ResponseStore(database, ResponseSettings(keep_responses=None)).put(
            StoredResponse(id="r", tenant="", created_at=then, previous_id=None, input=b"[]", response=b"{}")
        )
        feedback = FeedbackStore(database, FeedbackSettings(keep_feedback=None), clock=lambda: then)
        await feedback.add(Feedback(answer_id="a", score=1), "")
        await database.call(lambda c: c.execute("UPDATE files SET created_at = ?", (then,)))
        await database.call(lambda c: c.execute("UPDATE batches SET failed_at = ?", (then,)))
        database.close()

    asyncio.run(fill())
    return directory


def test_the_room_of_files_batches_and_responses(eft: Eft, busy: Path) -> None:
    out = eft("state", "du", "--state-dir", busy).out
    for line in ("2 files", "1 batches", "1 stored responses, in the database", "1 rows, in the database"):
        assert line in out
    found = json.loads(eft("state", "du", "--state-dir", busy, "--json").out)
    sizes = [path.stat().st_size for path in (busy / "files").rglob("*") if path.is_file()]
    assert found["files"] == {"count": 2, "bytes": sum(sizes)}
    (record,) = busy.glob("batches/*/batch.json")
    assert found["batches"] == {"count": 1, "bytes": record.stat().st_size}
    assert found["responses"] == {"count": 1, "bytes": 4}
    assert found["feedback"]["count"] == 1
    (busy / FILE).write_bytes(b"no database" * 1000)
    assert json.loads(eft("state", "du", "--state-dir", busy, "--json").out)["responses"] is None


def test_deleting_old_files_batches_and_responses(eft: Eft, busy: Path) -> None:
    prune = ("state", "prune", "--state-dir", busy)
    assert eft(*prune, "--keep-files", "1h", "--keep-batches", "1h").out == "There is nothing to delete.\n"
    (batch,) = [path.name for path in (busy / "batches").iterdir()]
    assert eft(*prune, "--keep-batches", "1m", "--dry-run").out == f"{batch} would be deleted\n"
    assert eft(*prune, "--keep-batches", "1m").out == f"{batch} deleted\n"
    assert [*(busy / "batches").iterdir()] == []
    assert eft(*prune, "--keep-responses", "1m", "--dry-run").out == "1 stored responses would be deleted\n"
    assert eft(*prune, "--keep-responses", "1m").out == "1 stored responses deleted\n"
    assert eft(*prune, "--keep-feedback", "1m", "--dry-run").out == "1 rows of feedback would be deleted\n"
    assert eft(*prune, "--keep-feedback", "1m").out == "1 rows of feedback deleted\n"
    names = {path.name for path in (busy / "files").iterdir()}
    assert set(eft(*prune, "--keep-files", "1m").out.splitlines()) == {f"{name} deleted" for name in names}
    assert [*(busy / "files").iterdir()] == []


def test_lost_found_is_deleted_when_it_is_asked_for(eft: Eft, state: Path) -> None:
    (state / "lost+found" / "20260101T000000-abcdef").mkdir(parents=True)
    assert "nothing" in eft("state", "prune", "--state-dir", state).out
    asked = ("state", "prune", "--lost-found", "--state-dir", state)
    assert eft(*asked, "--dry-run").out == "lost+found/20260101T000000-abcdef would be deleted\n"
    assert eft(*asked).out == "lost+found/20260101T000000-abcdef deleted\n"
    assert [*(state / "lost+found").iterdir()] == []


def test_a_database_is_made_again(eft: Eft, state: Path) -> None:
    name = job_of(state).name
    (state / FILE).unlink()
    done = eft("state", "rebuild", "--state-dir", state)
    assert (done.code, done.out) == (0, f"Jobs: 1. Versions of adapters: 0. Files: 0. Batches: 0.\n  {name}\n")
    again = eft("state", "rebuild", "--state-dir", state, "--json")
    kinds = ("jobs", "adapters", "files", "batches", "problems", "moved_aside")
    assert json.loads(again.out) == {kind: [] for kind in kinds}


def test_what_cannot_be_taken_in_is_listed(eft: Eft, state: Path) -> None:
    (state / FILE).write_bytes(b"no database" * 1000)
    (job_of(state) / "job.json").unlink()
    done = eft("state", "rebuild", "--state-dir", state)
    assert done.code == 1
    assert f"Moved to lost+found: {FILE}." in done.out
    assert f"not taken in: jobs/{job_of(state).name}: job.json: No such file or directory" in done.out


@pytest.mark.parametrize("command", ["prune", "rebuild"])
def test_a_server_that_is_at_work_there_is_left_alone(eft: Eft, state: Path, command: str) -> None:
    database = Database(state, [])
    done = eft("state", command, "--state-dir", state)
    assert done.code == 1
    assert "in use by another Eft process" in done.err
    assert eft("state", "du", "--state-dir", state).code == 0
    database.close()


@pytest.mark.parametrize("command", ["du", "prune", "rebuild"])
def test_no_directory_is_made(eft: Eft, tmp_path: Path, command: str) -> None:
    done = eft("state", command, "--state-dir", tmp_path / "absent")
    assert (done.code, done.err) == (1, f"eft: there is no state directory {tmp_path / 'absent'}\n")
    assert not (tmp_path / "absent").exists()
