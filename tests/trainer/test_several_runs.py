"""Several runs on one decoder, slice by slice in turns: each is as if it were alone."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.events import (
    CancelledEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    RunEvent,
    StepEvent,
)
from runtime.model.decoder import Decoder
from runtime.trainer import run as run_module
from runtime.trainer.data.example import Example, MicroBatch
from runtime.trainer.host import MAX_SLICE_SECONDS, TrainingHost
from runtime.trainer.losses import Supervised
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import LossSpec, SlicedRun
from runtime.trainer.slices import LatencyTargets, Slice, Slices, TrainingShare
from runtime.trainer.step import MAX_JOINT_TOKENS, OfferedMicro
from tests.trainer.tiny_training import all_targets, examples, load_decoder, make_run, run_spec


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


class Ticks:
    """A clock by which all slices take the same time, so that runs meet in the same passes each time."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 0.001
        return self._now


def four_runs(decoder: Decoder, events: list[list[RunEvent]]) -> list[TrainingRun]:
    """Of different ranks, targets, lengths, optimisers and dropout; two evaluate, and one of these stores."""
    few = {key: parts for key, parts in all_targets(decoder).items() if key[1] == "qkv"}
    specs = [
        run_spec(decoder, eval_every=3),
        run_spec(decoder, save_every=None, eval_every=2, lora_r=8, lora_dropout=0.2, seed=3, total_steps=4),
        run_spec(decoder, save_every=None, targets=few, optimizer="sgd", learning_rate=0.1, total_steps=3),
        run_spec(decoder, save_every=None, loss=LossSpec(), neftune_noise_alpha=5.0, gradient_checkpointing=False),
    ]
    data = [examples(8, seed=index, longest=20 + 15 * index) for index in range(4)]
    test, clock = [examples(2, seed=9)], Ticks()
    made = zip(specs, events, data, strict=True)
    return [make_run(decoder, spec, into, data=rows, test=test, clock=clock) for spec, into, rows in made]


def host() -> TrainingHost:
    return TrainingHost(TrainingShare(LatencyTargets(), min_share=0.2))


def losses(events: list[RunEvent]) -> list[float]:
    """Of all steps and evaluations."""
    return [event.loss for event in events if isinstance(event, StepEvent | EvalEvent)]


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[list[float]]:
    """Losses of each of the four by itself."""
    events: list[list[RunEvent]] = [[], [], [], []]
    for run in four_runs(decoder, events):
        while run.ready:
            run.work(float("inf"))
    return [losses(into) for into in events]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[OfferedMicro]]:
    """The micro-batches of every pass that began."""
    found: list[list[OfferedMicro]] = []
    begin = OfferedMicro.begin

    def noted(self: OfferedMicro, beside: Sequence[OfferedMicro] = ()) -> None:
        found.append([self, *beside])
        begin(self, beside)

    monkeypatch.setattr(OfferedMicro, "begin", noted)
    return found


def test_losses_of_four_at_once_equal_those_of_each_alone(
    decoder: Decoder, alone: list[list[float]], passes: list[list[OfferedMicro]]
) -> None:
    together: list[list[RunEvent]] = [[], [], [], []]
    owner = host()
    runs = four_runs(decoder, together)
    for run, into in zip(runs, together, strict=True):
        owner.attach(run, into.append)
    order: list[int] = []
    while owner.ready:
        done = [len(losses(into)) for into in together]
        # Small budgets, as between steps of requests: steps of all runs are under way at the same time.
        owner._work(0.002, longest=0.002)
        order += [index for index, into in enumerate(together) if len(losses(into)) > done[index]]
    assert all(isinstance(into[-1], FinishedEvent) for into in together)
    assert order != sorted(order), "they took turns"
    for mine, theirs in zip(together, alone, strict=True):
        assert losses(mine) == pytest.approx(theirs, rel=1e-4)
    assert max(map(len, passes)) == 4, "of all four at once"
    assert all(sum(one.tokens for one in several) <= MAX_JOINT_TOKENS for several in passes)
    steps = [event for into in together for event in into if isinstance(event, StepEvent)]
    assert all(0 < step.busy_seconds <= step.seconds for step in steps)


