"""What goes into a step, in small cases worked out by hand (blocks of 4 tokens)."""

import pytest

from runtime.blocks import BlockManager
from runtime.errors import Conflict, TooManyRequests
from runtime.messages import SamplingParams, StepPlan, StepResult, Submission
from runtime.scheduler import Request, RequestState, Scheduler
from runtime.scheduler.policies import make_policy
from runtime.scheduler.request import TRANSITIONS
from settings.schema import SchedulerSettings


def make_scheduler(*, blocks: int = 64, budget: int = 16, chunk: int | None = None, running: int = 4) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 4),
        make_policy("fcfs"),
        SchedulerSettings(max_batched_tokens=budget, max_prefill_chunk=chunk, max_running=running, max_waiting=3),
    )


def submit(scheduler: Scheduler, name: str, length: int, first: int = 0) -> Request:
    ids = list(range(first, first + length))
    request = Request(
        Submission(request_id=name, prompt_ids=ids, params=SamplingParams()), seed=0, max_len=length + 100
    )
    scheduler.submit(request)
    return request


def step(scheduler: Scheduler, *, failed: dict[int, str] | None = None) -> StepPlan:
    plan = scheduler.schedule()
    slots = [row.slot for row in plan.rows if row.sample]
    result = StepResult(step=plan.step, slots=slots, tokens=[1000 + plan.step] * len(slots), failed=failed or {})
    scheduler.commit(plan, result)
    return plan


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler(budget=8)
    short = submit(scheduler, "short", 3)
    step(scheduler)
    long = submit(scheduler, "long", 20, first=500)
    counts = []
    for _ in range(4):
        plan = step(scheduler)
        counts.append({row.slot: row.count for row in plan.rows})
    assert [c[short.slot] for c in counts] == [1, 1, 1, 1]
    assert [c[long.slot] for c in counts] == [7, 7, 6, 1]


def test_only_the_last_chunk_samples() -> None:
    scheduler = make_scheduler(chunk=5)
    request = submit(scheduler, "a", 12)
    assert [step(scheduler).rows[0].sample for _ in range(3)] == [False, False, True]
    assert len(request.tokens) == 13
    assert request.num_wanted == 1


def test_slots_bound_what_runs() -> None:
    scheduler = make_scheduler(running=2, budget=100)
    requests = [submit(scheduler, str(i), 4, first=100 * i) for i in range(3)]
    assert len(step(scheduler).rows) == 2
    assert requests[2].state is RequestState.WAITING
    scheduler.finish(requests[0], "stop")
    assert {row.slot for row in step(scheduler).rows} == {requests[1].slot, requests[2].slot}


def test_growth_preempts_the_latest_and_it_resumes_from_the_cache() -> None:
    scheduler = make_scheduler(blocks=4)
    first, second = submit(scheduler, "first", 8), submit(scheduler, "second", 8, first=100)
    step(scheduler)  # both prompts: 2 blocks each, the pool is full
    step(scheduler)  # first needs a third block
    assert second.state is RequestState.PREEMPTED
    assert scheduler.num_preemptions == 1
    assert len(first.tokens) == 10
    scheduler.finish(first, "stop")
    plan = step(scheduler)
    assert plan.admitted[0].token_ids == second.tokens[:-1]
    # One of its two full blocks survived (the tail went to `first`), so 4 of 9 tokens are cached.
    assert [(row.start, row.count) for row in plan.rows] == [(4, 5)]
    assert second.timing.preemptions == 1


def test_a_full_queue_and_a_twin_id_are_refused() -> None:
    scheduler = make_scheduler()
    twin = submit(scheduler, "a", 4)
    with pytest.raises(Conflict):
        scheduler.submit(Request(twin.submission, seed=0, max_len=8))
    submit(scheduler, "b", 4)
    submit(scheduler, "c", 4)
    with pytest.raises(TooManyRequests, match="3 requests"):
        submit(scheduler, "d", 4)


def test_a_failed_row_ends_alone() -> None:
    scheduler = make_scheduler()
    bad, good = submit(scheduler, "bad", 4), submit(scheduler, "good", 4, first=50)
    plan = scheduler.schedule()
    result = StepResult(step=1, slots=[plan.rows[1].slot], tokens=[7], failed={plan.rows[0].slot: "broke"})
    committed = scheduler.commit(plan, result)
    assert [(item.request, item.tokens, item.error) for item in committed] == [
        (bad, [], "broke"),
        (good, [7], None),
    ]
    assert bad.finish_reason == "error"
    assert good.state is RequestState.RUNNING
    scheduler.check_integrity()


@pytest.mark.parametrize("state", ["waiting", "running", "preempted"])
def test_ending_a_request_in_any_state_gives_everything_back(state: str) -> None:
    scheduler = make_scheduler(blocks=4)
    first, second = submit(scheduler, "first", 8), submit(scheduler, "second", 8, first=100)
    victim = {"waiting": second, "running": first, "preempted": second}[state]
    if state != "waiting":
        step(scheduler)
        step(scheduler)
    assert victim.state.value == state
    scheduler.finish(victim, "abort")
    scheduler.finish(victim, "stop")  # ending it again changes nothing
    assert victim.finish_reason == "abort"
    scheduler.check_integrity()
    scheduler.finish(first, "abort")
    scheduler.finish(second, "abort")
    scheduler.check_integrity()
    assert scheduler.blocks.num_free == 4


def test_transitions_outside_the_table_are_refused() -> None:
    for state, allowed in TRANSITIONS.items():
        for target in RequestState:
            request = Request(Submission(request_id="x", prompt_ids=[1], params=SamplingParams()), seed=0, max_len=2)
            request.state = state
            if target in allowed:
                request.move(target)
                assert request.state is target
            else:
                with pytest.raises(RuntimeError, match="cannot go"):
                    request.move(target)
