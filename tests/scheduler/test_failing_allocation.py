"""Fault 15: the k-th allocation of a block fails, for every k. Nothing leaks, and the others do not notice."""

import itertools

import pytest

from runtime.blocks import BlockManager, SwapSpace
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.policies import POLICIES, make_policy
from runtime.support import failpoints
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, run, solo


def attempt(policy: str, at: int, swap: SwapSpace | None) -> bool:
    """A busy scenario (forks, preemptions, drafts) whose `at`-th allocation fails; False when there were fewer."""
    scheduler = Scheduler(
        BlockManager(9, 2),
        make_policy(policy),
        SchedulerSettings(max_batched_tokens=8, max_running=4, max_waiting=100),
        speculation=Speculation(3, max_running=3, min_acceptance=0.0),
        swap=swap,
    )
    worker = ToyWorker(2)
    requests = [make_request(str(n), [n % 3, 1, n % 2], 6, priority=-n, tenant=str(n % 2)) for n in range(5)]
    requests += [
        make_request(f"fork{n}", requests[0].submission.prompt_ids, 6, fork_of=requests[0].id) for n in range(2)
    ]
    failpoints.configure(f"blocks.take=raise:{at}")
    try:
        for request in requests:
            scheduler.submit(request)
        run(scheduler, worker)
        reached = failpoints._passed["blocks.take"] >= at
    finally:
        failpoints.configure("")
    assert scheduler.blocks.num_free == 9
    assert swap is None or swap.num_free == swap.num_blocks
    failed = [request for request in requests if request.finish_reason == "error"]
    assert len(failed) <= 1
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, len(request.tokens))
        assert request in failed or len(request.tokens) == request.max_len
    return reached


@pytest.mark.parametrize("host", [0, 20])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_leak_at_any_k(policy: str, host: int) -> None:
    tried = next(at for at in itertools.count(1) if not attempt(policy, at, SwapSpace(host) if host else None))
    assert tried > 20