@pytest.mark.parametrize(
    ("ends", "leads"), [(ends, leads) for ends in ("fails", "cancel", "detach", "pause") for leads in (True, False)]
)
def test_one_that_ends_in_a_pass_leaves_the_others_alone(
    ends: str, leads: bool, decoder: Decoder, alone: list[list[float]]
) -> None:
    """It computes the pass, or goes along."""
    together: list[list[RunEvent]] = [[], [], [], []]
    owner = host()
    runs = four_runs(decoder, together)
    for run, into in zip(runs, together, strict=True):
        owner.attach(run, into.append)
    ended = False
    while owner.ready:
        owner._work(0.002, longest=0.002)
        offered = runs[0].offered
        if not ended and runs[0].step and offered is not None and offered.joint and runs[0].leads is leads:
            ended = True
            if ends == "fails":
                runs[0]._loss = offered.micro._loss = BrokenLoss()  # type: ignore[attr-defined]
            elif ends == "cancel":
                runs[0].cancel()
            elif ends == "pause":
                runs[0].pause()
            else:
                owner.detach(runs[0])
    assert ended
    last = {"fails": FailedEvent, "cancel": CancelledEvent, "pause": PausedEvent}
    if ends in last:
        assert isinstance(together[0][-1], last[ends])
    else:
        assert not isinstance(together[0][-1], FinishedEvent | FailedEvent | CancelledEvent)
    for mine, theirs in zip(together[1:], alone[1:], strict=True):
        assert isinstance(mine[-1], FinishedEvent)
        assert losses(mine) == pytest.approx(theirs, rel=1e-4)
    if ends == "pause":
        runs[0].resume()
        while owner.ready:
            owner.idle()
        assert losses(together[0]) == pytest.approx(alone[0], rel=1e-4)


class BrokenLoss(Supervised):
    """Raises once it is computed."""

    def slopes(self, batch: MicroBatch) -> Tensor:
        raise ArithmeticError("broken")


