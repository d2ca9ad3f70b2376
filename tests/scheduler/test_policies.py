"""Who goes first under each policy. The clock is a number that the tests move."""

import re
from pathlib import Path
from typing import Any

import pytest

from runtime.blocks import BlockManager
from runtime.scheduler import Request, RequestState, Scheduler
from runtime.scheduler.policies import POLICIES, Fair, make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, run


class Bench:
    """A scheduler with a worker, whose steps take a second each."""

    def __init__(
        self, policy: str, *, running: int = 1, blocks: int = 64, budget: int = 64, preemptions: int = 4
    ) -> None:
        self.now = 100.0
        self.policy = make_policy(policy)
        self.scheduler = Scheduler(
            BlockManager(blocks, 4),
            self.policy,
            SchedulerSettings(
                max_batched_tokens=budget, max_running=running, max_waiting=1000, max_preemptions=preemptions
            ),
            clock=lambda: self.now,
        )
        self.worker = ToyWorker(4)
        self.count = 0
        self.new_token_ids: list[Request] = []
        """Requests that the scheduler has ended by itself."""

    def submit(self, *, length: int = 4, more: int = 4, **fields: object) -> Request:
        self.count += 1
        prompt = [self.count + 2] * length
        request = make_request(f"r{self.count}", prompt, more, arrival=self.now, **fields)
        self.scheduler.submit(request)
        return request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        result = self.worker.execute(plan)
        self.now += 1.0
        for item in self.scheduler.commit(plan, result):
            if not item.tokens:
                self.new_token_ids.append(item.request)
            elif len(item.request.tokens) >= item.request.max_len:
                self.scheduler.finish(item.request, "length")

    def order_of_ends(self, requests: list[Request]) -> list[int]:
        """Run to the end; the indices of `requests` in the order in which they finished."""
        order: list[int] = []
        while len(self.scheduler):
            self.step()
            order += [i for i, request in enumerate(requests) if request.finished and i not in order]
        return order


def test_the_policy_of_the_documentation_takes_the_shortest_prompt_first(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Ranked" in block)
    names: dict[str, Any] = {}
    exec(compile(code, "extending.md", "exec"), names)
    monkeypatch.setitem(POLICIES, "shortest", names["ShortestPrompt"])
    bench = Bench("shortest")
    requests = [bench.submit(length=length) for length in (9, 3, 6)]
    assert bench.order_of_ends(requests) == [1, 2, 0]


def test_an_unknown_policy_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ValueError, match="deadline, fair, fcfs, priority"):
        make_policy("lifo")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_equals_run_in_order_of_arrival(policy: str) -> None:
    bench = Bench(policy)
    assert bench.order_of_ends([bench.submit() for _ in range(5)]) == [0, 1, 2, 3, 4]


def test_priority_lower_first_and_ties_by_arrival() -> None:
    bench = Bench("priority")
    requests = [bench.submit(priority=priority) for priority in (2, 1, 1, 0)]
    assert bench.order_of_ends(requests) == [3, 1, 2, 0]


def test_priority_takes_a_slot_at_once_and_the_victim_resumes_from_the_cache() -> None:
    bench = Bench("priority", running=2)
    low = [bench.submit(length=9, more=30, priority=5), bench.submit(length=9, more=30, priority=6)]
    bench.step()
    high = bench.submit(priority=0)
    bench.step()
    assert high.state is RequestState.RUNNING
    assert low[0].state is RequestState.RUNNING
    assert low[1].state is RequestState.PREEMPTED  # the worse of the two
    while not high.finished:
        bench.step()
    queries, hits = bench.scheduler.counts.prefix_queries, bench.scheduler.counts.prefix_hits
    bench.step()
    assert low[1].state is RequestState.RUNNING
    assert bench.scheduler.counts.prefix_queries - queries == len(low[1].tokens) - 1
    assert bench.scheduler.counts.prefix_hits - hits == 8  # two full blocks of four; a hit counts after preemption too
    assert low[1].timing.cached_tokens == 0  # what the client is told is about its prompt


def test_priority_does_not_preempt_equals() -> None:
    bench = Bench("priority")
    first, second = bench.submit(priority=1), bench.submit(priority=1)
    bench.step()
    bench.step()
    assert first.state is RequestState.RUNNING
    assert second.state is RequestState.WAITING


def test_priority_preempts_for_blocks_as_well_but_only_if_that_helps() -> None:
    bench = Bench("priority", running=4, blocks=6)
    better = bench.submit(length=8, more=4, priority=0)
    worse = bench.submit(length=8, more=4, priority=9)
    bench.step()  # two blocks each for the prompts; the next step takes a third each
    bench.step()
    hopeful = bench.submit(length=16, more=1, priority=5)  # four blocks: the three of `worse` are not enough
    bench.step()
    assert worse.state is RequestState.RUNNING
    assert hopeful.state is RequestState.WAITING
    bench.scheduler.finish(hopeful, "abort")
    modest = bench.submit(length=9, more=1, priority=5)
    bench.step()
    assert worse.state is RequestState.PREEMPTED
    assert modest.finished
    assert not better.finished or better.finish_reason == "length"
    run(bench.scheduler, bench.worker)
    assert better.timing.preemptions == 0


