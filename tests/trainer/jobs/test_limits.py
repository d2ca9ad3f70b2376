"""A disk that is full and descriptors that run out while a job is at work, by the system's own limits."""

import errno
from pathlib import Path

import pytest

from runtime.errors import StorageUnavailable, TooManyRequests
from runtime.support import durable as patience
from runtime.trainer.jobs.records import JobError
from tests.limited import FULL_DISK, NO_DESCRIPTORS, run_limited
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.02))


WORLD = """
import asyncio, sys
from pathlib import Path
import torch
from runtime.support import durable as patience
from runtime.trainer.course import RunProgress, Snapshot
from runtime.support.logs import configure
from settings.schema import ObservabilitySettings
from tests.trainer.jobs import fakes

configure(ObservabilitySettings(log_format="json"), stream=sys.stderr)

class BigSnapshot(fakes.FakeSnapshot):
    # What a real run captures: 4 MB, written by safetensors.
    def write(self, directory):
        super().write(directory)
        Snapshot(progress=RunProgress(step=self.step), parameters={"x": torch.zeros(1 << 20)}, optimizer={}, best=None,
                 write_adapter=lambda path, tensors: None).write(directory)

fakes.FakeSnapshot = BigSnapshot

async def work(world, line):
    job = await world.submit(f"name: {line}", "steps: 9", "every: 2")
    await world.until(job.id, "running")
    await world.settle()
    return job

async def end(world, job):
    while True:
        found = await world.manager.store.get(job.id)
        if found.ended:
            print(found.state, found.error and found.error.code, found.error and found.error.message)
            break
        await world.step()
"""


def test_a_full_disk_at_a_checkpoint_is_named(tmp_path: Path) -> None:
    """The database finds room, safetensors does not: its error is no OSError."""
    main = """
async def main():
    world = fakes.World(Path(sys.argv[1]), steps_itself=False)
    await world.start()
    await end(world, await work(world, "a"))
    print(sorted(path.name for path in (Path(sys.argv[1]) / "jobs").rglob("*.safetensors")))
    await world.stop(0.0)
asyncio.run(main())
"""
    out = run_limited(FULL_DISK.format(size=3_000_000) + WORLD + main, tmp_path)
    assert out.splitlines() == [
        "failed disk_full Cannot write the checkpoint of step 2: File too large.",
        "[]",
    ]


def test_descriptors_that_run_out_at_a_checkpoint_are_waited_for(tmp_path: Path) -> None:
    main = (
        NO_DESCRIPTORS
        + """
async def main():
    world = fakes.World(Path(sys.argv[1]), steps_itself=False)
    await world.start()
    job = await work(world, "a")
    patience.PAUSES = (0.05,) * 200
    last = no_descriptors()
    await world.step(2)
    await asyncio.sleep(0.3)
    print([c.step for c in await world.manager.store.checkpoints(job.id)])
    descriptors()
    await end(world, job)
    patience.PAUSES = (0.05,) * 3
    other = await work(world, "b")
    last = no_descriptors()
    await end(world, other)
    descriptors()
    await world.stop(0.0)
asyncio.run(main())
"""
    )
    out = run_limited(WORLD + main, tmp_path)
    assert out.splitlines() == [
        "[]",
        "succeeded None None",
        "failed too_many_files Cannot write the checkpoint of step 2: Too many open files.",
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EROFS, "storage_read_only"),
        (errno.EMFILE, "too_many_files"),
        (errno.EIO, "checkpoint_failed"),
    ],
)
async def test_what_keeps_a_checkpoint_from_being_written_is_named(by_hand: World, number: int, code: str) -> None:
    job = await by_hand.submit("name: a", "steps: 9", "every: 2")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    by_hand.runs.disk_error = OSError(number, "no", "/secret/path")
    await by_hand.step(2)
    failed = await by_hand.until(job.id, "failed")
    assert failed.error == JobError(code, "Cannot write the checkpoint of step 2: no.")


@pytest.mark.parametrize("where", ["prepare", "publish"])
@pytest.mark.parametrize("passes", [True, False])
async def test_descriptors_that_run_out_elsewhere_are_waited_for_too(by_hand: World, where: str, passes: bool) -> None:
    tries = 0
    port = by_hand.preparer if where == "prepare" else by_hand.publisher
    whole = getattr(port, where)
    calls_before = 1 if where == "prepare" else 0  # the recipe is checked before it is queued

    def scarce(*args: object, **more: object) -> object:
        nonlocal tries
        tries += 1
        if tries > calls_before and (not passes or tries == calls_before + 1):
            raise StorageUnavailable("Too many open files.", cause="too_many_files")
        return whole(*args, **more)

    setattr(port, where, scarce)
    job = await by_hand.submit("name: a", "steps: 1")
    if where == "publish" or passes:
        await by_hand.until(job.id, "running", "failed")
        for _ in range(20):
            await by_hand.settle()
            if by_hand.runs.runs:
                await by_hand.step()
    ended = await by_hand.until(job.id, "succeeded" if passes else "failed")
    assert (ended.error is None) == passes
    if ended.error is not None:
        assert ended.error.code == "too_many_files"
    assert tries == calls_before + (2 if passes else 3)


async def test_an_error_of_the_disk_anywhere_is_no_internal_error(by_hand: World) -> None:
    async def broken(**asked: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    by_hand.publisher.publish = broken  # type: ignore[method-assign, assignment]
    job = await by_hand.submit("name: a", "steps: 1")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    await by_hand.step()
    failed = await by_hand.until(job.id, "failed")
    assert failed.error == JobError("disk_full", "The job cannot go on: No space left on device.")


async def test_a_database_that_is_full_while_a_job_runs_is_named(
    by_hand: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.trainer.jobs.store.RETRY", 0.02)
    job = await by_hand.submit("name: a", "steps: 900", "every: 0")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    pages = await by_hand.database.call(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    await by_hand.database.call(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    for _ in range(300):
        if by_hand.runs.current.closed:
            break
        await by_hand.step()
    assert by_hand.runs.current.closed
    await by_hand.database.call(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall())
    failed = await by_hand.until(job.id, "failed")
    assert failed.error is not None
    assert failed.error.code == "disk_full"


async def test_no_more_recipes_are_received_at_once_than_may_wait(tmp_path: Path) -> None:
    world = World(tmp_path, max_waiting=2)
    await world.start()
    with world.manager.arriving(), world.manager.arriving(), pytest.raises(TooManyRequests), world.manager.arriving():
        pass
    with world.manager.arriving():
        pass
    await world.stop()
