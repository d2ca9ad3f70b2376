"""Failed jobs that are resumed: from their newest checkpoint, as long as it is kept."""

import errno

import pytest

from runtime.errors import Conflict
from tests.trainer.jobs.fakes import World

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
