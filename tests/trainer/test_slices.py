"""The pacer, with a clock that the slices move: what is cut, and what it learns."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.trainer.slices import Pacer, Slice, Slices


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


def test_a_budget_is_filled_though_costs_vary() -> None:
    """What is learned is the mean: a cost that is believed to be high leaves budgets unused."""
    work = Work([("a", 10, 1, 0.001 * (0.7 if index % 2 else 1.3)) for index in range(4000)])
    pacer = work.pacer()
    for _ in range(100):
        pacer.run(0.02)
    spent = [pacer.run(0.02) for _ in range(500)]
    assert sum(spent) / len(spent) == pytest.approx(0.02, rel=0.1)


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
