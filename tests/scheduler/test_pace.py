"""Prompts in chunks beside streams that have a target: a machine whose steps take a known time."""

import random
from collections.abc import Callable

import pytest

from runtime.blocks import BlockManager
from runtime.messages import SamplingParams, StepResult, Submission
from runtime.scheduler import Request, Scheduler
from runtime.scheduler.pace import MIN_PROMPT_TOKENS
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings

Cost = Callable[[int, int, float], float]
"""Seconds of a step, by streams, tokens of prompts and the sum of the tokens before each of these."""


class Machine:
    """A scheduler, and steps that take what `cost` says."""

    def __init__(self, cost: Cost, target: float | None, *, budget: int = 512) -> None:
        self.cost = cost
        self.now = 0.0
        settings = SchedulerSettings(max_batched_tokens=budget, tpot_target=target)
        self.scheduler = Scheduler(BlockManager(4096, 16), make_policy("fcfs"), settings, clock=lambda: self.now)
        self._submitted = 0

    def submit(self, length: int) -> Request:
        self._submitted += 1
        ids = [self._submitted] * length
        submission = Submission(request_id=str(self._submitted), prompt_ids=ids, params=SamplingParams(ignore_eos=True))
        request = Request(submission, seed=0, max_len=length + 4000)
        self.scheduler.submit(request)
        return request

    def step(self) -> tuple[float, int]:
        """Seconds of a step, and its tokens of prompts."""
        plan = self.scheduler.schedule()
        prompts = [row for row in plan.rows if row.count > 1]
        depth = sum(row.count * (row.start + row.count / 2) for row in prompts)
        tokens = sum(row.count for row in prompts)
        seconds = self.cost(len(plan.rows) - len(prompts), tokens, depth)
        self.now += seconds
        slots = [row.slot for row in plan.rows if row.sample]
        self.scheduler.commit(plan, StepResult(step=plan.step, slots=slots, tokens=[9] * len(slots)))
        return seconds, tokens

    def serve(self, prompts: int, length: int) -> list[tuple[float, int]]:
        """A stream that was there for a while, then prompts: the steps until all of these are computed."""
        self.submit(8)
        for _ in range(40):
            self.step()
        waiting = [self.submit(length) for _ in range(prompts)]
        steps = []
        while any(request.num_generated == 0 for request in waiting):
            steps.append(self.step())
        return steps


def usual(streams: int, tokens: int, depth: float) -> float:
    """10 ms, and 0.4 ms a token, of 4,000 tokens of context 0.8."""
    return 0.010 + 0.0002 * streams + 0.0004 * tokens + 0.0001 * depth / 1000


def share_late(steps: list[tuple[float, int]], target: float) -> float:
    return sum(seconds > target for seconds, _ in steps) / len(steps)


def test_a_stream_keeps_its_target_and_prompts_get_the_rest() -> None:
    steps = Machine(usual, 0.050).serve(4, 6000)
    assert share_late(steps, 0.050) <= 0.05
    assert sum(seconds for seconds, _ in steps) / len(steps) > 0.8 * 0.050
    assert sum(tokens for _, tokens in steps) >= 4 * 5999


def test_steps_that_vary_leave_a_reserve() -> None:
    noise = random.Random(3)
    machine = Machine(lambda *work: usual(*work) * noise.uniform(0.8, 1.25), 0.050)
    steps = machine.serve(4, 6000)
    assert share_late(steps, 0.050) <= 0.08
    assert sum(seconds for seconds, _ in steps) / len(steps) > 0.5 * 0.050


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_change_of_the_load_is_learned_within_a_second(factor: float) -> None:
    machine = Machine(usual, 0.050)
    machine.submit(8)
    machine.submit(60_000)
    while machine.now < 5:
        machine.step()
    machine.cost = lambda streams, tokens, depth: (
        usual(streams, 0, 0) + factor * usual(0, tokens, depth) - 0.010 * factor
    )
    changed = machine.now
    while machine.now < changed + 1:
        machine.step()
    after = [machine.step() for _ in range(20)]
    assert share_late(after, 0.050) <= 0.1
    assert sum(seconds for seconds, _ in after) / 20 > 0.6 * 0.050


@pytest.mark.parametrize(("target", "streams"), [(None, 1), (0.050, 0)])
def test_without_a_target_or_a_stream_prompts_fill_the_step(target: float | None, streams: int) -> None:
    machine = Machine(usual, target)
    for _ in range(streams):
        machine.submit(8)
        machine.step()
    machine.submit(3000)
    assert [machine.step()[1] for _ in range(5)] == [512 - streams] * 5


def test_prompts_go_on_where_no_chunk_is_small_enough() -> None:
    steps = Machine(usual, 0.005).serve(2, 300)
    assert {tokens for _, tokens in steps[:-2]} <= {MIN_PROMPT_TOKENS, 300 % MIN_PROMPT_TOKENS}
    assert len(steps) <= 2 * 300 // MIN_PROMPT_TOKENS + 4


def test_what_is_decided_is_counted() -> None:
    """Chunks, and the steps that they made late: not those that were late without them."""
    machine = Machine(usual, 0.050)
    steps = machine.serve(1, 3000)
    counts = machine.scheduler.counts
    chunks = [(seconds, tokens) for seconds, tokens in steps if tokens]
    assert (counts.paced_steps, counts.paced_tokens) == (len(chunks), sum(tokens for _, tokens in chunks))
    assert counts.late_steps == sum(seconds > 0.050 for seconds, _ in chunks)
    machine.cost = lambda *work: 2 * usual(*work)
    machine.submit(600)
    before = counts.late_steps
    late = [machine.step() for _ in range(3)]
    assert counts.late_steps - before == sum(seconds > 0.050 for seconds, _ in late) > 0
    assert machine.scheduler.prompt_reserve > 0
    hopeless = Machine(usual, 0.005)
    hopeless.serve(1, 300)
    assert hopeless.scheduler.counts.late_steps == 0
    assert hopeless.scheduler.counts.paced_steps > 10


def test_more_streams_leave_less_to_prompts() -> None:
    """What a step takes without prompts is known by the number of streams."""
    machine = Machine(lambda streams, tokens, depth: 0.010 + 0.001 * streams + 0.0004 * tokens, 0.050)
    for _ in range(30):
        machine.submit(8)
    for _ in range(60):
        machine.step()
    machine.submit(6000)
    steps = [machine.step() for _ in range(60)]
    assert share_late(steps, 0.050) <= 0.05
    assert 10 < steps[-1][1] < 30
