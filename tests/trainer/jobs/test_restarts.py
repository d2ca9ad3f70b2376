"""What the end of a process leaves of jobs, and what the next one makes of it."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from runtime.errors import Conflict
from runtime.trainer.jobs.records import JobSubmission
from runtime.trainer.jobs.store import MAX_CRASHES
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


async def test_stopping_writes_a_checkpoint_and_the_next_process_goes_on_from_it(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 5")
    queued = await world.submit("name: b")
    await world.until(job.id, "running")
    await world.settle()
    await world.step(2)
    stopping = asyncio.create_task(world.stop())
    await asyncio.sleep(0.01)
    world.runs.current.step()
    await stopping
    await world.start()
    assert [c.step for c in await world.manager.store.checkpoints(job.id)] == [3]
    assert (await world.manager.store.get(queued.id)).state == "queued"
    await world.until(job.id, "running")
    await world.settle()
    assert world.runs.started == [(job.id, 3)]
    assert (await world.statuses(job.id))[-3:] == ["interrupted", "queued", "running"]
    await world.stop(0.0)


async def test_a_killed_process_resumes_once_from_the_newest_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 9", "every: 2")
    await world.until(job.id, "running")
    await world.settle()
    await world.step(5)
    await world.crash()
    await world.start()
    await world.until(job.id, "running")
    await world.settle()
    assert world.runs.started == [(job.id, 4)]
    await world.step(5)
    done = await world.until(job.id, "succeeded")
    assert done.attempts == 0
    _, progress = await world.manager.store.describe(job.id)
    assert progress.trained_tokens == 90  # step 5 was computed twice, and counts once
    await world.stop()


async def test_a_paused_job_stays_paused(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a")
    await world.until(job.id, "running")
    await world.settle()
    await world.manager.pause(job.id)
    await world.step()
    await world.until(job.id, "paused")
    await world.crash()
    await world.start()
    await world.settle()
    assert (await world.manager.store.get(job.id)).state == "paused"
    await world.manager.resume(job.id)
    await world.until(job.id, "running")
    await world.settle()
    assert world.runs.started == [(job.id, 1)]
    await world.stop(0.0)


@pytest.mark.parametrize(("wish", "state"), [("cancel", "cancelled"), ("pause", "paused")])
async def test_what_was_asked_for_outlives_the_process(tmp_path: Path, wish: str, state: str) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a")
    await world.until(job.id, "running")
    await world.settle()
    await getattr(world.manager, wish)(job.id)
    await world.crash()
    await world.start()
    assert (await world.manager.store.get(job.id)).state == state
    await world.stop()


async def test_a_recipe_that_was_being_read_is_read_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.start()
    world.preparer.hold = True
    submitting = asyncio.create_task(world.submit("name: a"))
    async with asyncio.timeout(10):
        while not world.preparer.calls:
            await world.settle()
    (job, _), *_ = (await world.manager.store.page(after=None, limit=1, states=()))[0]
    assert (job.state, job.name, job.total_steps, world.preparer.calls) == ("validating", None, None, 1)
    await world.crash()
    world.preparer.hold = False
    await asyncio.gather(submitting, return_exceptions=True)
    await world.start()
    done = await world.until(job.id, "succeeded")
    assert world.preparer.calls > 1
    assert (done.name, done.total_steps, done.adapter) == ("a", 3, "a@1")
    assert len(world.publisher.published) == 1
    await world.stop()


async def test_a_job_that_ends_the_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a")
    other = await world.submit("name: b")
    for _ in range(MAX_CRASHES):
        await world.until(job.id, "running")
        await world.settle()
        await world.step()
        await world.crash()
        await world.start()
    failed = await world.manager.store.get(job.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == ("failed", "crash_loop")
    await world.until(other.id, "running")
    await world.stop(0.0)


async def test_progress_between_crashes_starts_the_count_anew(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 20", "every: 1")
    for _ in range(MAX_CRASHES + 1):
        await world.until(job.id, "running")
        await world.settle()
        await world.step()
        await world.crash()
        await world.start()
    assert (await world.until(job.id, "running")).error is None
    await world.stop(0.0)


async def test_a_result_that_was_not_published_yet_is_published_without_training_again(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    publishing = asyncio.Event()

    async def hang(**_: object) -> str:
        publishing.set()
        await asyncio.sleep(60)
        return ""

    world.publisher.publish, publish = hang, world.publisher.publish  # type: ignore[method-assign, assignment]
    job = await world.submit("name: a", "steps: 1")
    await world.until(job.id, "running")
    await world.settle()
    world.runs.current.step()
    await publishing.wait()
    with pytest.raises(Conflict, match="publishing"):
        await world.manager.cancel(job.id)
    await world.crash()
    world.publisher.publish = publish  # type: ignore[method-assign]
    await world.start()
    assert (await world.until(job.id, "succeeded")).adapter == "a@1"
    assert world.runs.started == []
    await world.stop()


async def test_leftovers_are_cleared_up_and_lost_checkpoints_forgotten(tmp_path: Path) -> None:
    import shutil

    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 9", "every: 2")
    await world.until(job.id, "running")
    await world.settle()
    await world.step(4)
    await world.crash()
    directories = world.manager.directories
    shutil.rmtree(directories.checkpoint(job.id, 4))
    (directories.root / "ftjob-unknown" / "uploads").mkdir(parents=True)
    directories.checkpoint(job.id, 6).mkdir()
    (directories.root / job.id / "result.partial").mkdir()
    (directories.root / job.id / "result").mkdir()
    await world.start()
    await world.until(job.id, "running")
    await world.settle()
    assert world.runs.started == [(job.id, 2)]
    assert [path.name for path in directories.root.iterdir()] == [job.id]
    assert sorted(path.name for path in (directories.root / job.id).iterdir()) == [
        "checkpoints", "examples.bin", "job.json", "log.jsonl",
    ]  # fmt: skip
    assert [path.name for path in directories.checkpoint(job.id, 2).parent.iterdir()] == ["step-2"]
    await world.stop(0.0)


async def test_prepared_data_is_kept_until_the_end_of_its_job(tmp_path: Path) -> None:
    """From the reading of the recipe over a restart to any end; none is kept for a recipe that is tried out."""
    world = World(tmp_path, steps_itself=False)
    await world.start()
    directories = world.manager.directories
    job = await world.submit("name: a", "steps: 3", "every: 1")
    waiting = await world.submit("name: b")
    await world.until(job.id, "running")
    await world.settle()
    assert Counter(world.preparer.kept) == {directories.prepared(job.id): 2, directories.prepared(waiting.id): 1}
    assert directories.prepared(job.id).exists()
    await world.manager.cancel(waiting.id)
    await world.settle()
    assert not directories.prepared(waiting.id).exists()
    await world.crash()
    await world.start()
    await world.until(job.id, "running")
    await world.settle()
    assert world.preparer.kept[-1] == directories.prepared(job.id)
    assert directories.prepared(job.id).exists()
    await world.step(3)
    await world.until(job.id, "succeeded")
    await world.settle()
    assert not directories.prepared(job.id).exists()
    assert await world.manager.store.discards() == []
    submission = JobSubmission(id=world.manager.new_id(), recipe=b"name: c")
    await world.manager.dry_run(submission)
    assert world.preparer.kept[-1] is None
    await world.stop()


async def test_a_job_that_is_cancelled_while_it_is_read_leaves_no_prepared_data(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.start()
    world.preparer.hold = True
    submission = JobSubmission(id=world.manager.new_id(), recipe=b"name: a")
    job, _ = await world.manager.submit(submission, patience=0.01)
    async with asyncio.timeout(10):
        while not world.preparer.calls:
            await world.settle()
    reading = world.manager._validation._tasks[job.id]
    await world.manager.cancel(job.id)
    await world.settle()
    world.preparer.hold = False
    await asyncio.wait_for(reading, 10)
    assert world.preparer.kept == [world.manager.directories.prepared(job.id)]
    assert not world.manager.directories.prepared(job.id).exists()
    await world.stop()
