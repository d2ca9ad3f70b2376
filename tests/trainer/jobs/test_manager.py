"""The life of jobs, over a run that steps when it is told to."""

import asyncio
import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import Conflict, InvalidRequest, StorageUnavailable, TooManyRequests
from runtime.events import ProgressEvent
from runtime.trainer.jobs.records import JobError, JobEvent, JobSubmission
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


async def test_what_is_under_way_is_stored_and_told(by_hand: World) -> None:
    job = await by_hand.submit("name: shop", "steps: 3")
    await by_hand.until(job.id, "running")
    await by_hand.settle()

    def under_way(step: int, fraction: float, left: float | None) -> ProgressEvent:
        return ProgressEvent(
            step=step, total_steps=3, activity="train", fraction=fraction, seconds=9.0, seconds_left=left
        )

    by_hand.runs.current.emit(under_way(0, 0.25, None))
    by_hand.runs.current.emit(under_way(0, 0.5, 90.0))
    await by_hand.settle()
    _, progress = await by_hand.manager.store.describe(job.id)
    assert (progress.step, progress.fraction, progress.step_seconds) == (0, 0.5, None)
    assert 80 < (progress.finish or 0) - time.time() <= 90
    await by_hand.step()
    _, progress = await by_hand.manager.store.describe(job.id)
    assert (progress.step, progress.fraction, progress.finish, progress.step_seconds) == (1, None, None, 2.0)
    by_hand.runs.current.emit(under_way(1, 0.1, 3700.0))
    await by_hand.settle()
    _, progress = await by_hand.manager.store.describe(job.id)
    assert (progress.step, progress.fraction, progress.loss) == (1, 0.1, 1.0)
    _, events = await by_hand.manager.store.events(job.id, after=0, limit=100)
    assert [event.message for event in events if event.kind == "progress"] == [
        "Step 1 of 3 is 25% done.",
        "Step 1 of 3 is 50% done; about 1 min 30 s left.",
        "Step 2 of 3 is 10% done; about 1 h 1 min left.",
    ]
    assert [row["step"] for row in await by_hand.manager.store.metrics(job.id, after=0, limit=10)] == [1]


async def test_how_far_the_reading_of_the_data_is(world: World) -> None:
    """In the job while it is validating, and among its events; what comes too late for its job is dropped."""
    world.preparer.hold = True
    submission = JobSubmission(id=world.manager.new_id(), recipe=b"name: shop\nreads: 1234")
    job, _ = await world.manager.submit(submission, patience=0.0)
    async with asyncio.timeout(10):
        while (await world.manager.store.describe(job.id))[1].rows_read is None:
            await world.settle()
    job, progress = await world.manager.store.describe(job.id)
    assert (job.state, progress.rows_read) == ("validating", 1234)
    world.preparer.hold = False
    await world.until(job.id, "succeeded")
    job, progress = await world.manager.store.describe(job.id)
    assert progress.rows_read is None
    _, events = await world.manager.store.events(job.id, after=0, limit=100)
    told = [event for event in events if event.kind == "reading"]  # once here, and once when it started
    assert {event.message for event in told} == {"Read 1,234 rows so far, 4,321 tokens."}
    assert told[0].data["tokens"] == 4321
    refused = JobSubmission(id=world.manager.new_id(), recipe=b"reads: 5")
    with pytest.raises(InvalidRequest, match="missing"):
        await world.manager.submit(refused)


async def test_warnings_of_a_plan_are_events(world: World) -> None:
    job = await world.submit("name: shop", "warning: all steps are warmup")
    await world.until(job.id, "succeeded")
    _, events = await world.manager.store.events(job.id, after=0, limit=100)
    messages = [(event.level, event.message) for event in events]
    at = messages.index(("warning", "all steps are warmup"))
    assert messages[at + 1][1].startswith("The recipe is valid")


async def test_names_of_jobs_differ_in_more_than_case(by_hand: World) -> None:
    await by_hand.submit("name: shop")
    with pytest.raises(Conflict, match="is making an adapter `SHOP` already"):
        await by_hand.submit("name: SHOP")


