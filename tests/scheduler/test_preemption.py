"""Preemption is bounded, changes nothing in any output, and never stands still (faults 13 and 14)."""

import pytest

from runtime.blocks import BlockManager
from runtime.scheduler import Scheduler
from runtime.scheduler.policies import POLICIES, make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, run, solo, step


def make(policy: str, *, blocks: int, running: int, cap: int = 4) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 2),
        make_policy(policy),
        SchedulerSettings(max_batched_tokens=16, max_running=running, max_waiting=1000, max_preemptions=cap),
    )


@pytest.mark.parametrize("cap", [1, 2, 4])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_pool_of_three_blocks_finishes_everything_with_the_same_output(policy: str, cap: int) -> None:
    """Six tokens of room for five requests that want all of it: two at a time fit at first, one at the end."""
    scheduler, worker = make(policy, blocks=3, running=5, cap=cap), ToyWorker(2)
    requests = [make_request(str(n), [n % 3], 5, tenant=str(n % 2), priority=n % 2) for n in range(5)]
    for request in requests:
        scheduler.submit(request)
    steps = run(scheduler, worker)
    assert scheduler.num_preemptions > 0
    assert steps < 5 * 5 * (cap + 2)
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, 6)
        assert request.timing.preemptions <= cap


def test_at_the_cap_a_request_holds_all_it_will_ever_need() -> None:
    scheduler, worker = make("priority", blocks=10, running=2, cap=1), ToyWorker(2)
    low = make_request("low", [1, 2], 10, priority=9)
    scheduler.submit(low)
    step(scheduler, worker)
    high = [make_request(str(n), [0], 2, priority=0) for n in range(2)]
    for request in high:
        scheduler.submit(request)
    step(scheduler, worker)
    assert low.timing.preemptions == 1
    while low.table is None:
        step(scheduler, worker)
    assert len(low.table.blocks) == 6  # for twelve tokens, although it has three
    for number in range(4):
        scheduler.submit(make_request(f"more{number}", [0], 4, priority=0))
    step(scheduler, worker)
    assert low.slot is not None  # not again
    run(scheduler, worker)
    assert low.timing.preemptions == 1


def test_long_holders_and_a_burst() -> None:
    """Old requests that hold most of the pool, and forty short ones at once: all end, in a bounded number of steps,
    nobody is preempted more often than the cap, and the burst does not wait for the long ones to end."""
    scheduler, worker = make("fcfs", blocks=40, running=16, cap=2), ToyWorker(2)
    holders = [make_request(f"long{n}", [n % 3] * 4, 30) for n in range(4)]
    for request in holders:
        scheduler.submit(request)
    for _ in range(5):
        step(scheduler, worker)
    burst = [make_request(f"burst{n}", [n % 3, 1, n % 2], 3) for n in range(40)]
    for request in burst:
        scheduler.submit(request)
    steps = run(scheduler, worker)
    assert max(request.timing.preemptions for request in [*holders, *burst]) <= 2
    assert steps < 200
    first_of_burst = min(request.timing.finished or 0.0 for request in burst)
    assert first_of_burst < min(request.timing.finished or 0.0 for request in holders)
    for request in [*holders, *burst]:
        assert request.tokens == solo(request.submission.prompt_ids, request.max_len)
