"""What the scheduler itself costs: plan and commit, without a model.

python -m benchmarks.scheduler                             256 running, from 100 to 100,000 waiting, every policy
python -m benchmarks.scheduler --policy fair --running 64  one policy, a smaller batch

A step decodes all running sequences, while some end and others come in: the work of a server under full load.
Prints the median and the 99th percentile in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from runtime.blocks import BlockManager
from runtime.messages import SamplingParams, StepPlan, StepResult, Submission
from runtime.scheduler import Request, Scheduler
from runtime.scheduler.policies import POLICIES, make_policy
from settings.schema import SchedulerSettings

PROMPT, OUTPUT = 200, 200
"""Tokens of each request, about what chats have."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scheduler", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, default=256, help="sequences in the batch (default: 256)")
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000], help="queue lengths")
    parser.add_argument("--policy", nargs="+", default=sorted(POLICIES), choices=sorted(POLICIES))
    parser.add_argument("--steps", type=int, default=400, help="steps to measure (default: 400)")
    given = parser.parse_args(argv)
    table = Table("policy", "waiting", "median ms", "99% ms", title=f"plan + commit, {given.running} running")
    for policy in given.policy:
        for waiting in given.waiting:
            times = measure(policy, running=given.running, waiting=waiting, steps=given.steps)
            slow = statistics.quantiles(times, n=100)[-1]
            table.add_row(policy, f"{waiting:,}", f"{statistics.median(times):.3f}", f"{slow:.3f}")
    Console().print(table)
    return 0


def measure(policy: str, *, running: int, waiting: int, steps: int) -> list[float]:
    """Milliseconds of plan and commit for each of `steps` steps with the batch and the queue full."""
    scheduler = Scheduler(
        BlockManager(running * (PROMPT + OUTPUT + 16) // 16, 16),
        make_policy(policy),
        SchedulerSettings(
            max_batched_tokens=2048,
            max_running=running,
            max_waiting=running + waiting + 1,
            max_waiting_tokens=(running + waiting + 1) * PROMPT,
        ),
    )
    made = 0
    while made < running + waiting:
        scheduler.submit(_request(made))
        made += 1
    for _ in range(running * PROMPT // 2048 + OUTPUT):  # past the crowd at the start
        made += _step(scheduler, made)[1]
    times = []
    for _ in range(steps):
        milliseconds, ended = _step(scheduler, made)
        made += ended
        times.append(milliseconds)
    return times


def _step(scheduler: Scheduler, made: int) -> tuple[float, int]:
    """One step's time in milliseconds, and how many requests ended in it; as many new ones come after them."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    planned = time.perf_counter() - start
    result = _execute(plan)
    start = time.perf_counter()
    committed = scheduler.commit(plan, result)
    spent = planned + time.perf_counter() - start
    ended = [item.request for item in committed if len(item.request.tokens) >= item.request.max_len]
    for number, request in enumerate(ended):
        scheduler.finish(request, "length")
        scheduler.submit(_request(made + number))
    return spent * 1000, len(ended)


def _execute(plan: StepPlan) -> StepResult:
    slots = [row.slot for row in plan.rows if row.sample]
    return StepResult(step=plan.step, slots=slots, tokens=[7] * len(slots))


def _request(number: int) -> Request:
    """Prompts differ in their first token, so nothing is shared; outputs differ in length, so ends are spread."""
    submission = Submission(
        request_id=str(number),
        prompt_ids=[number, *range(PROMPT - 1)],
        params=SamplingParams(),
        priority=0,
        tenant=str(number % 10),
        deadline=time.monotonic() + 3600.0 + number,
    )
    return Request(submission, seed=0, max_len=PROMPT + OUTPUT // 2 + number * 37 % (OUTPUT // 2))


if __name__ == "__main__":
    raise SystemExit(main())