def test_a_pass_that_breaks_after_memory_ran_out_is_done_again(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step in which the micro-batches are halved, and another run fails."""
    whole = run_module.collate

    def collate(batch: Sequence[Example], device: torch.device) -> MicroBatch:
        if len(batch) > 1:
            raise MemoryError
        return whole(batch, device)

    expected: list[RunEvent] = []
    run = make_run(decoder, run_spec(decoder, total_steps=2), expected)
    while run.ready:
        run.work(float("inf"))
    monkeypatch.setattr(run_module, "collate", collate)
    events: list[list[RunEvent]] = [[], []]
    owner, clock = host(), Ticks()
    runs = [make_run(decoder, run_spec(decoder, total_steps=2), into, clock=clock) for into in events]
    for run, into in zip(runs, events, strict=True):
        owner.attach(run, into.append)
    broken_in = None
    while owner.ready:
        owner._work(0.002, longest=0.002)
        offered = runs[1].offered
        if broken_in is None and offered is not None and offered.joint:
            broken_in = runs[0].step
            runs[1]._loss = offered.micro._loss = BrokenLoss()  # type: ignore[attr-defined]
    assert broken_in == 0
    assert isinstance(events[1][-1], FailedEvent)
    assert isinstance(events[0][-1], FinishedEvent)
    assert losses(events[0]) == pytest.approx(losses(expected), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_losses_do_not_depend_on_what_comes_between(decoder: Decoder, alone: list[list[float]], seed: int) -> None:
    """Runs of two priorities that come at any time, pause and go on, with and without requests in between, and a slow
    disk."""
    rng, owner = random.Random(seed), host()
    together: list[list[RunEvent]] = [[], [], [], []]
    runs = four_runs(decoder, together)
    for run in runs:
        run.bound_untaken(1)
    coming = rng.sample([*zip(runs, together, strict=True)], 4)
    for _ in range(20_000):
        if all(run.pacer.done for run in runs):
            break
        dice = rng.random()
        if coming and (dice < 0.05 or not owner.ready):
            run, into = coming.pop()
            owner.attach(run, into.append, weight=rng.choice([1.0, 3.0]), priority=rng.choice([0, 0, 1]))
        elif dice < 0.1:
            rng.choice(runs).pause()
        elif dice < 0.2 or not owner.ready:
            for run in runs:
                run.resume()
                while run._snapshots:
                    run.take_snapshot(run._snapshots[0].progress.step)
        elif dice < 0.6:
            owner._work(0.002, longest=0.002)
        else:
            owner.between_steps(0.01, decoding=dice < 0.9, waiting_since=None)
    assert all(isinstance(into[-1], FinishedEvent) for into in together)
    for mine, theirs in zip(together, alone, strict=True):
        assert losses(mine) == pytest.approx(theirs, rel=1e-4)


class TimedRun(SlicedRun):
    """Slices of one unit that take some seconds of a clock each, and may raise."""

    def __init__(self, seconds: float, events: list[RunEvent], *, slices: int = 10**6, fails: bool = False) -> None:
        self._seconds, self._count, self._fails = seconds, slices, fails
        self._now = 0.0
        super().__init__(events.append, lambda: self._now)

    @property
    def step(self) -> int:
        return 0

    @property
    def trained(self) -> float:
        return self._now

    def _slices(self) -> Slices:
        for _ in range(self._count):
            yield Slice("work", 1)
            if self._fails:
                raise ArithmeticError("broken")
            self._now += self._seconds


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedMicro:
    """A micro-batch whose pass takes a second for 1000 tokens, in slices of up to 64 of them."""

    joins = True

    def __init__(self, tokens: int, clock: Clock) -> None:
        self.tokens = tokens
        self._clock = clock

    def forward_backward(self, weight: float, beside: Sequence[tuple[Any, float]] = ()) -> Slices:
        left = self.tokens + sum(micro.tokens for micro, _ in beside)
        while left > 0:
            yield Slice("work", 1)
            self._clock.now += min(left, 64) / 1000
            left -= 64


class PassingRun(SlicedRun):
    """Passes over micro-batches of one size, and nothing between them."""

    joins = True

    def __init__(self, tokens: int, clock: Clock, count: int = 10**6) -> None:
        self._tokens, self._time, self._count = tokens, clock, count
        self._offer: OfferedMicro | None = None
        self.passes = 0
        super().__init__(lambda event: None, clock)

    @property
    def step(self) -> int:
        return self.passes

    @property
    def offered(self) -> OfferedMicro | None:
        return self._offer

    def _slices(self) -> Slices:
        for _ in range(self._count):
            micro: Any = TimedMicro(self._tokens, self._time)
            self._offer = OfferedMicro(micro, 1.0, self._tokens)
            yield from self._offer.slices()
            self._offer = None
            self.passes += 1


def test_shares_of_joint_passes_are_as_set() -> None:
    """Of the tokens, whatever the micro-batches' sizes."""
    clock, owner = Clock(), host()
    runs = {PassingRun(64, clock): 1.0, PassingRun(128, clock): 2.0, PassingRun(96, clock): 4.0}
    for run, weight in runs.items():
        owner.attach(run, lambda event: None, weight=weight)
    while clock.now < 200:
        owner.idle()
    tokens = [run.passes * run._tokens for run in runs]
    assert [one / sum(tokens) for one in tokens] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.02)
    assert [run.pacer.busy_seconds / clock.now for run in runs] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.02)


def test_a_small_job_does_not_wait_behind_a_long_one(passes: list[list[OfferedMicro]]) -> None:
    clock, owner = Clock(), host()
    long, other = PassingRun(512, clock), PassingRun(400, clock)
    owner.attach(long, lambda event: None)
    owner.attach(other, lambda event: None)
    while clock.now < 20:
        owner.idle()
    small, began = PassingRun(100, clock, count=10), clock.now
    owner.attach(small, lambda event: None)
    while not small.pacer.done:
        owner.idle()
    # A third of the time is its own; before its first pass it waits for one that is under way, and its turn.
    assert clock.now - began < 3 * 10 * 0.1 + 2 * 0.512
    assert {len(several) for several in passes} == {1, 2}, "it went along with others"


