"""A process that ends between any two steps of a checkpoint leaves the one before or the new one, whole."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.jobs.fakes import World

ROOT = Path(__file__).parents[3]
EXITED = 70
"""What the failpoint `exit` leaves with."""

MAIN = """
import asyncio, sys
from pathlib import Path
from tests.trainer.jobs.fakes import World

async def main():
    world = World(Path(sys.argv[1]), steps_itself=False)
    await world.start()
    job = await world.submit("name: a", "steps: 6", "every: 2", "keep: 1")
    await world.until(job.id, "running")
    await world.settle()
    while True:
        await world.step()

asyncio.run(main())
"""

POINTS = (
    "checkpoint.before_write",
    "checkpoint.after_write",
    "checkpoint.after_sync",
    "checkpoint.after_rename",
    "checkpoint.after_parent_sync",
    "checkpoint.after_commit",
    "checkpoint.after_drop",
)


def crash_at(point: str, time: int, state: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EFT_FAILPOINTS": f"{point}=exit:{time}"}
    done = subprocess.run([sys.executable, "-c", MAIN, str(state)], env=environment, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == EXITED


async def go_on(state: Path) -> tuple[list[int], int, str | None]:
    """Finish the job in a next process: the checkpoints that were there, the step it resumed from, and the result."""
    world = World(state)
    await world.start()
    (job, _), *_ = (await world.manager.store.page(after=None, limit=1, states=()))[0]
    steps = [checkpoint.step for checkpoint in await world.manager.store.checkpoints(job.id)]
    folder = world.manager.directories.checkpoint(job.id, 0).parent
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    assert present == [f"step-{step}" for step in steps], "every row has its directory, and the other way round"
    for step in steps:
        assert (folder / f"step-{step}" / "step").read_text() == str(step)
    done = await world.until(job.id, "succeeded")
    started = world.runs.started
    await world.stop()
    assert len(started) <= 1
    return steps, started[0][1] if started else -1, done.adapter


# The points are passed at step 2, at step 4, and for the result; nothing is dropped before step 4.
@pytest.mark.parametrize("point", POINTS)
def test_a_checkpoint_is_there_whole_or_not_at_all(point: str, tmp_path: Path) -> None:
    first_drop = point == "checkpoint.after_drop"
    crash_at(point, 1 if first_drop else 2, tmp_path)
    steps, resumed_from, adapter = asyncio.run(go_on(tmp_path))
    committed = point in ("checkpoint.after_commit", "checkpoint.after_drop")
    assert steps == ([2, 4] if point == "checkpoint.after_commit" else [4] if committed else [2])
    assert resumed_from == (4 if committed else 2)
    assert adapter == "a@1"


@pytest.mark.parametrize("point", ["checkpoint.after_write", "checkpoint.after_parent_sync", "checkpoint.after_commit"])
def test_the_result_is_there_whole_or_trained_again(point: str, tmp_path: Path) -> None:
    crash_at(point, 3, tmp_path)
    steps, resumed_from, adapter = asyncio.run(go_on(tmp_path))
    assert steps == [4]
    assert resumed_from == (-1 if point == "checkpoint.after_commit" else 4)
    assert adapter == "a@1"
