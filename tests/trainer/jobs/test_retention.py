"""Deleting jobs, by hand and with time: what goes, what stays, and what a crash in between leaves."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.errors import Conflict, NotFound
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs.execution import delete_discarded
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.records import Job, JobFile, JobSubmission
from runtime.trainer.jobs.retention import Due, Keep, Retention
from tests.limited import ROOT
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


async def submit_with_file(world: World, *lines: str) -> str:
    job_id = JobManager.new_id()
    folder = world.manager.directories.incoming(job_id)
    folder.mkdir(parents=True)
    (folder / "000-a.jsonl").write_text("{}\n")
    file = JobFile(name="a.jsonl", stored_as="000-a.jsonl", bytes=3)
    recipe = "\n".join(("data: a.jsonl", *lines)).encode()
    await world.manager.submit(JobSubmission(id=job_id, recipe=recipe, files=(file,)))
    return job_id


def retention(world: World, **keep: float) -> Retention:
    async def forget(job_id: str) -> None:
        await world.manager._forget(job_id)

    return Retention(world.manager.store, world.manager.directories, WorkerThread(), Keep(**keep), forget)


def names(world: World, job_id: str) -> set[str]:
    folder = world.manager.directories.folder(job_id)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


async def test_a_deleted_job_leaves_what_it_published(world: World) -> None:
    job_id = await submit_with_file(world, "name: a", "steps: 3", "every: 1")
    await world.until(job_id, "succeeded")
    await world.settle()
    assert names(world, job_id) == {"checkpoints", "job.json", "log.jsonl", "result", "uploads"}
    await world.manager.delete(job_id)
    assert not world.manager.directories.folder(job_id).exists()
    with pytest.raises(NotFound):
        await world.manager.store.get(job_id)
    with pytest.raises(NotFound):
        await world.manager.delete(job_id)
    assert await world.manager.store.discards() == []
    rows = "SELECT (SELECT count(*) FROM job_events) + (SELECT count(*) FROM job_files) + "
    rows += "(SELECT count(*) FROM job_checkpoints) + (SELECT count(*) FROM job_results) + "
    rows += "(SELECT count(*) FROM job_progress)"
    assert await world.database.call(lambda c: c.execute(rows).fetchone()[0]) == 0
    assert len(world.publisher.published) == 1
    await world.settle()  # and the log does not come back
    assert not world.manager.directories.folder(job_id).exists()


async def test_only_what_has_ended_can_be_deleted(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    running = await world.submit("name: a")
    queued = await world.submit("name: b")
    await world.until(running.id, "running")
    for job in (running, queued):
        with pytest.raises(Conflict, match="Cancel it first") as caught:
            await world.manager.delete(job.id)
        assert caught.value.code == "job_state"
    await world.settle()
    await world.manager.pause(running.id)
    await world.step()
    await world.until(running.id, "paused")
    with pytest.raises(Conflict, match="is paused"):
        await world.manager.delete(running.id)
    await world.manager.cancel(running.id)
    await world.manager.delete(running.id)
    await world.stop(0.0)


async def test_who_follows_a_job_that_is_deleted_is_told_of_its_end(world: World) -> None:
    job = await world.submit("name: a")
    await world.until(job.id, "succeeded")
    await world.manager.tail.events(job.id, after=0, limit=500)
    await world.manager.delete(job.id)
    with pytest.raises(NotFound):
        await world.manager.tail.events(job.id, after=0, limit=500)


async def test_each_part_is_kept_as_long_as_it_says(world: World) -> None:
    job_id = await submit_with_file(world, "name: a", "steps: 3", "every: 1")
    done = await world.until(job_id, "succeeded")
    await world.settle()
    end = done.finished_at
    assert end is not None
    kept = retention(world, jobs=300.0, checkpoints=100.0, uploads=200.0)
    assert await kept.prune(end + 99) == []
    assert await kept.prune(end + 101) == [Due(job_id, "checkpoints")]
    assert names(world, job_id) >= {"result", "uploads", "job.json"}
    assert await world.manager.store.checkpoints(job_id) == []
    assert [*world.manager.directories.checkpoint(job_id, 1).parent.glob("*")] == []
    assert await kept.due(end + 201) == [Due(job_id, "uploads")]
    assert await kept.prune(end + 201) == [Due(job_id, "uploads")]
    assert "uploads" not in names(world, job_id)
    assert [file.name for file in await world.manager.store.files(job_id)] == ["a.jsonl"]
    assert await kept.prune(end + 250) == []
    assert await kept.prune(end + 301) == [Due(job_id, "job")]
    assert names(world, job_id) == set()


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_whatever_its_end_was(tmp_path: Path, state: str) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 9", "every: 1")
    await world.until(job.id, "running")
    await world.settle()
    await world.step(2)
    kept = retention(world, checkpoints=1.0)
    assert await kept.prune(time.time() + 1e6) == []  # it has not ended
    if state == "failed":
        world.runs.current.fail("nan_loss")
    else:
        await world.manager.cancel(job.id)
        await world.step()
    await world.until(job.id, state)
    assert await kept.prune(time.time() + 2) == [Due(job.id, "checkpoints")]
    await world.stop(0.0)


@pytest.mark.parametrize("what", ["jobs", "checkpoints", "uploads"])
@pytest.mark.parametrize("fails_again", [False, True])
async def test_a_job_that_is_resumed_meanwhile_keeps_everything(by_hand: World, what: str, fails_again: bool) -> None:
    """Even if it has ended again by then: what it has is not as old as was read."""
    job_id = await submit_with_file(by_hand, "name: a", "steps: 9", "every: 1")
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    await by_hand.step(2)
    by_hand.runs.current.fail("nan_loss")
    await by_hand.until(job_id, "failed")
    await by_hand.settle()
    kept = retention(by_hand, **{what: 100.0})
    due, now = kept.due, time.time() + 101

    async def due_and_resumed(*args: float) -> list[Due]:
        found = await due(*args)
        await by_hand.manager.resume(job_id)
        await by_hand.until(job_id, "running")
        await by_hand.settle()
        if fails_again:
            by_hand.runs.current.fail("nan_loss")
            failed = await by_hand.until(job_id, "failed")
            await by_hand.database.call(
                lambda c: c.execute("UPDATE jobs SET finished_at = ? WHERE id = ?", (now, failed.id))
            )
        return found

    kept.due = due_and_resumed  # type: ignore[method-assign]
    assert await kept.prune(now) == []
    assert [one.step for one in await by_hand.manager.store.checkpoints(job_id)] == [1, 2]
    assert names(by_hand, job_id) >= {"checkpoints", "uploads"}


async def test_it_goes_by_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.start()
    await world.manager.stop(0.0)
    directories, engine = world.manager.directories, world.manager._engine
    world.manager = JobManager(world.database, directories, engine, world.meters, max_waiting=9, keep=Keep(jobs=0.05))
    await world.manager.start()
    job = await world.submit("name: a")
    folder = world.manager.directories.folder(job.id)
    found: list[Job] = [job]
    for _ in range(500):
        found, _ = await world.manager.store.page(after=None, limit=9, states=())
        if not found and not folder.exists():
            break
        await asyncio.sleep(0.02)
    assert (found, folder.exists()) == ([], False)
    await world.stop()


KILLED = """
import asyncio, os, sys
from pathlib import Path
from tests.trainer.jobs.fakes import World

async def main():
    world = World(Path(sys.argv[1]))
    await world.start()
    job = await world.submit("name: a", "steps: 3", "every: 1")
    await world.until(job.id, "succeeded")
    await world.settle()
    world.manager.directories.discard = lambda job_id: os._exit(70)
    await world.manager.delete(job.id)

asyncio.run(main())
"""


def exit_code_of(code: str, *arguments: Path) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


async def test_a_process_that_is_killed_while_it_deletes_leaves_that_to_the_next(tmp_path: Path) -> None:
    assert await asyncio.to_thread(exit_code_of, KILLED, tmp_path) == 70
    assert len([*(tmp_path / "jobs").iterdir()]) == 1
    world = World(tmp_path)
    await world.start()
    assert [*(tmp_path / "jobs").iterdir()] == []
    assert await world.manager.store.discards() == []
    assert not (tmp_path / "lost+found").exists()
    await world.stop()


async def test_nothing_outside_is_ever_deleted(world: World, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    await world.manager.store.discard(["adapters", "../x", "jobs/../adapters", "/etc/hostname"])
    await delete_discarded(world.manager.store, world.manager.directories, world.manager._disk)
    assert (tmp_path / "adapters").exists()
