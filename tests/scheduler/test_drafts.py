"""Guesses ahead: looked up rightly, verified exactly, given up where they do not pay."""

import random

import pytest

from runtime.blocks import BlockManager
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.drafts import PAUSE, Drafter
from runtime.scheduler.policies import make_policy
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, make_request, run, solo

RULES = Speculation(num_tokens=4, max_running=4, min_acceptance=0.3)


def make(rules: Speculation | None = RULES, *, blocks: int = 200, budget: int = 64) -> Scheduler:
    return Scheduler(
        BlockManager(blocks, 4),
        make_policy("fcfs"),
        SchedulerSettings(max_batched_tokens=budget, max_running=8, max_waiting=100),
        speculation=rules,
    )


def test_what_followed_last_time_is_guessed() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]
    assert Drafter(RULES).propose(tokens, 4) == [5, 9, 1, 2]  # after the later of two occurrences
    assert Drafter(RULES).propose(tokens, 2) == [5, 9]
    assert Drafter(RULES).propose(tokens[:-2], 4) == [2, 3, 5, 9]
    assert Drafter(RULES).propose([1, 2, 3, 4], 4) == []
    assert Drafter(RULES).propose([7, 7, 7, 7, 7], 4) == [7]
    assert Drafter(RULES).propose([1], 4) == []


def test_lookup_agrees_with_a_plain_search() -> None:
    """The oracle compares lists; large ids make bytes of one token look like parts of others."""

    def plain(tokens: list[int]) -> list[int]:
        for length in range(min(4, len(tokens) - 1), 1, -1):
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == tokens[-length:]:
                    return tokens[start + length : start + length + 4]
        return []

    rng = random.Random(0)
    for ids in ([0, 1], [0, 1, 256, 65536, 257], list(range(6))):
        for _ in range(50):
            drafter, tokens = Drafter(RULES), [rng.choice(ids)]
            for _ in range(30):
                tokens.append(rng.choice(ids))
                assert drafter.propose(tokens, 4) == plain(tokens)


def test_low_acceptance_pauses_and_then_tries_again() -> None:
    drafter, tokens = Drafter(RULES), [1, 2, 3] * 10
    for _ in range(8):
        assert drafter.propose(tokens, 4)
        drafter.learn(4, 0, len(tokens))
        if not drafter.propose(tokens, 4):
            break
    assert drafter.propose(tokens, 4) == []
    tokens += [1, 2, 3] * (PAUSE // 3 + 1)
    assert drafter.propose(tokens, 4)


@pytest.mark.parametrize("vocab", [2, 3, 5])
def test_outputs_are_the_same_with_and_without(vocab: int) -> None:
    rng = random.Random(vocab)
    prompts = [[rng.randrange(vocab) for _ in range(rng.randrange(1, 20))] for _ in range(4)]
    scheduler, worker = make(), ToyWorker(4, vocab=vocab)
    requests = [make_request(str(n), prompt, 40) for n, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.submit(request)
    run(scheduler, worker)
    assert scheduler.counts.drafted > 0
    assert scheduler.counts.accepted > 0
    for request in requests:
        assert request.tokens == solo(request.submission.prompt_ids, request.max_len, vocab=vocab)


def test_right_guesses_save_steps() -> None:
    """With a vocabulary of one token every guess is right: five tokens a step once there is something to repeat."""
    steps = {}
    for rules in (None, RULES):
        scheduler = make(rules)
        scheduler.submit(make_request("a", [0, 0, 0, 0, 0, 0, 0], 50))
        steps[rules] = run(scheduler, ToyWorker(4, vocab=1))
    assert steps[None] == 50
    assert steps[RULES] < 30


def test_a_large_batch_does_not_guess() -> None:
    scheduler, worker = make(), ToyWorker(4, vocab=1)
    for number in range(5):
        scheduler.submit(make_request(str(number), [0] * 8, 10))
    run(scheduler, worker)
    assert scheduler.counts.drafted == 0


def test_rejected_guesses_are_never_found_by_others() -> None:
    """A second request with the first one's tokens finds its blocks, and in them what was really computed."""
    scheduler, worker = make(Speculation(4, max_running=4, min_acceptance=0.0)), ToyWorker(4, vocab=2)
    first = make_request("a", [0, 1, 1, 0, 1, 0, 0, 1], 80)
    scheduler.submit(first)
    run(scheduler, worker)
    assert 0 < scheduler.counts.accepted < scheduler.counts.drafted
    second = make_request("b", first.tokens, 10)
    scheduler.submit(second)
    run(scheduler, worker)
    assert second.timing.cached_tokens > 80
    assert second.tokens == solo(first.tokens, second.max_len, vocab=2)


def test_guesses_never_preempt_and_never_exceed_the_budget_or_the_length() -> None:
    scheduler, worker = make(blocks=6, budget=5), ToyWorker(4, vocab=1)
    requests = [make_request(str(number), [0] * 4, 8) for number in range(2)]
    for request in requests:
        scheduler.submit(request)
    while len(scheduler):
        plan = scheduler.schedule()
        assert plan.num_tokens <= 5
        for item in scheduler.commit(plan, worker.execute(plan)):
            assert len(item.request.tokens) <= item.request.max_len
            if len(item.request.tokens) == item.request.max_len:
                scheduler.finish(item.request, "length")
    assert scheduler.num_preemptions == 0
