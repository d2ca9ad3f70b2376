"""Models that look back only so far: what the window has passed is free for others."""

import pytest

from runtime.blocks import BlockManager
from runtime.scheduler import Scheduler
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import Ahead, ToyWorker, make_request, solo, step


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_long_outputs_hold_no_more_than_the_window(window: int, ahead: bool) -> None:
    """The toy reads its tokens from the window's blocks only, so one that was given back too early would show."""
    scheduler = Scheduler(
        BlockManager(40, 4),
        make_policy("fcfs"),
        SchedulerSettings(max_batched_tokens=16, max_running=4, max_waiting=10),
        sliding_window=window,
    )
    worker = ToyWorker(4, window=window)
    requests = [make_request(str(n), [n % 3, 1], 60) for n in range(4)]
    for request in requests:
        scheduler.submit(request)
    driver = Ahead(scheduler, worker)
    for _ in range(30):
        driver.step() if ahead else step(scheduler, worker)
    most = -(-window // 4) + 1 + ahead
    assert all(len(request.table.held) <= most for request in requests if request.table)
    assert scheduler.blocks.num_free >= 40 - 4 * most
    while driver.busy:
        driver.step() if ahead else step(scheduler, worker)
    scheduler.check_integrity()
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, request.max_len)