async def test_from_recipe_to_adapter(world: World) -> None:
    job = await world.submit("name: shop", "steps: 3")
    assert (job.name, job.total_steps) == ("shop", 3)
    done = await world.until(job.id, "succeeded")
    assert done.adapter == "shop@1"
    assert done.created_at <= (done.started_at or 0) <= (done.finished_at or 0)
    assert await world.statuses(job.id) == [
        "validating", "queued", "running", "evaluating", "publishing", "succeeded",
    ]  # fmt: skip
    assert world.publisher.published == [
        {
            "name": "shop",
            "weights": "weights of step 3",
            "step": 3,
            "metrics": {
                "step": 3, "train_loss": pytest.approx(1 / 3), "train_accuracy": 0.5, "eval_loss": 0.5,
                "eval_accuracy": 0.75,
            },
        }
    ]  # fmt: skip
    assert [event.step for event in world.meters.steps] == [1, 2, 3]
    assert world.meters.counts["succeeded"] == 1
    assert world.runs.current.closed


async def test_checkpoints_can_be_asked_for_while_the_job_runs(by_hand: World) -> None:
    offered = by_hand.publisher.offered
    job = await by_hand.submit("name: a", "steps: 7", "every: 2", "keep: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step()
    assert offered == {"a": {}}
    await by_hand.step(3)
    assert offered == {"a": {2: "weights of step 2", 4: "weights of step 4"}}
    await by_hand.step(2)
    assert list(offered["a"]) == [4, 6]
    await by_hand.step()
    await by_hand.until(job.id, "succeeded")
    await by_hand.settle()
    assert offered == {"a": {}}


async def test_a_job_that_stands_still_offers_nothing_until_it_goes_on(by_hand: World) -> None:
    offered = by_hand.publisher.offered
    job = await by_hand.submit("name: a", "steps: 9", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step(2)
    await by_hand.manager.pause(job.id)
    await by_hand.step()
    await by_hand.until(job.id, "paused")
    await by_hand.settle()
    assert offered == {"a": {}}
    await by_hand.manager.resume(job.id)
    await by_hand.settle()
    assert list(offered["a"]) == [2, 3]
    await by_hand.manager.cancel(job.id)
    await by_hand.step()
    await by_hand.until(job.id, "cancelled")
    await by_hand.settle()
    assert offered == {"a": {}}


async def test_what_a_restart_finds_is_offered_again(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 9", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step(2)
    await by_hand.crash()
    by_hand.publisher.offered.clear()
    await by_hand.start()
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.settle()
    assert by_hand.publisher.offered == {"a": {2: "weights of step 2"}}


async def test_a_library_that_refuses_checkpoints_is_not_the_job_s_fault(world: World) -> None:
    async def refuse(**asked: object) -> None:
        raise StorageUnavailable("broken")

    world.publisher.offer = refuse  # type: ignore[method-assign]
    job = await world.submit("name: a", "steps: 3", "every: 1")
    assert (await world.until(job.id, "succeeded")).adapter == "a@1"


async def test_what_a_run_reported_can_be_read(world: World) -> None:
    job = await world.submit("name: a", "steps: 5")
    await world.until(job.id, "succeeded")
    _, events = await world.manager.store.events(job.id, after=0, limit=1000)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    rows = await world.manager.store.metrics(job.id, after=2, limit=100)
    assert [(row["type"], row["step"]) for row in rows] == [("step", 3), ("step", 4), ("step", 5), ("eval", 5)]
    whole, some = [await world.manager.store.thinned_metrics(job.id, limit=limit) for limit in (5, 2)]
    assert (whole.steps, whole.evaluations, some.steps, some.evaluations) == (5, 1, 5, 1)
    assert whole.rows == await world.manager.store.metrics(job.id, after=-1, limit=100)
    assert [(row["type"], row["step"]) for row in some.rows] == [("step", 2), ("step", 5), ("eval", 5)]
    _, progress = await world.manager.store.describe(job.id)
    assert (progress.step, progress.trained_tokens, progress.step_seconds) == (5, 50, 2.0)
    await world.settle()
    log = world.manager.directories.log(job.id).read_text().splitlines()
    assert [json.loads(line)["number"] for line in log] == list(range(1, len(events) + 1))


async def test_a_gate_that_is_not_passed_publishes_nothing(world: World) -> None:
    job = await world.submit("name: a", "good: no")
    done = await world.until(job.id, "succeeded")
    assert done.adapter is None
    assert world.publisher.published == []
    _, events = await world.manager.store.events(job.id, after=0, limit=1000)
    assert "not published: train_loss is" in events[-1].message


async def test_one_at_a_time_in_order(by_hand: World) -> None:
    first = await by_hand.submit("name: a", "steps: 1")
    second = await by_hand.submit("name: b", "steps: 1")
    third = await by_hand.submit("name: c", "steps: 1")
    for job in (first, second, third):
        await by_hand.until(job.id, "running")
        await by_hand.settle()
        assert by_hand.meters.counts["running"] == 1
        await by_hand.step()
        await by_hand.until(job.id, "succeeded")
    assert [job_id for job_id, _ in by_hand.runs.started] == [first.id, second.id, third.id]


async def test_a_wrong_recipe_is_told_and_leaves_nothing(world: World) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        await world.submit("steps: 3")
    assert await world.manager.store.page(after=None, limit=10, states=()) == ([], False)
    assert list(world.manager.directories.root.iterdir()) == []


async def test_a_log_does_not_come_back_after_its_job(world: World) -> None:
    """The journal has read the events of a job whose recipe then turns out to be wrong."""
    store, forgotten = world.manager.store, asyncio.Event()
    world.preparer.hold = True
    read = store.events_after

    async def read_slowly(job_id: str, after: int, limit: int) -> list[JobEvent]:
        events = await read(job_id, after, limit)
        world.preparer.hold = False
        await forgotten.wait()
        return events

    store.events_after = read_slowly  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="name"):
        await world.submit("steps: 3")
    forgotten.set()
    await world.settle()
    assert list(world.manager.directories.root.iterdir()) == []


async def test_a_wrong_recipe_that_nobody_waits_for_is_a_failed_job(world: World) -> None:
    world.preparer.hold = True
    from runtime.trainer.jobs.records import JobSubmission

    job, _ = await world.manager.submit(JobSubmission(id=world.manager.new_id(), recipe=b"x"), patience=0.01)
    assert job.state == "validating"
    world.preparer.hold = False
    failed = await world.until(job.id, "failed")
    assert failed.error == JobError("invalid_request_error", "name: missing.", "name")


async def test_cancelling_while_the_recipe_is_read(world: World) -> None:
    world.preparer.hold = True
    submitting = asyncio.create_task(world.submit("name: a"))
    await world.settle()
    (job, _), *_ = (await world.manager.store.page(after=None, limit=1, states=()))[0]
    assert (await world.manager.cancel(job.id)).state == "cancelled"
    world.preparer.hold = False
    assert (await submitting).state == "cancelled"
    assert world.runs.started == []


async def test_a_name_is_in_use_until_its_job_ends(by_hand: World) -> None:
    first = await by_hand.submit("name: a", "steps: 1")
    with pytest.raises(Conflict, match=first.id) as raised:
        await by_hand.submit("name: a")
    assert (raised.value.param, raised.value.code) == ("name", "adapter_name_in_use")
    await by_hand.until(first.id, "running")
    await by_hand.settle()
    await by_hand.step()
    await by_hand.until(first.id, "succeeded")
    await by_hand.submit("name: a")


async def test_a_full_queue(tmp_path: Path) -> None:
    world = World(tmp_path, steps_itself=False, max_waiting=2)
    await world.start()
    running = await world.submit("name: a")
    await world.until(running.id, "running")
    await world.submit("name: b")
    await world.submit("name: c")
    with pytest.raises(TooManyRequests, match="2 jobs"):
        await world.submit("name: d")
    await world.stop(0.0)


async def test_an_idempotency_key_makes_one_job(by_hand: World) -> None:
    first = await by_hand.submit("name: a", idempotency_key="k")
    again = await by_hand.submit("name: a", idempotency_key="k")
    assert again.id == first.id
    with pytest.raises(Conflict) as raised:
        await by_hand.submit("name: b", idempotency_key="k")
    assert raised.value.code == "idempotency_key_reused"
    assert len((await by_hand.manager.store.page(after=None, limit=10, states=()))[0]) == 1


async def test_the_same_key_twice_at_once_is_one_job(world: World) -> None:
    jobs = await asyncio.gather(*(world.submit("name: a", idempotency_key="k") for _ in range(5)))
    assert len({job.id for job in jobs}) == 1
    assert world.preparer.calls <= 2  # to check it, and to run it


async def test_cancelling(by_hand: World) -> None:
    running = await by_hand.submit("name: a")
    queued = await by_hand.submit("name: b")
    await by_hand.until(running.id, "running")
    await by_hand.settle()
    assert (await by_hand.manager.cancel(queued.id)).state == "cancelled"
    marked = await by_hand.manager.cancel(running.id)
    assert (marked.state, marked.wanted) == ("running", "cancel")
    await by_hand.manager.cancel(running.id)  # twice is fine
    await by_hand.step()
    await by_hand.until(running.id, "cancelled")
    for job in (running, queued):
        for action in (by_hand.manager.cancel, by_hand.manager.pause, by_hand.manager.resume):
            with pytest.raises(Conflict, match="cancelled"):
                await action(job.id)
    assert by_hand.publisher.published == []


async def test_pausing_and_going_on_with_the_same_run(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 4")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.manager.pause(job.id)
    await by_hand.step()
    await by_hand.until(job.id, "paused")
    assert [c.step for c in await by_hand.manager.store.checkpoints(job.id)] == [1]
    await by_hand.settle()
    assert (await by_hand.manager.resume(job.id)).state == "running"
    await by_hand.settle()
    await by_hand.step(3)
    await by_hand.until(job.id, "succeeded")
    assert len(by_hand.runs.started) == 1


async def test_a_paused_job_lets_others_go_first_and_goes_on_from_its_checkpoint(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 4")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step()
    await by_hand.manager.pause(job.id)
    await by_hand.step()
    await by_hand.until(job.id, "paused")
    other = await by_hand.submit("name: b", "steps: 1")
    await by_hand.until(other.id, "running")
    await by_hand.settle()
    assert by_hand.runs.runs[0].closed
    assert (await by_hand.manager.resume(job.id)).state == "queued"
    await by_hand.step()
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    assert by_hand.runs.started == [(job.id, 0), (other.id, 0), (job.id, 2)]
    await by_hand.step(2)
    await by_hand.until(job.id, "succeeded")


async def test_cancelling_a_paused_job_lets_its_run_go(by_hand: World) -> None:
    job = await by_hand.submit("name: a")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.manager.pause(job.id)
    await by_hand.step()
    await by_hand.until(job.id, "paused")
    await by_hand.settle()
    await by_hand.manager.cancel(job.id)
    assert by_hand.runs.current.closed


async def test_a_run_that_fails(by_hand: World) -> None:
    job = await by_hand.submit("name: a")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    by_hand.runs.current.fail("nan_loss")
    failed = await by_hand.until(job.id, "failed")
    assert failed.error == JobError("nan_loss", "The loss is not a number.")
    assert by_hand.publisher.published == []


async def test_a_publisher_that_refuses_fails_the_job(world: World) -> None:
    world.publisher.error = Conflict("That name is taken.", param="name", code="taken")
    failed = await world.until((await world.submit("name: a")).id, "failed")
    assert failed.error == JobError("taken", "That name is taken.", "name")


async def test_a_bug_fails_the_job_without_telling_its_text(world: World) -> None:
    world.publisher.error = LookupError("/secret/path")
    job = await world.submit("name: a")
    failed = await world.until(job.id, "failed")
    assert failed.error is not None
    assert failed.error.code == "internal_error"
    assert "secret" not in failed.error.message
    world.publisher.error = None
    await world.until((await world.submit("name: b")).id, "succeeded")


async def test_a_full_disk_at_a_checkpoint_fails_the_job_and_keeps_the_one_before(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 9", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step(3)
    by_hand.runs.disk_error = OSError(errno.ENOSPC, "No space left on device")
    await by_hand.step()
    failed = await by_hand.until(job.id, "failed")
    assert failed.error is not None
    assert failed.error.code == "disk_full"
    assert by_hand.runs.current.closed
    folder = by_hand.manager.directories.checkpoint(job.id, 2)
    assert (folder / "step").read_text() == "2"
    assert [path.name for path in folder.parent.iterdir()] == ["step-2"]
    by_hand.runs.disk_error = None
    other = await by_hand.submit("name: b", "steps: 1")
    await by_hand.until(other.id, "running")


async def test_old_checkpoints_go(world: World) -> None:
    job = await world.submit("name: a", "steps: 9", "every: 1", "keep: 2")
    await world.until(job.id, "succeeded")
    assert [c.step for c in await world.manager.store.checkpoints(job.id)] == [7, 8]
    folder = world.manager.directories.checkpoint(job.id, 8).parent
    assert sorted(path.name for path in folder.iterdir()) == ["step-7", "step-8"]


@pytest.mark.parametrize("recipe", ["name: a", "steps: 3"])
@pytest.mark.parametrize("crashed", [True, False])
async def test_what_was_refused_on_a_full_disk_is_no_job_of_the_next_process(
    world: World, monkeypatch: pytest.MonkeyPatch, recipe: str, crashed: bool
) -> None:
    """Its row was stored before the disk was full, and could not be deleted any more."""

    async def full(*_: Any) -> None:
        raise StorageUnavailable("The server cannot store this now: database or disk is full.")

    monkeypatch.setattr(world.manager.store, "accept", full)
    monkeypatch.setattr(world.manager.store, "remove", full)
    with pytest.raises(StorageUnavailable if recipe == "name: a" else InvalidRequest):
        await world.submit(recipe)
    assert len((await world.manager.store.page(after=None, limit=10, states=()))[0]) == 1
    await (world.crash() if crashed else world.stop())
    calls = world.preparer.calls
    await world.start()
    assert await world.manager.store.page(after=None, limit=10, states=()) == ([], False)
    assert list(world.manager.directories.root.iterdir()) == []
    assert not (world.path / "lost+found").exists()
    assert world.preparer.calls == calls
    await world.until((await world.submit("name: a")).id, "succeeded")


async def test_what_was_refused_on_a_full_disk_goes_when_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.trainer.jobs.store.RETRY", 0.01)
    store, room = world.manager.store, False
    remove = store.remove

    async def removes(job_id: str) -> None:
        if not room:
            raise StorageUnavailable("The server cannot store this now: database or disk is full.")
        await remove(job_id)

    monkeypatch.setattr(store, "remove", removes)
    with pytest.raises(InvalidRequest):
        await world.submit("steps: 3")
    room = True
    for _ in range(1000):
        jobs, _ = await store.page(after=None, limit=10, states=())
        if not jobs and not list(world.manager.directories.root.iterdir()):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("it is still there")


async def test_a_full_database_takes_no_job(world: World) -> None:
    pages = await world.database.call(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    await world.database.call(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    with pytest.raises(StorageUnavailable):
        await world.submit("name: a", "x" * 100_000)
    assert list(world.manager.directories.root.iterdir()) == []
    await world.database.call(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall())
    assert (await world.manager.store.page(after=None, limit=10, states=()))[0] == []
    await world.until((await world.submit("name: a")).id, "succeeded")
