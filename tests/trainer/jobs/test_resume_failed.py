"""Failed jobs that are resumed: from their newest checkpoint, as long as it is kept."""

import errno
from pathlib import Path

import pytest

from runtime.errors import Conflict
from runtime.trainer.jobs.directories import ORIGIN
from runtime.trainer.jobs.records import JobFile, JobSubmission
from tests.trainer.jobs.fakes import FakeEngine, World

pytestmark = pytest.mark.anyio


async def failed_job(world: World, *lines: str) -> str:
    """A job that found no room for its checkpoint of step 4, and has that of step 2."""
    job = await world.submit("name: a", "steps: 6", "every: 2", *lines)
    await world.until(job.id, "running")
    await world.settle()
    await world.step(3)
    world.runs.disk_error = OSError(errno.ENOSPC, "No space left on device")
    await world.step()
    failed = await world.until(job.id, "failed")
    assert failed.error is not None
    assert failed.error.code == "disk_full"
    world.runs.disk_error = None
    return job.id


async def test_a_failed_job_goes_on_from_its_newest_checkpoint(by_hand: World) -> None:
    job_id = await failed_job(by_hand)
    job = await by_hand.manager.resume(job_id)
    assert job.state in ("queued", "running")
    assert (job.error, job.finished_at) == (None, None)
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    await by_hand.step(4)
    ended = await by_hand.until(job_id, "succeeded")
    assert (ended.error, ended.adapter is None) == (None, False)
    events = (await by_hand.manager.store.events(job_id, after=0, limit=1000))[1]
    messages = [event.message for event in events]
    assert "Resumed: queued, to go on from the checkpoint of step 2." in messages
    steps = [event.data["step"] for event in events if event.kind == "step"]
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]


async def test_a_failed_job_without_a_checkpoint_is_not_resumed(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 6", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step()
    by_hand.runs.disk_error = OSError(errno.ENOSPC, "No space left on device")
    await by_hand.step()
    await by_hand.until(job.id, "failed")
    with pytest.raises(Conflict, match="without a checkpoint to go on from"):
        await by_hand.manager.resume(job.id)


async def test_a_job_that_has_trained_goes_on_for_the_same_base_only(by_hand: World) -> None:
    job_id = await failed_job(by_hand)
    engine = FakeEngine(by_hand.preparer, by_hand.runs, by_hand.publisher)
    engine.base_fingerprint = "another"
    by_hand.manager.release(engine)
    assert not await by_hand.manager.can_resume(job_id)
    with pytest.raises(Conflict, match="other weights of the base model") as caught:
        await by_hand.manager.resume(job_id)
    assert caught.value.code == "base_model_changed"
    engine.base_fingerprint = "base"
    assert await by_hand.manager.can_resume(job_id)
    await by_hand.manager.resume(job_id)
    await by_hand.until(job_id, "running")


@pytest.mark.parametrize("trained", [False, True])
async def test_a_job_of_another_base_does_not_go_on_after_a_restart(tmp_path: Path, trained: bool) -> None:
    """One that has not trained is read again, for the base that is served then."""
    world = World(tmp_path, steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 3", "every: 1")
    await world.until(job.id, "running")
    await world.settle()
    if trained:
        await world.step()
    await world.crash()
    world.base_fingerprint = "another"
    await world.start()
    if trained:
        failed = await world.until(job.id, "failed")
        assert failed.error is not None
        assert failed.error.code == "base_model_changed"
    else:
        await world.until(job.id, "running")
    await world.stop(0.0)


async def test_a_failed_job_whose_files_were_deleted_is_not_resumed(by_hand: World) -> None:
    job_id = by_hand.manager.new_id()
    folder = by_hand.manager.directories.incoming(job_id)
    folder.mkdir(parents=True)
    (folder / "000-a.jsonl").write_text("{}\n")
    file = JobFile(name="a.jsonl", stored_as="000-a.jsonl", bytes=3)
    recipe = b"name: a\nsteps: 6\nevery: 2\ndata: a.jsonl"
    await by_hand.manager.submit(JobSubmission(id=job_id, recipe=recipe, files=(file,)))
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    await by_hand.step(3)
    by_hand.runs.current.fail("nan_loss")
    failed = await by_hand.until(job_id, "failed")
    assert await by_hand.manager.can_resume(job_id)
    store, uploads = by_hand.manager.store, by_hand.manager.directories.uploads(job_id)
    # Noted to be deleted, then deleted.
    await store.prune(
        job_id, [by_hand.manager.directories.relative(uploads)], ended_before=(failed.finished_at or 0.0) + 1.0
    )
    assert uploads.exists()
    with pytest.raises(Conflict) as noted:
        await store.resume(job_id, base="base", at_once=False, max_running=1)
    assert not await by_hand.manager.can_resume(job_id)
    with pytest.raises(Conflict) as gone:
        await by_hand.manager.resume(job_id)
    assert not uploads.exists()
    assert (noted.value.code, gone.value.code) == ("files_deleted", "files_deleted")
    assert (await store.get(job_id)).state == "failed"


@pytest.mark.parametrize("trained", [False, True])
async def test_the_adapter_to_go_on_from_stays_for_a_job_that_can_be_resumed(by_hand: World, trained: bool) -> None:
    job = await by_hand.submit("name: a", "steps: 6", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    origin = by_hand.manager.directories.folder(job.id) / ORIGIN
    origin.mkdir()
    if trained:
        await by_hand.step(3)
    by_hand.runs.current.fail("nan_loss")
    failed = await by_hand.until(job.id, "failed")
    await by_hand.settle()
    assert origin.exists() == trained
    if trained:
        store, end = by_hand.manager.store, (failed.finished_at or 0.0) + 1.0
        await store.prune(job.id, [], ended_before=end, checkpoints=[2])
        assert await store.discards() == [by_hand.manager.directories.relative(origin)]


async def test_two_jobs_do_not_make_one_adapter_at_a_time(by_hand: World) -> None:
    job_id = await failed_job(by_hand)
    other = await by_hand.submit("name: A", "steps: 1")
    await by_hand.until(other.id, "running")
    await by_hand.settle()
    with pytest.raises(Conflict, match="is making an adapter") as caught:
        await by_hand.manager.resume(job_id)
    assert caught.value.code == "adapter_name_in_use"
    await by_hand.manager.cancel(other.id)
    await by_hand.step()
    await by_hand.until(other.id, "cancelled")
    await by_hand.manager.resume(job_id)
    await by_hand.until(job_id, "running")


async def test_other_ends_are_for_good(world: World) -> None:
    job = await world.submit("name: a", "steps: 2")
    await world.until(job.id, "succeeded")
    with pytest.raises(Conflict, match="paused or has failed"):
        await world.manager.resume(job.id)
