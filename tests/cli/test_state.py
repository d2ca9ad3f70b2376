"""`eft state`: what is in a state directory, deleting what is old, and making a database again."""

import asyncio
import json
from pathlib import Path

import pytest

from runtime.support.database import FILE
from runtime.support.logs import configure
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
    assert json.loads(again.out) == dict.fromkeys(kinds, [])


def test_what_cannot_be_taken_in_is_listed(eft: Eft, state: Path) -> None:
    (state / FILE).write_bytes(b"no database" * 1000)
    (job_of(state) / "job.json").unlink()
    done = eft("state", "rebuild", "--state-dir", state)
    assert done.code == 1
    assert f"Moved to lost+found: {FILE}." in done.out
    assert f"not taken in: jobs/{job_of(state).name}: job.json: No such file or directory" in done.out


@pytest.mark.parametrize("command", ["prune", "rebuild"])
def test_a_server_that_is_at_work_there_is_left_alone(eft: Eft, state: Path, command: str) -> None:
    from runtime.support.database import Database

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