def test_a_small_job_does_not_wait_for_the_end_of_a_long_pass() -> None:
    """Its micro-batches are too long to go through the base with others."""
    clock, owner = Clock(), host()
    long = [PassingRun(tokens, clock) for tokens in (20_000, 30_000)]
    for run in long:
        owner.attach(run, lambda event: None)
    while clock.now < 10:
        owner.idle()
    small, began = PassingRun(100, clock, count=10), clock.now
    owner.attach(small, lambda event: None)
    waited = []
    while not small.pacer.done:
        before = clock.now
        while small.passes == len(waited):
            owner.idle()
        waited.append(clock.now - before)
    # A third of the time is its own, and one slice may be under way when its turn comes.
    assert clock.now - began < 3 * 10 * 0.1 + MAX_SLICE_SECONDS
    assert max(waited) < 3 * 0.1 + MAX_SLICE_SECONDS
    assert sum(run.leads for run in long) == 1, "one of the long passes at a time"


def test_a_higher_priority_does_not_wait_for_a_pass_under_way() -> None:
    clock, owner = Clock(), host()
    long = PassingRun(512, clock)
    owner.attach(long, lambda event: None)
    owner.attach(PassingRun(512, clock), lambda event: None)
    while not long.leads:
        owner.idle()
    urgent, began = PassingRun(100, clock, count=10), clock.now
    owner.attach(urgent, lambda event: None, priority=1)
    while not urgent.pacer.done:
        owner.idle()
    assert clock.now - began < 1.1


def attached(owner: TrainingHost, *claims: tuple[float, int]) -> list[TimedRun]:
    """A run of each weight and priority, with slices of different lengths."""
    runs = []
    for index, (weight, priority) in enumerate(claims):
        events: list[RunEvent] = []
        runs.append(run := TimedRun(0.001 * (index + 1), events))
        owner.attach(run, events.append, weight=weight, priority=priority)
    return runs


def spend(work: Callable[[], None], runs: list[TimedRun], seconds: float) -> list[float]:
    """What each run used of the time."""
    while sum(run.trained for run in runs) < seconds:
        work()
    total = sum(run.trained for run in runs)
    return [run.trained / total for run in runs]


@pytest.mark.parametrize("between", [False, True], ids=["idle", "between steps"])
def test_shares_are_as_set(between: bool) -> None:
    owner = host()
    runs = attached(owner, (1.0, 0), (2.0, 0), (4.0, 0), (1.0, 0))
    work = owner.idle
    if between:
        work = lambda: owner.between_steps(0.05, decoding=True, waiting_since=None)  # noqa: E731
    found = spend(work, runs, 20.0)
    assert found == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8], abs=0.02)


def test_a_run_that_fails_leaves_the_others_alone() -> None:
    owner, events = host(), [[], []]  # type: ignore[var-annotated]
    broken, good = TimedRun(0.001, events[0], fails=True), TimedRun(0.001, events[1], slices=50)
    owner.attach(broken, events[0].append)
    owner.attach(good, events[1].append)
    begin = time.monotonic()
    while owner.ready and time.monotonic() < begin + 10:
        owner.idle()
    assert [type(event) for event in events[0]] == [FailedEvent]
    assert good.pacer.done
    assert good.trained == pytest.approx(0.05)
    assert events[1] == []


def test_a_run_that_waits_or_has_gone_costs_the_others_nothing() -> None:
    owner = host()
    first, second = attached(owner, (1.0, 0), (1.0, 0))
    spend(owner.idle, [first, second], 1.0)
    second._waits_for_disk = True
    second.bound_untaken(0)
    before = second.trained
    spend(owner.idle, [first], 2.0)
    assert second.trained == before
    owner.detach(first)
    owner.detach(first)
    assert not owner.ready
    second._waits_for_disk = False
    assert owner.ready
    owner.idle()
    assert second.trained > before
