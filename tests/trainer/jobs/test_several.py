"""Several jobs at work: how many, in which order, and each with its own end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.trainer.jobs.execution import Execution
from tests.trainer.jobs.fakes import FakeRun, World

pytestmark = pytest.mark.anyio


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[World]:
    """Up to three jobs, which step when a test says so."""
    world = World(tmp_path, steps_itself=False, max_running=3)
    await world.start()
    yield world
    await world.stop(0.0)


def run_of(world: World, job_id: str) -> FakeRun:
    return next(run for run in reversed(world.runs.runs) if run.job_id == job_id)


async def step(world: World, job_id: str, count: int = 1) -> None:
    for _ in range(count):
        run_of(world, job_id).step()
        await world.settle()


async def test_as_many_as_the_settings_say_are_at_work(three: World) -> None:
    jobs = [await three.submit(f"name: {name}", "steps: 2") for name in "abcde"]
    for job in jobs[:3]:
        await three.until(job.id, "running")
    await three.settle()
    assert three.meters.counts["running"] == 3
    await step(three, jobs[1].id, 2)
    await three.until(jobs[1].id, "succeeded")
    await three.until(jobs[3].id, "running")
    await three.settle()
    assert [job_id for job_id, _ in three.runs.started] == [job.id for job in jobs[:4]]
    assert three.meters.counts["queued"] == 1


async def test_each_reports_pauses_and_ends_for_itself(three: World) -> None:
    first, second, third = [await three.submit(f"name: {name}", "steps: 4") for name in "abc"]
    for job in (first, second, third):
        await three.until(job.id, "running")
    await three.settle()
    await three.manager.pause(second.id)
    await step(three, second.id)
    await three.until(second.id, "paused")
    run_of(three, third.id).fail("nan_loss")
    assert (await three.until(third.id, "failed")).error is not None
    await step(three, first.id, 2)
    assert (await three.manager.store.get(first.id)).state == "running"
    await three.settle()
    assert (await three.manager.resume(second.id)).state == "running"
    await three.settle()
    await three.manager.cancel(first.id)
    await step(three, first.id)
    await three.until(first.id, "cancelled")
    await step(three, second.id, 3)
    assert (await three.until(second.id, "succeeded")).adapter == "b@1"
    assert len(three.runs.started) == 3, "the paused run went on"


async def test_a_job_that_is_resumed_while_it_tidies_up_has_one_run(
    three: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is paused before its loggers have ended, and there is room for another run."""
    job, other = [await three.submit(f"name: {name}", "steps: 4") for name in "ab"]
    for one in (job, other):
        await three.until(one.id, "running")
    released, end = asyncio.Event(), Execution._end_loggers

    async def slowly(self: Execution) -> None:
        await released.wait()
        await end(self)

    monkeypatch.setattr(Execution, "_end_loggers", slowly)
    await three.settle()
    await three.manager.pause(job.id)
    run_of(three, job.id).step()
    await three.until(job.id, "paused")
    resumed = asyncio.create_task(three.manager.resume(job.id))
    await asyncio.sleep(0.05)
    assert not resumed.done()
    released.set()
    await resumed
    await three.settle()
    assert len(three.manager._working) == len(three.manager._at_work) == 2


async def test_a_job_that_starts_while_another_tidies_up_releases_its_run(
    three: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused run is kept only as long as no other job is to start."""
    released, end = asyncio.Event(), Execution._end_loggers

    async def slowly(self: Execution) -> None:
        if self.id == job.id:
            await released.wait()
        await end(self)

    monkeypatch.setattr(Execution, "_end_loggers", slowly)
    job = await three.submit("name: a", "steps: 4")
    await three.until(job.id, "running")
    await three.settle()
    await three.manager.pause(job.id)
    run_of(three, job.id).step()
    await three.until(job.id, "paused")
    other = await three.submit("name: b", "steps: 4")
    await three.until(other.id, "running")
    released.set()
    await three.settle()
    assert three.manager._parked == {}
    assert run_of(three, job.id).closed
    assert (await three.manager.resume(job.id)).state == "queued"
    await three.until(job.id, "running")
    await three.settle()
    assert [step for _, step in three.runs.started] == [0, 0, 1]  # it goes on from its checkpoint


async def test_a_higher_priority_starts_first(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False)
    await world.start()
    running = await world.submit("name: a", "steps: 1")
    await world.until(running.id, "running")
    await world.submit("name: b", "job_priority: -1")
    await world.submit("name: c")
    urgent = await world.submit("name: d", "job_priority: 2")
    await world.settle()
    await step(world, running.id)
    await world.until(urgent.id, "running")
    await world.settle()
    assert [job_id for job_id, _ in world.runs.started] == [running.id, urgent.id]
    await world.stop(0.0)


async def test_a_job_waits_until_its_memory_is_there(three: World) -> None:
    """The fake engine has 1000 bytes for jobs at work together; one alone may take more."""
    large = await three.submit("name: a", "steps: 1", "memory_bytes: 1200")
    await three.until(large.id, "running")
    small = await three.submit("name: b", "steps: 1", "memory_bytes: 400")
    later = await three.submit("name: c", "steps: 1", "memory_bytes: 600")
    last = await three.submit("name: d", "steps: 1", "memory_bytes: 100")
    await three.settle()
    assert [(await three.manager.store.get(job.id)).state for job in (small, later, last)] == ["queued"] * 3
    _, events = await three.manager.store.events(small.id, after=0, limit=100)
    assert [event.message for event in events if "memory" in event.message] == [
        "Waits for memory: it takes 0 MiB beside 0 MiB of the jobs at work, and these may take 0 MiB together."
    ]
    await step(three, large.id)
    for job in (small, later):
        await three.until(job.id, "running")
    await three.settle()
    assert (await three.manager.store.get(last.id)).state == "queued"
    await step(three, small.id)
    await three.until(last.id, "running")


async def test_launched_jobs_wait_for_their_devices_and_take_no_memory(three: World) -> None:
    first = await three.submit("name: a", "steps: 1", "launched: yes", "memory_bytes: 5000")
    second = await three.submit("name: b", "steps: 1", "launched: yes", "memory_bytes: 5000")
    third = await three.submit("name: c", "steps: 1", "memory_bytes: 900")
    for job in (first, third):
        await three.until(job.id, "running")
    await three.settle()
    assert (await three.manager.store.get(second.id)).state == "queued"
    await step(three, first.id)
    await three.until(second.id, "running")


@pytest.mark.parametrize("crashes", [False, True])
async def test_all_go_on_after_the_process_has_ended(tmp_path: Path, crashes: bool) -> None:
    world = World(tmp_path, steps_itself=False, max_running=4)
    await world.start()
    jobs = [await world.submit(f"name: {name}", "steps: 6", "every: 2") for name in "abcd"]
    for job in jobs:
        await world.until(job.id, "running")
    await world.settle()
    for index, job in enumerate(jobs):
        await step(world, job.id, index + 1)
    if crashes:
        await world.crash()
    else:
        stopping = asyncio.create_task(world.stop())
        await asyncio.sleep(0.05)
        for job in jobs:
            run_of(world, job.id).step()
        await stopping
    following = World(tmp_path, max_running=4)
    await following.start()
    for job in jobs:
        assert (await following.until(job.id, "succeeded")).adapter is not None
    assert dict(following.runs.started) == {
        job.id: (index + 1) // 2 * 2 if crashes else index + 2 for index, job in enumerate(jobs)
    }
    await following.stop()
