"""Jobs made again from their folders, and what no row knows: moved aside, never deleted."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.support.database import FILE, Database
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.records import JobFile, JobSubmission
from runtime.trainer.jobs.recovery import adopt
from runtime.trainer.jobs.rows import SCHEMA
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def submit(world: World, *lines: str, key: str | None = None) -> str:
    """A job with a file."""
    job_id = JobManager.new_id()
    folder = world.manager.directories.incoming(job_id)
    folder.mkdir(parents=True)
    (folder / "000-a.jsonl").write_text("{}\n")
    file = JobFile(name="a.jsonl", stored_as="000-a.jsonl", bytes=3)
    recipe = "\n".join(("data: a.jsonl", *lines)).encode()
    asked = JobSubmission(id=job_id, recipe=recipe, files=(file,), digest="d", idempotency_key=key)
    await world.manager.submit(asked)
    return job_id


async def run(world: World, job_id: str, steps: int) -> None:
    await world.until(job_id, "running")
    await world.settle()
    await world.step(steps)


async def everything(world: World) -> list[Any]:
    """All that can be asked about jobs."""
    store, found = world.manager.store, []
    for job, progress in (await store.page(after=None, limit=100, states=()))[0]:
        _, events = await store.events(job.id, after=0, limit=1000)
        known = await store.checkpoints(job.id), await store.result(job.id), await store.files(job.id)
        found.append((await store.record(job.id), progress, events, *known))
    return found


async def lose_database(world: World) -> None:
    await world.stop(0.0)
    for path in world.path.glob(f"{FILE}*"):
        path.unlink()


async def test_a_lost_database_is_made_again(by_hand: World) -> None:
    """Jobs at every end, one that waits and one that was at work, with their events, checkpoints, results and files."""
    published = await submit(by_hand, "name: a", "steps: 3", "every: 1", key="k")
    await run(by_hand, published, 3)
    await by_hand.until(published, "succeeded")
    failed = await submit(by_hand, "name: b", "steps: 9", "every: 2")
    await run(by_hand, failed, 3)
    by_hand.runs.current.fail("nan_loss")
    await by_hand.until(failed, "failed")
    at_work = await submit(by_hand, "name: c", "steps: 9", "every: 2")
    await run(by_hand, at_work, 5)
    queued = await submit(by_hand, "name: d")
    cancelled = await submit(by_hand, "name: e")
    await by_hand.manager.cancel(cancelled)
    await by_hand.settle()
    before = await everything(by_hand)
    assert len(before) == 5
    await lose_database(by_hand)
    database = Database(by_hand.path, [SCHEMA])
    made, problems = database.run(lambda c: adopt(c, JobDirectories(by_hand.path))).result()
    assert problems == []
    assert made == [published, failed, at_work, queued, cancelled]
    assert database.run(lambda c: adopt(c, JobDirectories(by_hand.path))).result() == ([], [])
    database.close()
    await by_hand.start()
    after = await everything(by_hand)
    for (record, progress, events, *known), (record2, progress2, events2, *known2) in zip(before, after, strict=True):
        assert known2 == known
        assert progress2 == progress
        assert events2[: len(events)] == events
        later = [event for event in events2[len(events) :] if event.data.get("status") != "interrupted"]
        assert "database was lost" in later[0].message
        if record.job.ended:
            assert record2 == msgspec.structs.replace(record, job=msgspec.structs.replace(record.job, attempts=0))
        else:
            assert (record2.job.recipe, record2.digest) == (record.job.recipe, record.digest)
    await by_hand.until(at_work, "running")
    await by_hand.settle()
    assert by_hand.runs.started == [(at_work, 4)]
    await by_hand.step(5)
    assert (await by_hand.until(at_work, "succeeded")).adapter == "c@2"
    await run(by_hand, queued, 3)
    await by_hand.until(queued, "succeeded")
    again = JobSubmission(id=JobManager.new_id(), recipe=before[-1][0].job.recipe, digest="d", idempotency_key="k")
    job, created = await by_hand.manager.submit(again)
    assert (job.id, created) == (published, False)


async def test_a_result_that_was_not_published_is_published_then(by_hand: World) -> None:
    async def never(**asked: object) -> str:
        raise AssertionError("killed before")

    job_id = await submit(by_hand, "name: a", "steps: 2")
    publish, by_hand.publisher.publish = by_hand.publisher.publish, never  # type: ignore[method-assign, assignment]
    await run(by_hand, job_id, 1)
    by_hand.manager.directories.record(job_id).read_bytes()
    await by_hand.crash()
    by_hand.publisher.publish = publish  # type: ignore[method-assign]
    await by_hand.start()
    await run(by_hand, job_id, 2)
    await by_hand.until(job_id, "succeeded")
    await lose_database(by_hand)
    record = by_hand.manager.directories.record(job_id)
    old = msgspec.json.decode(record.read_bytes())
    old["job"] |= {"state": "evaluating", "finished_at": None, "adapter": None}
    record.write_bytes(msgspec.json.encode(old))
    database = Database(by_hand.path, [SCHEMA])
    assert database.run(lambda c: adopt(c, JobDirectories(by_hand.path))).result() == ([job_id], [])
    database.close()
    await by_hand.start()
    assert (await by_hand.until(job_id, "succeeded")).adapter == "a@1"
    assert by_hand.runs.started == []


async def test_what_is_damaged_is_named_and_the_rest_is_taken_in(by_hand: World) -> None:
    ids = [await submit(by_hand, f"name: a{n}", "steps: 4", "every: 1") for n in range(4)]
    for job_id in ids:
        await run(by_hand, job_id, 4)
        await by_hand.until(job_id, "succeeded")
    await by_hand.settle()
    await lose_database(by_hand)
    directories = JobDirectories(by_hand.path)
    directories.record(ids[0]).write_text("{")
    shutil.copytree(directories.folder(ids[1]), directories.root / "ftjob-copy")
    (directories.checkpoint(ids[2], 2) / "checkpoint.json").write_text('{"step": 3, "best": false, "created_at": 1}')
    log = directories.log(ids[3]).read_bytes().splitlines(keepends=True)
    directories.log(ids[3]).write_bytes(b"".join(log[:3]) + b"torn\n" + log[4])
    database = Database(by_hand.path, [SCHEMA])
    made, problems = database.run(lambda c: adopt(c, directories)).result()
    database.close()
    assert made == ids[1:]
    assert {problem.partition(": ")[0] for problem in problems} == {
        "jobs/ftjob-copy",
        f"jobs/{ids[0]}",
        f"jobs/{ids[2]}/checkpoints/step-2",
        f"jobs/{ids[3]}",
    }
    await by_hand.start()
    assert [c.step for c in await by_hand.manager.store.checkpoints(ids[2])] == [1, 3]
    _, events = await by_hand.manager.store.events(ids[3], after=0, limit=100)
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert "database was lost" in events[-1].message


async def test_without_its_rows_everything_is_moved_aside(by_hand: World) -> None:
    """Nothing is deleted, whatever became of the database."""
    job_id = await submit(by_hand, "name: a", "steps: 3", "every: 1")
    await run(by_hand, job_id, 3)
    await by_hand.until(job_id, "succeeded")
    await by_hand.settle()
    await lose_database(by_hand)
    (by_hand.path / "jobs" / "note.txt").write_text("mine")
    before = files_below(by_hand.path / "jobs")
    await by_hand.start()
    assert [*(by_hand.path / "jobs").iterdir()] == []
    (batch,) = (by_hand.path / "lost+found").iterdir()
    assert files_below(batch / "jobs") == before


async def test_a_place_that_is_taken_is_moved_aside_too(by_hand: World) -> None:
    """A checkpoint's folder that appears while the job runs is not overwritten."""
    job_id = await submit(by_hand, "name: a", "steps: 3", "every: 1")
    await run(by_hand, job_id, 1)
    stray = by_hand.manager.directories.checkpoint(job_id, 2)
    stray.mkdir()
    (stray / "mine").write_text("mine")
    await by_hand.step(2)
    await by_hand.until(job_id, "succeeded")
    assert (stray / "step").read_text() == "2"
    (found,) = (by_hand.path / "lost+found").glob("*/jobs/*/checkpoints/step-2/mine")
    assert found.read_text() == "mine"


