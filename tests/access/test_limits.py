"""Limits of keys: what passes, what waits, and that nothing is kept that should not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.access.keys import KeyLimits, Principal
from runtime.access.limits import Bucket, Limiter, QueueShareFull, Quota, RateLimited, duration
from runtime.errors import InvalidRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def principal(label: str = "tenant", **limits: object) -> Principal:
    return Principal(name=label, label=label, scopes=frozenset({"inference"}), limits=KeyLimits(**limits))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(max_waiting=10, max_running=4, clock=clock)


def enter(limiter: Limiter, who: Principal) -> Quota:
    quota = limiter.enter(who)
    quota.admit()
    return quota


def reserve(quota: Quota, **changes: object) -> None:
    asked: dict[str, object] = {
        "sequences": 1, "prompt_tokens": 0, "max_tokens": 0, "num_running": 0, "priority": 0, "deadline": None,
    }  # fmt: skip
    quota.reserve(**{**asked, **changes})  # type: ignore[arg-type]


def test_requests_a_minute(limiter: Limiter, clock: Clock) -> None:
    who = principal(requests_per_minute=6)
    for left in range(5, -1, -1):
        quota = enter(limiter, who)
        assert quota.headers()["x-ratelimit-remaining-requests"] == str(left)
        quota.leave()
    assert quota.headers()["x-ratelimit-limit-requests"] == "6"
    assert quota.headers()["x-ratelimit-reset-requests"] == "1m0s"
    with pytest.raises(RateLimited) as refused:
        enter(limiter, who)
    assert refused.value.retry_after == 10
    assert refused.value.code == "rate_limit_exceeded"
    clock.now += 9.9
    with pytest.raises(RateLimited):
        enter(limiter, who)
    clock.now += 0.2
    enter(limiter, who).leave()
    enter(limiter, principal("other", requests_per_minute=6)).leave()  # each key for itself


def test_refused_requests_cost_nothing(limiter: Limiter, clock: Clock) -> None:
    who = principal(requests_per_minute=1)
    enter(limiter, who).leave()
    for _ in range(100):
        with pytest.raises(RateLimited):
            enter(limiter, who)
    clock.now += 60
    enter(limiter, who).leave()


def test_tokens_are_reserved_and_settled(limiter: Limiter, clock: Clock) -> None:
    who = principal(tokens_per_minute=600)
    first = enter(limiter, who)
    reserve(first, prompt_tokens=100, max_tokens=400)
    assert first.headers()["x-ratelimit-remaining-tokens"] == "100"
    second = enter(limiter, who)
    with pytest.raises(RateLimited) as refused:
        reserve(second, prompt_tokens=101)
    assert refused.value.retry_after == 1
    second.leave()
    first.settle(150)  # it ended early
    first.leave()
    assert first.headers()["x-ratelimit-remaining-tokens"] == "450"
    unknown = enter(limiter, who)
    reserve(unknown, prompt_tokens=10)  # no max_tokens: it owes what it takes
    unknown.settle(1000)
    unknown.leave()
    assert unknown.headers()["x-ratelimit-remaining-tokens"] == "0"
    late = enter(limiter, who)
    with pytest.raises(RateLimited) as refused:
        reserve(late, prompt_tokens=1)
    assert refused.value.retry_after == 56  # 550 are owed, at 10 a second
    late.leave()
    clock.now += 56
    reserve(enter(limiter, who), prompt_tokens=1)


def test_more_than_a_minute_is_worth_waits_for_all_of_it(limiter: Limiter, clock: Clock) -> None:
    who = principal(tokens_per_minute=60)
    quota = enter(limiter, who)
    reserve(quota, prompt_tokens=50, max_tokens=1000)
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "0"
    quota.settle(61)
    quota.leave()
    with pytest.raises(RateLimited):
        reserve(enter(limiter, who), prompt_tokens=50, max_tokens=1000)
    clock.now += 62
    reserve(enter(limiter, who), prompt_tokens=50, max_tokens=1000)


def test_a_request_that_never_ran_gets_its_tokens_back(limiter: Limiter) -> None:
    who = principal(tokens_per_minute=600)
    quota = enter(limiter, who)
    reserve(quota, prompt_tokens=500)
    quota.leave()
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "600"
    quota.leave()
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "600"


def test_requests_at_once(limiter: Limiter) -> None:
    who = principal(max_concurrent=2)
    first, second = enter(limiter, who), enter(limiter, who)
    with pytest.raises(RateLimited):
        enter(limiter, who)
    first.leave()
    first.leave()
    third = enter(limiter, who)
    with pytest.raises(RateLimited):
        enter(limiter, who)
    second.leave()
    third.leave()


def test_share_of_the_queue(limiter: Limiter) -> None:
    who = principal(max_queue_share=0.5)  # of 10 that may wait; 4 run
    busy = enter(limiter, who)
    reserve(busy, sequences=5, num_running=4)
    other = enter(limiter, who)
    with pytest.raises(QueueShareFull):
        reserve(other, num_running=4)
    busy.started()
    reserve(other, num_running=4)
    with pytest.raises(QueueShareFull):
        reserve(enter(limiter, who), num_running=4)
    reserve(enter(limiter, who), num_running=3)  # goes into a free slot
    reserve(enter(limiter, principal("neighbour", max_queue_share=0.5)), sequences=5, num_running=4)
    for quota in (busy, other):
        quota.leave()
    reserve(enter(limiter, who), sequences=4, num_running=4)


def test_an_idle_engine_takes_a_burst(limiter: Limiter) -> None:
    """A share of 1 of the 10 places in the queue: five sequences are over it, unless they need not wait there."""
    who = principal(max_queue_share=0.1)
    with pytest.raises(QueueShareFull):
        reserve(enter(limiter, who), sequences=5, num_running=4)
    reserve(enter(limiter, who), sequences=5, num_running=0)
    with pytest.raises(QueueShareFull, match="there are 5"):
        reserve(enter(limiter, who), num_running=0)


@pytest.mark.parametrize(("asked", "param"), [({"priority": -1}, "priority"), ({"deadline": 0.5}, "deadline_ms")])
def test_urgency(limiter: Limiter, asked: dict[str, object], param: str) -> None:
    who = principal(min_priority=0, min_deadline=1.0)
    with pytest.raises(InvalidRequest) as refused:
        reserve(enter(limiter, who), **asked)
    assert refused.value.param == param
    reserve(enter(limiter, who), priority=0, deadline=1.0)
    reserve(enter(limiter, principal("free")), priority=-5, deadline=0.001)


def test_limits_that_change_keep_what_was_used(limiter: Limiter) -> None:
    enter(limiter, principal(requests_per_minute=2)).leave()
    enter(limiter, principal(requests_per_minute=2, tokens_per_minute=5)).leave()
    with pytest.raises(RateLimited):
        enter(limiter, principal(requests_per_minute=2, tokens_per_minute=6))
    enter(limiter, principal()).leave()


def test_gone_keys_are_forgotten(limiter: Limiter) -> None:
    for number in range(100):
        enter(limiter, principal(f"key-{number}")).leave()
    open_one = enter(limiter, principal("key-7"))
    limiter.keep({"key-3"})
    assert len(limiter) == 2
    open_one.leave()
    limiter.keep({"key-3"})
    assert len(limiter) == 1


STEPS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 80), st.integers(0, 160), st.booleans()), max_size=60)


@given(limit=st.integers(1, 100), steps=STEPS)
def test_over_any_time_no_more_than_burst_and_rate(limit: int, steps: list[tuple[float, int, int, bool]]) -> None:
    """What is admitted by reservation never exceeds a minute's worth and what has refilled; in and out are even."""
    clock = Clock()
    limiter = Limiter(max_waiting=10, max_running=4, clock=clock)
    who = principal(tokens_per_minute=limit, max_concurrent=5)
    began, used = clock.now, 0
    held: list[tuple[Quota, int]] = []
    for wait, prompt, actual, leave in steps:
        clock.now += wait
        if leave and held:
            quota, reserved = held.pop(0)
            quota.settle(min(actual, reserved))
            used += min(actual, reserved) - reserved
            quota.leave()
            continue
        quota = limiter.enter(who)
        try:
            quota.admit()
            reserve(quota, prompt_tokens=min(prompt, limit))
        except RateLimited:
            quota.leave()
            continue
        held.append((quota, min(prompt, limit)))
        used += min(prompt, limit)
        assert used <= limit + (clock.now - began) * limit / 60 + 1e-6
        assert len(held) <= 5
    for quota, _ in held:
        quota.leave()
    for _ in range(5):
        enter(limiter, who)


@given(st.integers(1, 1000), st.floats(0, 1e4))
def test_a_bucket_is_never_above_its_limit(limit: int, wait: float) -> None:
    bucket = Bucket(limit, 0.0)
    bucket.take(-5, 0.0)
    assert bucket.level(wait) == limit
    bucket.take(limit * 3, wait)
    assert bucket.seconds_until(1, wait) == pytest.approx((1 + 2 * limit) * 60 / limit)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0201, "21ms"), (1, "1s"), (1.52, "1.6s"), (59.96, "1m0s"), (360, "6m0s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
