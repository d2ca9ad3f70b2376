"""The pacer and the share, with a clock that the slices move: what is cut, what is saved up, what is owed."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.trainer.slices import Pacer, Slice, Slices, TrainingShare


class Work:
    """Pieces of `amount` units; a unit takes `cost` seconds of a clock that only work moves."""

    def __init__(self, pieces: list[tuple[str, int, int, float]]) -> None:
        self.now = 0.0
        self.done: list[tuple[str, int]] = []
        self._pieces = pieces

    def slices(self) -> Slices:
        for kind, amount, least, cost in self._pieces:
            left = amount
            while left:
                count = yield Slice(kind, left, min(least, left))
                self.now += cost * count
                self.done.append((kind, count))
                left -= count

    def pacer(self) -> Pacer:
        return Pacer(self.slices(), lambda: self.now)


def test_without_a_limit_pieces_are_done_whole_once_their_cost_is_known() -> None:
    work = Work([("a", 100, 10, 0.001)] * 3)
    pacer = work.pacer()
    pacer.run(math.inf)
    assert work.done == [("a", 10), ("a", 90), ("a", 100), ("a", 100)]
    assert pacer.done
    assert pacer.busy_seconds == pytest.approx(0.3)


def test_a_budget_cuts_pieces_to_what_fits() -> None:
    work = Work([("a", 1000, 10, 0.001)])
    pacer = work.pacer()
    pacer.run(0.005)  # unknown cost: the least, once
    for _ in range(3):
        assert pacer.run(0.05) == pytest.approx(0.05)
    assert work.done == [("a", 10), ("a", 50), ("a", 50), ("a", 50)]


def test_less_than_the_least_is_not_done() -> None:
    work = Work([("a", 1000, 10, 0.001)])
    pacer = work.pacer()
    pacer.run(0.01)
    assert pacer.run(0.009) == 0.0


def test_what_never_fits_is_tried_again_some_time() -> None:
    """One slice that took long, because something else ran, must not end training for ever."""
    work = Work([("a", 10, 10, 1.0), ("a", 1000, 10, 0.001)])
    pacer = work.pacer()
    pacer.run(0.01)
    for _ in range(200):
        pacer.run(0.02)
    assert pacer.done


def test_a_small_rest_is_done_along() -> None:
    work = Work([("a", 10, 10, 0.001), ("a", 105, 10, 0.001)])
    pacer = work.pacer()
    pacer.run(0.01)
    pacer.run(0.1)
    assert work.done == [("a", 10), ("a", 105)]


def test_it_learns_that_a_kind_has_become_dearer_at_once() -> None:
    work = Work([("a", 10, 1, 0.001), ("a", 1000, 1, 0.01)])
    pacer = work.pacer()
    pacer.run(0.01)
    spent = [pacer.run(0.1) for _ in range(6)]
    assert spent[0] > 0.5  # believed to be cheap
    assert all(0.05 < seconds < 0.2 for seconds in spent[2:])


def test_a_piece_is_no_larger_than_what_will_be_done_on_it_later_allows() -> None:
    def slices() -> Slices:
        yield Slice("backward", 10, 10)
        work.now += 0.02
        granted.append((yield Slice("forward", 10, 10)))
        work.now += 0.01
        granted.append((yield Slice("forward", 500, 10, then="backward")))

    work, granted = Work([]), list[int]()
    pacer = Pacer(slices(), lambda: work.now)
    pacer.run(0.001)
    pacer.run(0.001)
    pacer.run(0.1)
    assert granted == [10, 50]


def test_a_piece_that_is_there_is_used_whole_even_if_that_means_to_wait() -> None:
    def slices() -> Slices:
        for amount in (10, 50, 90):
            left = amount
            while left:
                granted = yield Slice("use", left, 10, again="again" if left == amount else None)
                work.now += 0.001 * granted * (1 if granted == amount else 3)
                done.append(granted)
                left -= granted

    work, done = Work([]), list[int]()
    pacer = Pacer(slices(), lambda: work.now)
    for _ in range(40):
        pacer.run(0.06)
        work.now += 1.0
    assert done[:2] == [10, 50]  # 50 did not fit beside the 10, but does in a gap of its own
    assert max(done[2:]) < 90  # 90 never will
    assert sum(done[2:]) == 90


def test_with_a_longest_slice_pieces_are_not_cut_to_the_budget() -> None:
    work = Work([("a", 10, 10, 0.001), ("a", 100, 10, 0.001), ("a", 500, 10, 0.001)])
    pacer = work.pacer()
    pacer.run(0.01, longest=0.2)
    pacer.run(0.05, longest=0.2)
    pacer.run(0.05, longest=0.2)
    assert work.done == [("a", 10), ("a", 100), ("a", 200)]


def test_may_go_on_stops_between_slices() -> None:
    work = Work([("a", 1, 1, 0.001)] * 10)
    pacer = work.pacer()
    pacer.run(math.inf, lambda: len(work.done) < 4)
    assert len(work.done) == 4


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 500), st.integers(1, 40), st.floats(1e-5, 1e-2, allow_nan=False)
        ),
        max_size=20,
    ),
    budgets=st.lists(st.floats(0.001, 0.1), min_size=1, max_size=5),
)
def test_everything_is_done_exactly_once_and_never_below_the_least(
    pieces: list[tuple[str, int, int, float]], budgets: list[float]
) -> None:
    work = Work(pieces)
    pacer = work.pacer()
    for turn in range(100_000):
        if pacer.done:
            break
        pacer.run(budgets[turn % len(budgets)])
    assert pacer.done
    assert sum(count for _, count in work.done) == sum(amount for _, amount, _, _ in pieces)
    assert pacer.busy_seconds == pytest.approx(work.now)


# -- the share -----------------------------------------------------------------------------------


def test_without_a_target_a_token_may_take_a_third_longer() -> None:
    share = TrainingShare(tpot_target=None, min_share=0.1)
    assert share.budget(0.030, decoding=True, first_tokens_due=False) == pytest.approx(0.0105)


def test_neither_a_prompt_nor_a_pause_of_the_machine_makes_a_long_step_typical() -> None:
    share = TrainingShare(tpot_target=None, min_share=0.01)
    share.settle(share.budget(0.500, decoding=False, first_tokens_due=False), 0.0)
    for _ in range(50):
        share.settle(0.0, 0.0)
        before = share.budget(0.030, decoding=True, first_tokens_due=False)
    share.settle(0.0, 0.0)
    share.budget(3.0, decoding=True, first_tokens_due=False)
    share.settle(0.0, 0.0)
    after = share.budget(0.030, decoding=True, first_tokens_due=False)
    assert before == pytest.approx(0.0105)
    assert before < after < 0.0117


def test_with_a_target_training_gets_the_rest_of_it() -> None:
    share = TrainingShare(tpot_target=0.050, min_share=0.1)
    assert share.budget(0.030, decoding=True, first_tokens_due=False) == pytest.approx(0.020)


@pytest.mark.parametrize("due", [True, False])
def test_the_least_share_is_given_even_where_the_target_is_missed(due: bool) -> None:
    share = TrainingShare(tpot_target=0.010, min_share=0.2)
    assert share.budget(0.040, decoding=True, first_tokens_due=due) == pytest.approx(0.010)  # a fifth of 50 ms


def test_what_is_not_used_is_saved_but_not_without_end() -> None:
    share = TrainingShare(tpot_target=0.050, min_share=0.1)
    budgets = []
    for _ in range(6):
        budget = share.budget(0.040, decoding=True, first_tokens_due=False)
        budgets.append(budget)
        share.settle(budget, 0.0)
    assert budgets[0] == pytest.approx(0.010)
    assert budgets[1:] == pytest.approx([0.0125] * 5)


def test_what_was_taken_too_much_is_owed() -> None:
    share = TrainingShare(tpot_target=0.050, min_share=0.1)
    budget = share.budget(0.040, decoding=True, first_tokens_due=False)
    share.settle(budget, budget + 0.015)
    assert share.budget(0.040, decoding=True, first_tokens_due=False) == pytest.approx(-0.005)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.floats(0.001, 0.2), min_size=30, max_size=80),
    least=st.floats(0.0001, 0.005),
    minimum=st.floats(0.05, 0.5),
)
def test_over_time_training_gets_its_share_and_no_gap_is_long(steps: list[float], least: float, minimum: float) -> None:
    """Whatever the smallest slice costs, as long as it is small beside a gap."""
    share = TrainingShare(tpot_target=1e-6, min_share=minimum)
    floor = minimum / (1 - minimum)
    trained = 0.0
    for step in steps:
        budget = share.budget(step, decoding=True, first_tokens_due=False)
        spent = math.floor(budget / least) * least if budget >= least else 0.0
        assert spent <= 1.25 * floor * max(steps) + 1e-9
        share.settle(budget, spent)
        trained += spent
    if least <= 0.25 * floor * min(steps):  # what one gap leaves over is then never more than may be saved
        assert trained >= floor * sum(steps) - 3 * floor * max(steps)


def test_what_was_learned_of_later_work_is_doubted_too() -> None:
    """Work on a piece that once took long (it was the first) must not keep pieces from being made for ever."""
    now = 0.0

    def slices() -> Slices:
        nonlocal now
        for cost in (1.0, 0.001, 0.001):
            yield Slice("make", 1, then="use")
            now += 0.001
            yield Slice("use", 1)
            now += cost

    pacer = Pacer(slices(), lambda: now)
    for _ in range(500):
        pacer.run(0.01)
    assert pacer.done
