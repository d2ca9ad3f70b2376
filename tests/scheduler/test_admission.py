"""The queue's limits, and how long those who are refused are told to stay away."""

import pytest

from runtime.blocks import BlockManager
from runtime.errors import TooManyRequests
from runtime.scheduler import Scheduler
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, *, waiting: int = 100, tokens: int = 2**20) -> Scheduler:
    return Scheduler(
        BlockManager(64, 4),
        make_policy("fcfs"),
        SchedulerSettings(max_batched_tokens=64, max_running=1, max_waiting=waiting, max_waiting_tokens=tokens),
        clock=clock,
    )


def test_the_queue_is_bounded_in_tokens() -> None:
    scheduler = make(Clock(), tokens=30)
    scheduler.submit(make_request("a", [1] * 10, 1))
    scheduler.submit(make_request("b", [1] * 20, 1))
    with pytest.raises(TooManyRequests, match="30 prompt tokens are waiting, and 1 more would exceed 30"):
        scheduler.submit(make_request("c", [1], 1))
    scheduler.finish(next(iter(scheduler)), "abort")
    scheduler.submit(make_request("c", [1] * 10, 1))
    scheduler.check_integrity()


def test_a_prompt_over_the_limit_may_wait_alone() -> None:
    scheduler = make(Clock(), tokens=30)
    scheduler.submit(make_request("a", [1] * 40, 1))
    with pytest.raises(TooManyRequests):
        scheduler.submit(make_request("b", [1], 1))


def test_retry_after_is_what_half_of_the_queue_takes_at_the_measured_rate() -> None:
    """One request of 8 tokens comes in every two seconds; 20 wait, so half of them need about 20 seconds."""
    clock = Clock()
    scheduler, worker = make(clock, waiting=20), ToyWorker(4)
    for number in range(20):
        scheduler.submit(make_request(str(number), [1] * 8, 2))
    with pytest.raises(TooManyRequests) as first:
        scheduler.check_room(8)
    assert first.value.retry_after == 1  # nothing is known yet
    for number in range(60):
        step(scheduler, worker)
        clock.now += 1.0
        if len(scheduler.waiting) < 20:
            scheduler.submit(make_request(f"more{number}", [1] * 8, 2))
    with pytest.raises(TooManyRequests) as later:
        scheduler.check_room(8)
    assert later.value.retry_after == pytest.approx(20, abs=2)


def test_requests_on_their_way_count() -> None:
    scheduler = make(Clock(), waiting=2)
    scheduler.check_room(1, num_requests=2)
    with pytest.raises(TooManyRequests, match="2 requests are waiting, of at most 2"):
        scheduler.check_room(1, num_requests=3)  # one of them will run