async def test_where_nothing_can_be_moved_it_stays(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the folder is a volume of its own."""
    await by_hand.stop()
    (by_hand.path / "jobs" / "ftjob-unknown").mkdir(parents=True)

    def fail(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("runtime.support.state_directory.move", fail)
    await by_hand.start()
    assert [path.name for path in (by_hand.path / "jobs").iterdir()] == ["ftjob-unknown"]


async def test_a_lost_found_of_the_file_system_s_own(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of an ext4 volume has one, into which only root may write."""
    from runtime.support import state_directory as lost_found

    await by_hand.stop()
    (by_hand.path / "jobs" / "ftjob-unknown").mkdir(parents=True)
    whole = lost_found.move

    def move(source: Path, target: Path) -> None:
        if "lost+found" in target.parts:
            raise PermissionError(13, "Permission denied")
        whole(source, target)

    monkeypatch.setattr(lost_found, "move", move)
    await by_hand.start()
    assert len([*(by_hand.path / "lost+found.eft").glob("*/jobs/ftjob-unknown")]) == 1
    assert len(lost_found.batches(by_hand.path)) == 1


async def test_jobs_of_an_older_version_get_their_records(by_hand: World) -> None:
    job_id = await submit(by_hand, "name: a", "steps: 1")
    await run(by_hand, job_id, 1)
    await by_hand.until(job_id, "succeeded")
    await by_hand.settle()
    record = by_hand.manager.directories.record(job_id)
    before = record.read_bytes()
    await by_hand.stop()
    record.unlink()
    await by_hand.start()
    for _ in range(10):
        await by_hand.settle()
    assert record.read_bytes() == before
