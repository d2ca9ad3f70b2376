"""Time for training between steps, in seconds that the test makes: what is granted, saved, owed and left to prompts."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.events import LatencyTarget
from runtime.trainer.slices import MAX_SAVED_GAPS, PROBE_STEPS, LatencyTargets, TrainingShare


class Server:
    """Steps and gaps one after the other, on a clock of their own."""

    def __init__(self, targets: LatencyTargets, min_share: float = 0.1) -> None:
        self.misses: list[LatencyTarget] = []
        self.share = TrainingShare(targets, min_share=min_share, on_miss=self.misses.append)
        self.now = 0.0

    def budget(self, step: float, *, decoding: bool = True, waiting_since: float | None = None) -> float:
        self.now += step
        return self.share.budget(step, decoding=decoding, waiting_since=waiting_since, now=self.now)

    def train(self, budget: float, spent: float | None = None) -> float:
        """Use all of a budget, or `spent` seconds."""
        spent = max(0.0, budget) if spent is None else spent
        self.now += spent
        self.share.settle(budget, spent)
        return spent


def test_without_a_target_a_token_may_take_the_ratio_of_a_step_longer() -> None:
    server = Server(LatencyTargets(tpot_ratio=1.3))
    assert server.budget(0.030) == pytest.approx(0.009)


def test_with_a_target_training_gets_the_rest_of_it() -> None:
    server = Server(LatencyTargets(tpot=0.050))
    assert server.budget(0.030) == pytest.approx(0.020)


def test_a_longer_step_leaves_less_of_a_target_at_once() -> None:
    """More requests than before: the next step is as long."""
    server = Server(LatencyTargets(tpot=0.050))
    for _ in range(20):
        server.train(server.budget(0.020), 0.0)
    assert server.budget(0.042) == pytest.approx(0.008 * (1 + MAX_SAVED_GAPS))


def test_neither_a_prompt_nor_a_pause_of_the_machine_makes_a_long_step_typical() -> None:
    server = Server(LatencyTargets(tpot_ratio=1.3), min_share=0.01)
    server.train(server.budget(0.500, decoding=False), 0.0)
    for _ in range(20):
        server.share.settle(0.0, 0.0)
        before = server.budget(0.030)
    server.share.settle(0.0, 0.0)
    server.budget(3.0)
    server.share.settle(0.0, 0.0)
    after = server.budget(0.030)
    assert before == pytest.approx(0.009)
    assert before < after < 0.0094


@pytest.mark.parametrize("targets", [LatencyTargets(tpot=0.010), LatencyTargets(tpot_ratio=1.01)])
def test_the_least_share_is_given_even_where_the_target_is_missed(targets: LatencyTargets) -> None:
    server = Server(targets, min_share=0.2)
    assert server.budget(0.040) == pytest.approx(0.010)  # a fifth of 50 ms


def test_what_is_not_used_is_saved_but_not_without_end() -> None:
    server = Server(LatencyTargets(tpot=0.050))
    budgets = []
    for _ in range(6):
        budgets.append(server.budget(0.040))
        server.train(budgets[-1], 0.0)
    assert budgets == pytest.approx([0.010, *[0.010 * (1 + MAX_SAVED_GAPS)] * 5])


def test_what_was_taken_too_much_is_owed() -> None:
    server = Server(LatencyTargets(tpot=0.050))
    server.train(server.budget(0.040), 0.025)
    assert server.budget(0.040) == pytest.approx(-0.005, abs=1e-3)


def test_one_token_of_many_has_no_training_before_it_so_that_its_step_is_known_alone() -> None:
    """Steps after training take a tenth longer, which the ratio is not to be taken of."""
    server = Server(LatencyTargets(tpot_ratio=1.3), min_share=0.01)
    spent, probes = 0.0, 0
    for _ in range(40 * PROBE_STEPS):
        budget = server.budget(0.022 if spent else 0.020)
        spent = server.train(budget)
        probes += not spent
    assert probes == pytest.approx(40, abs=2)
    server.train(server.budget(0.022))
    assert 0.0035 < server.budget(0.022) <= 0.0041  # 1.3 times 20 ms less 22


def test_the_percentile_is_kept_where_slices_do_not_fit_exactly() -> None:
    rng = random.Random(0)
    server = Server(LatencyTargets(tpot=0.030, percentile=0.95), min_share=0.01)
    late, trained, tokens = 0, 0.0, 6000
    for index in range(tokens):
        budget = server.budget(0.020 * rng.uniform(0.95, 1.05))
        before = server.train(budget, max(0.0, budget * rng.uniform(0.7, 1.4)))
        trained += before
        late += index >= 1000 and before + 0.020 > 0.0301
    assert late / (tokens - 1000) < 0.07
    assert trained / tokens > 0.006  # of 10 ms that there are
    assert set(server.misses) == {"tpot"}
    assert 0.6 < server.share.slack_used < 1


def test_slices_that_never_fit_do_not_keep_the_reserve_up() -> None:
    """After many late tokens nothing fits; the tokens without training are in time, and count as well."""
    server = Server(LatencyTargets(tpot=0.030), min_share=0.001)
    for _ in range(40):
        server.train(server.budget(0.020), 0.015)
        server.share.settle(0.0, 0.015)
    assert server.budget(0.020) < 0.002
    for _ in range(400):
        server.train(server.budget(0.020), 0.0)
    assert server.budget(0.020) > 0.008


def test_tokens_that_would_be_late_alone_are_not_laid_to_training() -> None:
    server = Server(LatencyTargets(tpot=0.030))
    for _ in range(50):
        server.train(server.budget(0.040))
    assert server.misses == []


def test_a_waiting_prompt_gets_all_of_the_time_for_a_while() -> None:
    server = Server(LatencyTargets(ttft=1.0), min_share=0.2)
    arrival, granted = server.now, []
    for _ in range(20):
        granted.append(server.budget(0.1, decoding=False, waiting_since=arrival))
        server.train(granted[-1])
    assert granted[:9] == [0.0] * 9
    assert granted[10:] == pytest.approx([0.025] * 10)  # the least share, for the first token is late anyway


def test_prompts_without_end_leave_training_its_least_share() -> None:
    """Each is in time, and there is always another one."""
    server = Server(LatencyTargets(ttft=1.0), min_share=0.2)
    trained = steps = 0.0
    for _ in range(200):
        steps += 0.1
        trained += server.train(server.budget(0.1, decoding=False, waiting_since=server.now))
    assert trained / (trained + steps) > 0.18
    for _ in range(100):  # after some time without them, the next ones are undisturbed
        server.train(server.budget(0.030))
    assert server.budget(0.1, decoding=False, waiting_since=server.now) <= 0.0


def test_a_first_token_that_training_made_late_is_counted_once() -> None:
    server = Server(LatencyTargets(ttft=1.0), min_share=0.5)
    for _ in range(3):
        arrival = server.now
        for _ in range(15):
            server.train(server.budget(0.06, decoding=False, waiting_since=arrival), 0.03)
        server.train(server.budget(0.03))
    assert server.misses.count("ttft") == 3
    arrival = server.now
    for _ in range(15):  # as late without it
        server.train(server.budget(0.1, decoding=False, waiting_since=arrival), 0.0)
    server.budget(0.03)
    assert server.misses.count("ttft") == 3


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.floats(0.001, 0.2), min_size=30, max_size=60),
    least=st.floats(0.0001, 0.005),
    minimum=st.floats(0.05, 0.5),
)
def test_over_time_training_gets_its_share_and_no_gap_is_long(steps: list[float], least: float, minimum: float) -> None:
    """Whatever the smallest slice costs, as long as it is small beside a gap."""
    server = Server(LatencyTargets(tpot=1e-6), min_share=minimum)
    floor = minimum / (1 - minimum)
    trained = 0.0
    for step in steps:
        budget = server.budget(step)
        spent = math.floor(budget / least) * least if budget >= least else 0.0
        assert spent <= (1 + MAX_SAVED_GAPS) * floor * max(steps) + 1e-9
        trained += server.train(budget, spent)
    if least <= MAX_SAVED_GAPS * floor * min(steps):  # what one gap leaves over is then never more than may be saved
        assert trained >= floor * sum(steps) - 3 * floor * max(steps)
