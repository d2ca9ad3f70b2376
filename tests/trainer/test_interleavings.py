"""Runs that stand at offers, work by themselves, wait, fail and go in any order: none blocks another."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.events import RunEvent
from runtime.trainer.host import TrainingHost
from runtime.trainer.sliced_run import SlicedRun
from runtime.trainer.slices import LatencyTargets, Slice, Slices, TrainingShare
from runtime.trainer.step import MAX_JOINT_TOKENS, BrokenPass, OfferedMicro

# Seconds of a token in a pass, and of a slice of a run's own work.
TOKEN_SECONDS, OWN_SECONDS = 0.001, 0.02


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedMicro:
    """A micro-batch whose pass is cut into slices of up to 64 tokens."""

    fraction = 0.0

    def __init__(self, clock: Clock, tokens: int, *, joins: bool, breaks: bool) -> None:
        self.tokens, self.joins, self.breaks = tokens, joins, breaks
        self._clock = clock

    def forward_backward(self, weight: float, beside: Sequence[tuple["ScriptedMicro", float]] = ()) -> Slices:
        several = [self, *(micro for micro, _ in beside)]
        assert len(several) == 1 or all(micro.joins for micro in several)
        left = sum(micro.tokens for micro in several)
        while left > 0:
            granted = yield Slice("pass", left, least=min(left, 64))
            self._clock.now += granted * TOKEN_SECONDS
            left -= granted
            if any(micro.breaks for micro in several):
                raise ArithmeticError("scripted")


class ScriptedRun(SlicedRun):
    """Goes through a script of (kind, amount): passes of this number of tokens, slices of its own work, or waiting for
    answers from outside."""

    def __init__(self, clock: Clock, script: Sequence[tuple[str, int]]) -> None:
        self._time, self._script = clock, script
        self._offer: OfferedMicro | None = None
        self.events: list[RunEvent] = []
        self.done = 0
        super().__init__(self.events.append, clock)

    @property
    def step(self) -> int:
        return self.done

    @property
    def offered(self) -> OfferedMicro | None:
        return self._offer

    @property
    def joins(self) -> bool:
        return self._offer is not None and self._offer.micro.joins

    def _slices(self) -> Slices:
        for kind, amount in self._script:
            if kind == "waits":
                self._awaits_answers, self._answers = True, None
                while self._given_answers() is None:
                    yield Slice("answers", 1)
                self._awaits_answers = False
            elif kind == "own":
                for _ in range(amount):
                    yield Slice("own", 1)
                    self._time.now += OWN_SECONDS
            else:
                try:
                    yield from self._pass(kind, amount, joins=kind != "alone")
                except BrokenPass:
                    yield from self._pass(kind, amount, joins=False)
            self.done += 1
            if self._pause_asked:
                self._paused = True
                yield Slice("pause", 1)
                self._paused = False

    def _pass(self, kind: str, tokens: int, *, joins: bool) -> Slices:
        micro: Any = ScriptedMicro(self._time, tokens, joins=joins, breaks=kind == "breaks")
        self._offer = offered = OfferedMicro(micro, 1.0, tokens)
        if not self.offers:
            offered.begin()
        try:
            yield from offered.slices()
        finally:
            self._offer = None


def host() -> TrainingHost:
    return TrainingHost(TrainingShare(LatencyTargets(), min_share=0.2))


KINDS = ["pass", "pass", "pass", "alone", "breaks", "own", "waits"]
SCRIPTS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 60, 200, 512, 700])).map(
        lambda one: (one[0], one[1] % 7 + 1) if one[0] == "own" else one
    ),
    min_size=1,
    max_size=6,
)
ACTIONS = st.tuples(
    st.sampled_from(["idle", "between", "stopped", "pause", "resume", "answer", "cancel", "detach", "attach"]),
    st.integers(0, 4),
)


class Driver:
    """Runs of a host, of which some are not attached yet; what must hold is asserted after every action."""

    def __init__(self, scripts: list[list[tuple[str, int]]], claims: list[tuple[float, int]]) -> None:
        self.clock, self.host = Clock(), host()
        self.runs = [ScriptedRun(self.clock, script) for script in scripts]
        self.claims = dict(zip(self.runs, claims, strict=False))
        self.coming = list(self.runs)
        self.ended: set[ScriptedRun] = set()
        """Runs that were cancelled or detached."""

    def attach(self) -> None:
        if self.coming:
            run = self.coming.pop()
            weight, priority = self.claims[run]
            self.host.attach(run, run.events.append, weight=weight, priority=priority)

    def act(self, action: str, index: int) -> None:
        run = self.runs[index % len(self.runs)]
        if action == "idle":
            self.host.idle()
        elif action == "between":
            self.host.between_steps(0.05, decoding=True, waiting_since=None)
        elif action == "stopped":  # a prompt waits, so that nothing may train
            self.host.between_steps(0.05, decoding=False, waiting_since=0.0)
        elif action == "attach":
            self.attach()
        elif action == "answer":
            run.answer({})
        elif action == "detach" and run not in self.coming:
            self.host.detach(run)
            self.ended.add(run)
        elif action == "cancel":
            run.cancel()
            self.ended.add(run)
        elif action == "pause":
            run.pause()
        elif action == "resume":
            run.resume()
        self.check()

    def check(self) -> None:
        attached = [run for run in self.runs if run not in self.coming]
        sizes: Counter[tuple[int, bool]] = Counter()
        for run in attached:
            if run.offered is not None and run.leads:
                several = [run.offered, *run.offered.beside]
                tokens = sum(one.tokens for one in several)
                assert len(several) == 1 or tokens <= MAX_JOINT_TOKENS
                sizes[self.claims[run][1], tokens > MAX_JOINT_TOKENS] += 1
        assert all(count == 1 for count in sizes.values()), "of each priority one that is shared, and one larger"
        for run in attached:
            if run.offered is not None and run.offered.waits:
                leader = run.offered.leader
                assert any(other.offered is leader and other.ready for other in attached), "a pass has its leader"

    def finish(self) -> None:
        """Drive all to the end; fails where they do not get there."""
        while self.coming:
            self.attach()
        for _ in range(2000):
            if all(run.pacer.done for run in self.runs):
                return
            for run in self.runs:
                run.resume()
                run.answer({})
            assert self.host.ready
            self.host.idle()
            self.check()
        raise AssertionError("some never end")


@settings(max_examples=200, deadline=None)
@given(
    scripts=st.lists(SCRIPTS, min_size=1, max_size=5),
    claims=st.lists(st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 1)), min_size=5, max_size=5),
    actions=st.lists(ACTIONS, max_size=60),
)
def test_each_run_ends_as_its_script_says(
    scripts: list[list[tuple[str, int]]], claims: list[tuple[float, int]], actions: list[tuple[str, int]]
) -> None:
    driver = Driver(scripts, claims)
    for action, index in actions:
        driver.act(action, index)
    driver.finish()
    for run, script in zip(driver.runs, scripts, strict=True):
        kinds = [kind for kind, _ in script]
        if run in driver.ended:
            continue
        expected = kinds.index("breaks") if "breaks" in kinds else len(kinds)
        assert run.done == expected
        assert [type(event).__name__ for event in run.events] == ["FailedEvent"] * ("breaks" in kinds)
    assert sum(run.pacer.busy_seconds for run in driver.runs) <= driver.clock.now + 1e-6
    assert all(run.pacer.busy_seconds >= -1e-6 for run in driver.runs)


def test_a_pass_does_not_wait_for_a_long_evaluation() -> None:
    clock, owner = Clock(), host()
    evaluating, training = ScriptedRun(clock, [("own", 1000)]), ScriptedRun(clock, [("pass", 200)] * 10)
    for run in (evaluating, training):
        owner.attach(run, run.events.append)
    while not training.pacer.done:
        owner.idle()
    assert clock.now < 2.5 * 10 * 200 * TOKEN_SECONDS


def test_each_of_equal_runs_has_its_part_of_the_time_beside_requests() -> None:
    """Between steps that leave less time than a whole pass takes."""
    clock, owner = Clock(), host()
    runs = [ScriptedRun(clock, [("pass", tokens), ("own", 1)] * 1000) for tokens in (64, 150, 400, 600)]
    for run in runs:
        owner.attach(run, run.events.append)
    while clock.now < 200:
        owner.between_steps(0.3, decoding=True, waiting_since=None)
    assert [run.pacer.busy_seconds / clock.now for run in runs] == pytest.approx([1 / 4] * 4, abs=0.01)
