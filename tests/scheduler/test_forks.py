"""Choices of one prompt: computed once, copied on write, and each as if it had run alone."""

import pytest

from runtime.blocks import BlockManager
from runtime.messages import Move
from runtime.scheduler import Request, Scheduler
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, run, solo, step


def make(*, blocks: int = 64, running: int = 8, caching: bool = True, budget: int = 64) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 4, prefix_caching=caching),
        make_policy("fcfs"),
        SchedulerSettings(max_batched_tokens=budget, max_running=running, max_waiting=100),
    )


def submit(scheduler: Scheduler, count: int, prompt: list[int], more: int) -> list[Request]:
    leader = make_request("0", prompt, more)
    requests = [leader, *(make_request(str(n), prompt, more + n, fork_of=leader.id) for n in range(1, count))]
    for request in requests:
        scheduler.submit(request)
    return requests


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 13, 16])
def test_a_prompt_is_computed_once_for_all_choices(length: int, caching: bool) -> None:
    scheduler, worker = make(caching=caching, budget=8), ToyWorker(4)
    requests = submit(scheduler, 5, [n % 3 for n in range(length)], 6)
    assert scheduler.waiting.num_deferred == 4
    run(scheduler, worker)
    outputs = sum(request.num_generated for request in requests)
    assert worker.num_computed == length + 4 + outputs - 5  # the others compute the last token of it only
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, request.max_len)
        assert request.timing.cached_tokens == (length - 1 if request.submission.fork_of else 0)


def test_full_blocks_are_shared_and_the_last_one_is_copied() -> None:
    scheduler, worker = make(), ToyWorker(4)
    requests = submit(scheduler, 3, [1] * 10, 20)
    step(scheduler, worker)
    plan = step(scheduler, worker)
    tables = [request.table.blocks for request in requests if request.table]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert plan.moves == [Move("copy", tables[0][2], tables[1][2]), Move("copy", tables[0][2], tables[2][2])]
    assert scheduler.blocks.num_free == 64 - 2 - 3
    scheduler.check_integrity()
    run(scheduler, worker)


@pytest.mark.parametrize("end", ["abort", "error"])
def test_followers_go_their_own_way_when_the_leader_ends_early(end: str) -> None:
    scheduler, worker = make(budget=4), ToyWorker(4)
    requests = submit(scheduler, 3, [1] * 10, 3)
    step(scheduler, worker)  # a part of the prompt
    scheduler.finish(requests[0], end)  # type: ignore[arg-type]
    assert scheduler.waiting.num_deferred == 0
    run(scheduler, worker)
    assert [request.tokens for request in requests[1:]] == [solo([1] * 10, 14), solo([1] * 10, 15)][-2:]


def test_a_leader_that_is_gone_before_its_followers_come_in() -> None:
    """It ended with its first token, while there was no slot for the others: the prefix cache has its full blocks."""
    scheduler, worker = make(running=1), ToyWorker(4)
    requests = submit(scheduler, 2, [1] * 10, 1)
    run(scheduler, worker)
    assert requests[1].timing.cached_tokens == 8
    assert requests[1].tokens == solo([1] * 10, 12)


def test_a_follower_can_be_aborted_while_it_waits() -> None:
    scheduler, worker = make(budget=4), ToyWorker(4)
    requests = submit(scheduler, 3, [1] * 10, 3)
    step(scheduler, worker)
    scheduler.finish(requests[1], "abort")
    scheduler.check_integrity()
    run(scheduler, worker)
    assert requests[2].finish_reason == "length"


def test_another_prompt_is_no_fork() -> None:
    """A hook may have rewritten one of the choices."""
    scheduler, worker = make(), ToyWorker(4)
    leader = make_request("0", [1] * 10, 3)
    other = make_request("1", [2] * 10, 3, fork_of=leader.id)
    scheduler.submit(leader)
    scheduler.submit(other)
    assert scheduler.waiting.num_deferred == 0
    run(scheduler, worker)
    assert other.tokens == solo([2] * 10, 13)


def test_forks_in_a_small_pool_are_preempted_and_end_the_same() -> None:
    scheduler, worker = make(blocks=8, running=4), ToyWorker(4)
    requests = submit(scheduler, 4, [1, 2, 0, 1, 2], 16)
    run(scheduler, worker)
    assert scheduler.num_preemptions > 0
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, request.max_len)
