"""Progress inside a step: what is reported, when, and how long the rest is said to take."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.events import EvalEvent, ProgressEvent, RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.trainer.course import FIRST_SECONDS, MOST_SECONDS, Headway
from runtime.trainer.data.example import Example
from runtime.trainer.losses import Score
from runtime.trainer.slices import Slice, Slices
from tests.trainer.tiny_training import drive, examples, load_decoder, make_run, run_spec


class FakeMicro:
    """Work of equal parts, each of which takes `seconds` of the clock."""

    def __init__(self, clock: "Clock", parts: int, seconds: float) -> None:
        self.score = Score()
        self.fraction = 0.0
        self._clock, self._parts, self._seconds = clock, parts, seconds

    def forward_backward(self, weight: float) -> Slices:
        for _ in range(self._parts):
            granted = yield Slice("work", 1)
            assert granted == 1
            self._clock.now += self._seconds
            self.fraction += 1 / self._parts

    def evaluate(self) -> Slices:
        yield from self.forward_backward(0.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


EXAMPLE = Example([1] * 10, [True] * 10)


def run_step(headway: Headway, clock: Clock, step: int, *, micros: int, parts: int, seconds: float) -> None:
    headway.begin("train", step, [[EXAMPLE]] * micros)
    for _ in range(micros):
        micro = FakeMicro(clock, parts, seconds)
        slices = headway.watch(micro.forward_backward(1.0), micro, [EXAMPLE])
        wanted = next(slices, None)
        while wanted is not None:
            try:
                wanted = slices.send(wanted.amount)
            except StopIteration:
                break
    headway.end_step()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_long_step_says_how_far_it_is(clock: Clock) -> None:
    """Two micro-batches of 10 parts of 2 s each: 40 s a step, and 4 steps."""
    said: list[ProgressEvent] = []
    headway = Headway(4, said.append, clock)
    run_step(headway, clock, 0, micros=2, parts=10, seconds=2.0)
    assert [(event.step, event.total_steps, event.activity) for event in said] == [(0, 4, "train")] * len(said)
    assert said[0].seconds == 6.0  # the first part that ends after FIRST_SECONDS
    assert said[0].fraction == pytest.approx(6 / 40)
    for event in said:
        assert event.fraction == pytest.approx(event.seconds / 40)
        assert event.seconds_left == pytest.approx(4 * 40 - event.seconds)
    assert len(said) == 6  # every 6 s of 40
    clock.now += 500  # a pause, or an evaluation
    said.clear()
    run_step(headway, clock, 1, micros=1, parts=10, seconds=4.0)
    assert said[0].seconds_left == pytest.approx(3 * 40 - said[0].seconds)


def test_a_step_that_is_slower_than_those_before_changes_what_is_left(clock: Clock) -> None:
    """A step of 10 s, then one of ten times that, as when something else takes the machine: 4 steps."""
    said: list[ProgressEvent] = []
    headway = Headway(4, said.append, clock)
    run_step(headway, clock, 0, micros=1, parts=10, seconds=1.0)
    said.clear()
    run_step(headway, clock, 1, micros=1, parts=10, seconds=10.0)
    for event in said:
        pace = (10 + event.seconds) / (1 + event.fraction)
        assert event.seconds_left == pytest.approx((3 - event.fraction) * pace)
    assert said[-1].seconds_left == pytest.approx(2.1 * 100 / 1.9)  # at 10 s a step: 21


def test_short_steps_say_nothing(clock: Clock) -> None:
    said: list[ProgressEvent] = []
    headway = Headway(1000, said.append, clock)
    for step in range(100):
        run_step(headway, clock, step, micros=1, parts=4, seconds=1.0)
    assert said == []
    assert FIRST_SECONDS > 4


def test_a_long_run_says_less(clock: Clock) -> None:
    """An hour in one step is told in some hundred events, not in 720."""
    said: list[ProgressEvent] = []
    run_step(Headway(1, said.append, clock), clock, 0, micros=1, parts=3600, seconds=1.0)
    gaps = [later.seconds - earlier.seconds for earlier, later in itertools.pairwise(said)]
    assert gaps[0] == FIRST_SECONDS
    assert max(gaps) == MOST_SECONDS
    assert len(said) < 150


def test_an_evaluation_has_a_progress_of_its_own(clock: Clock) -> None:
    said: list[ProgressEvent] = []
    headway = Headway(3, said.append, clock)
    run_step(headway, clock, 0, micros=1, parts=2, seconds=1.0)
    headway.begin("eval", 1, [[EXAMPLE], [EXAMPLE]])
    micro = FakeMicro(clock, 5, 2.0)
    for _ in drained(headway.watch(micro.evaluate(), micro, [EXAMPLE])):
        pass
    assert [event.activity for event in said] == ["eval"]
    assert said[0].fraction == pytest.approx(0.3)
    assert said[0].seconds_left == pytest.approx(2 * 2.0 + 6 * (1 / 0.3 - 1))


def drained(slices: Slices) -> Iterator[Slice]:
    wanted = next(slices, None)
    while wanted is not None:
        yield wanted
        try:
            wanted = slices.send(wanted.amount)
        except StopIteration:
            return


def test_leaving_closes_the_work_that_is_watched(clock: Clock) -> None:
    closed: list[bool] = []

    def work() -> Slices:
        try:
            yield Slice("work", 1)
        finally:
            closed.append(True)

    slices = Headway(1, lambda event: None, clock).watch(work(), FakeMicro(clock, 1, 1.0), [EXAMPLE])
    next(slices)
    slices.close()
    assert closed == [True]


def test_an_error_of_the_work_passes(clock: Clock) -> None:
    def work() -> Slices:
        yield Slice("work", 1)
        raise MemoryError

    slices = Headway(1, lambda event: None, clock).watch(work(), FakeMicro(clock, 1, 1.0), [EXAMPLE])
    next(slices)
    with pytest.raises(MemoryError):
        slices.send(1)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_reports_within_its_steps(decoder: Decoder, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time between two reports: after each slice, ever more of the step, to its end."""
    monkeypatch.setattr("runtime.trainer.course.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("runtime.trainer.course.MOST_SECONDS", 0.0)
    events: list[RunEvent] = []
    spec = run_spec(decoder, total_steps=2, warmup_steps=0, gradient_checkpointing=checkpointing, eval_every=1)
    drive(make_run(decoder, spec, events, data=examples(8), test=[examples(2, seed=9)] * 2))
    done = 0
    fractions: dict[str, list[float]] = {"train": [], "eval": []}
    for event in events:
        if isinstance(event, ProgressEvent):
            assert event.step == done
            fractions[event.activity].append(event.fraction)
        elif isinstance(event, StepEvent | EvalEvent):
            done = event.step
            told = fractions["train" if isinstance(event, StepEvent) else "eval"]
            assert told == sorted(told)
            assert 0 <= told[0] < 0.5
            assert 0.7 < told[-1] <= 1.0
            told.clear()
    assert done == 2