def test_prompts_of_better_rank_get_the_budget_first() -> None:
    bench = Bench("priority", running=4, budget=8)
    low = bench.submit(length=30, priority=5)
    bench.step()
    high = bench.submit(length=30, priority=0)
    bench.step()
    bench.step()
    assert (low.num_computed, high.num_computed) == (8, 16)
    bench.scheduler.finish(high, "abort")
    both = [bench.submit(length=7, priority=5), bench.submit(length=7, priority=0)]
    assert bench.order_of_ends(both)[0] == 1


def test_deadline_earliest_first_and_none_last() -> None:
    bench = Bench("deadline")
    requests = [bench.submit(deadline=deadline) for deadline in (None, 900.0, 500.0, None)]
    assert bench.order_of_ends(requests) == [2, 1, 0, 3]
    assert all(request.finish_reason == "length" for request in requests)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_deadline_is_kept_to_under_every_policy(policy: str) -> None:
    """Running or waiting: when the time is over the request ends, and the commit after that tells of it."""
    bench = Bench(policy)
    running = bench.submit(more=100, deadline=102.5)
    waiting = bench.submit(more=100, deadline=102.5)
    for _ in range(4):
        bench.step()
    assert set(bench.new_token_ids) == {running, waiting}
    assert len(bench.new_token_ids) == 2
    assert {running.finish_reason, waiting.finish_reason} == {"timeout"}
    assert running.num_generated == 3
    assert waiting.timing.scheduled is None
    bench.scheduler.check_integrity()


def test_hopeless_requests_are_shed_before_they_cost_anything() -> None:
    bench = Bench("deadline")
    first = bench.submit(more=10)
    while not first.finished:
        bench.step()  # learns: a step takes a second, an output has ten tokens
    hopeless, feasible = (
        bench.submit(more=10, deadline=bench.now + 5),
        bench.submit(more=10, deadline=bench.now + 30),
    )
    computed = bench.worker.num_computed
    assert bench.order_of_ends([hopeless, feasible]) == [0, 1]
    assert hopeless.finish_reason == "timeout"
    assert hopeless.timing.scheduled is None
    assert feasible.finish_reason == "length"
    assert bench.worker.num_computed - computed == 4 + 9  # the feasible one's alone
    short = bench.submit(more=4, deadline=bench.now + 5)  # asks for less than the usual ten
    assert bench.order_of_ends([short]) == [0]
    assert short.finish_reason == "length"


def test_nothing_is_hopeless_before_anything_was_measured() -> None:
    bench = Bench("deadline")
    request = bench.submit(more=2, deadline=bench.now + 2.5)
    assert bench.order_of_ends([request]) == [0]
    assert request.finish_reason == "length"


def test_a_deadline_takes_the_place_of_one_without() -> None:
    bench = Bench("deadline")
    patient = bench.submit(more=20)
    bench.step()
    urgent = bench.submit(deadline=bench.now + 50)
    bench.step()
    assert patient.state is RequestState.PREEMPTED
    later = bench.submit(deadline=bench.now + 40)
    bench.step()
    assert urgent.state is RequestState.RUNNING  # has a deadline of its own to miss
    assert later.state is RequestState.WAITING


def test_fair_alternates_between_tenants_whatever_they_queue() -> None:
    bench = Bench("fair")
    greedy = [bench.submit(tenant="greedy") for _ in range(6)]
    modest = [bench.submit(tenant="modest") for _ in range(2)]
    order = bench.order_of_ends([*greedy, *modest])
    assert order.index(6) <= 1  # the first of the modest one is not behind the whole crowd
    assert order.index(7) <= 4


def test_fair_by_weight() -> None:
    """A weight of 3 gets three times the service, give or take a request of each."""
    policy = Fair({"a": 3.0})
    scheduler = Scheduler(
        BlockManager(64, 4), policy, SchedulerSettings(max_batched_tokens=64, max_running=2, max_waiting=1000)
    )
    worker = ToyWorker(4)
    for number in range(200):
        scheduler.submit(make_request(str(number), [3, 4, 5, 6], 6, tenant="ab"[number % 2]))
    got = {"a": 0, "b": 0}
    for _ in range(160):
        plan = scheduler.schedule()
        for item in scheduler.commit(plan, worker.execute(plan)):
            got[item.request.submission.tenant] += len(item.tokens)
            if len(item.request.tokens) >= item.request.max_len:
                scheduler.finish(item.request, "length")
    assert got["a"] == pytest.approx(3 * got["b"], abs=4 * 6)
    assert policy.counter("a") == pytest.approx(policy.counter("b"), abs=4 + 2 * 6)


def test_fair_does_not_let_the_idle_save_up() -> None:
    bench = Bench("fair")
    busy = [bench.submit(tenant="busy") for _ in range(10)]
    for _ in range(20):
        bench.step()
    done = sum(request.finished for request in busy)
    back = [bench.submit(tenant="back") for _ in range(10)]
    order = bench.order_of_ends([*busy, *back])[done:]
    first = order[:6]
    assert 2 <= sum(index >= len(busy) for index in first) <= 4  # about half, not all
