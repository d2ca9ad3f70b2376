"""The run that gets the next slice: weights, priorities, and runs that come, wait and go."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from runtime.trainer.slices import FairQueue


def used(queue: FairQueue[str], ready: list[str], seconds: float, slice_of: dict[str, float]) -> Counter[str]:
    """Seconds of each run, once `seconds` are used; a run's slice takes `slice_of` it."""
    found: Counter[str] = Counter()
    while found.total() < seconds:
        run = queue.next_of(ready)
        assert run is not None
        queue.charge(run, slice_of[run])
        found[run] += slice_of[run]  # type: ignore[assignment]
    return found


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 10.0), min_size=1), st.data())
def test_time_is_shared_by_weight_whatever_slices_take(weights: dict[str, float], data: st.DataObject) -> None:
    slice_of = {name: data.draw(st.floats(0.01, 1.0)) for name in weights}
    queue: FairQueue[str] = FairQueue()
    for name, weight in weights.items():
        queue.add(name, weight=weight)
    found = used(queue, list(weights), 300.0, slice_of)
    for name, weight in weights.items():
        expected = found.total() * weight / sum(weights.values())
        # A run is at most a slice of each run off, in time over weight.
        slack = weight * sum(slice_of[one] / weights[one] for one in weights) + slice_of[name]
        assert abs(found[name] - expected) <= slack


def test_a_higher_priority_takes_all_of_the_time_it_can_use() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("long", priority=0)
    queue.add("urgent", weight=0.1, priority=1)
    assert used(queue, ["long", "urgent"], 10.0, {"long": 1.0, "urgent": 1.0}) == {"urgent": 10.0}
    assert queue.next_of(["long"]) == "long"


def test_who_joins_or_comes_back_is_owed_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("first")
    used(queue, ["first"], 100.0, {"first": 1.0})
    queue.add("second")
    assert used(queue, ["first", "second"], 20.0, {"first": 1.0, "second": 1.0}) == {"first": 10.0, "second": 10.0}
    used(queue, ["first"], 50.0, {"first": 1.0})
    assert used(queue, ["first", "second"], 20.0, {"first": 1.0, "second": 1.0})["second"] <= 11.0


def test_one_that_cannot_use_its_turn_keeps_its_place() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("busy")
    queue.add("blocked")
    for _ in range(10):
        assert queue.next_of(["busy"], ["blocked"]) == "busy"
        queue.charge("busy", 1.0)
    assert used(queue, ["busy", "blocked"], 10.0, {"busy": 1.0, "blocked": 1.0}) == {"blocked": 10.0}


def test_one_that_has_gone_has_no_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a")
    queue.add("b")
    queue.remove("a")
    queue.remove("a")
    assert queue.next_of(["b"]) == "b"
    assert queue.next_of([]) is None


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 10.0), min_size=1), st.floats(0.01, 1.0))
def test_turns_ahead_are_those_that_would_be_taken(weights: dict[str, float], cost: float) -> None:
    queue: FairQueue[str] = FairQueue()
    for name, weight in weights.items():
        queue.add(name, weight=weight)
    used(queue, list(weights), 10.0, dict.fromkeys(weights, 0.3))
    ahead = list(queue.turns(weights, lambda run: cost))
    taken: list[str] = []
    while (run := queue.next_of(weights)) not in taken:
        assert run is not None
        taken.append(run)
        queue.charge(run, cost)
    assert ahead == taken


def test_turns_are_those_of_the_highest_priority() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("long")
    queue.add("urgent", priority=1)
    queue.add("also", priority=1)
    assert sorted(queue.turns(["long", "urgent", "also"], lambda run: 1.0)) == ["also", "urgent"]
    assert list(queue.turns([], lambda run: 1.0)) == []
