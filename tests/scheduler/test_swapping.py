"""Preempted sequences kept in a second pool: what is copied when, and that nothing is computed twice."""

import pytest

from runtime.blocks import BlockManager, SwapSpace
from runtime.messages import Move
from runtime.scheduler import Scheduler
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import Ahead, ToyWorker, make_request, run, solo, step


def make(host: int, *, blocks: int = 4, caching: bool = False, running: int = 2) -> tuple[Scheduler, SwapSpace]:
    space = SwapSpace(host)
    scheduler = Scheduler(
        BlockManager(blocks, 2, prefix_caching=caching),
        make_policy("priority"),
        SchedulerSettings(max_batched_tokens=32, max_running=running, max_waiting=100),
        swap=space,
    )
    return scheduler, space


def test_out_before_and_in_after_others_write_there() -> None:
    scheduler, space = make(4)
    worker = ToyWorker(2)
    low = make_request("low", [1, 2, 0, 1, 2], 3, priority=1)
    scheduler.submit(low)
    step(scheduler, worker)
    assert low.table is not None
    held = list(low.table.blocks)
    high = make_request("high", [2, 2, 1, 0, 0], 2, priority=0)
    scheduler.submit(high)
    plan = scheduler.schedule()
    copies = [Move("out", block, target) for block, target in zip(held, low.saved_blocks or [], strict=True)]
    assert plan.moves == copies
    assert low.num_saved == 5  # of six tokens that are known, the last one is not computed
    scheduler.commit(plan, worker.execute(plan))
    assert space.num_free == 1
    assert (scheduler.counts.swapped_out, scheduler.counts.swapped_in, scheduler.num_swapped) == (3, 0, 3)
    computed = worker.num_computed
    plan = step(scheduler, worker)  # the last of `high`
    plan = scheduler.schedule()
    assert [move.kind for move in plan.moves] == ["in"] * 3
    assert [(row.start, row.count) for row in plan.rows] == [(5, 1)]
    scheduler.commit(plan, worker.execute(plan))
    run(scheduler, worker)
    assert worker.num_computed == computed + 1 + 2
    assert low.tokens == solo(low.submission.prompt_ids, 8)
    assert high.tokens == solo(high.submission.prompt_ids, 7)
    assert space.num_free == 4
    assert (scheduler.counts.swapped_out, scheduler.counts.swapped_in, scheduler.num_swapped) == (3, 3, 0)


@pytest.mark.parametrize(("host", "kept"), [(2, None), (3, 3)])
def test_without_room_it_is_computed_again(host: int, kept: int | None) -> None:
    scheduler, space = make(host)
    worker = ToyWorker(2)
    low = make_request("low", [1, 2, 0, 1, 2], 3, priority=1)
    scheduler.submit(low)
    step(scheduler, worker)
    scheduler.submit(make_request("high", [2, 2, 1, 0, 0], 2, priority=0))
    step(scheduler, worker)
    assert (low.saved_blocks and len(low.saved_blocks)) == kept
    run(scheduler, worker)
    assert low.tokens == solo(low.submission.prompt_ids, 8)
    assert space.num_free == host


def test_what_is_still_cached_is_not_copied_back() -> None:
    scheduler, _ = make(4, caching=True, running=1)
    worker = ToyWorker(2)
    low = make_request("low", [1, 2, 0, 1, 2], 3, priority=1)
    scheduler.submit(low)
    step(scheduler, worker)
    scheduler.submit(make_request("high", [2, 0], 1, priority=0))  # takes one block of four, and one is free
    step(scheduler, worker)
    assert low.saved_blocks is not None
    plan = scheduler.schedule()
    assert [move.kind for move in plan.moves] == ["in"]
    scheduler.commit(plan, worker.execute(plan))
    assert low.num_written == 6
    assert (scheduler.counts.swapped_out, scheduler.counts.swapped_in) == (3, 1)


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_leaves_while_it_is_out_gives_its_room_back(ahead: bool) -> None:
    scheduler, space = make(8)
    worker = ToyWorker(2)
    driver = Ahead(scheduler, worker)
    low = make_request("low", [1, 2, 0, 1, 2], 3, priority=1)
    scheduler.submit(low)
    for _ in range(2):
        driver.step() if ahead else step(scheduler, worker)
    scheduler.submit(make_request("high", [2, 2, 1, 0, 0], 9, priority=0, limit=8))
    driver.step() if ahead else step(scheduler, worker)
    assert space.num_free < 8
    scheduler.finish(low, "abort")
    assert space.num_free == 8
    scheduler.check_integrity()
