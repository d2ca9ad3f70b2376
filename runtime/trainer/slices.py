"""Training cut into slices: the noun, the pacer that learns what each kind costs, and the time that it may take.

A training step is a generator. Before each piece of work it yields a `Slice` that says what comes next and how
much of it there is, and is sent back how much it may do now. So the same loop runs a whole layer at once on an idle
machine, and a few tokens of it between two inference steps. Uses no tensors.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

from runtime.events import LatencyTarget
from settings.schema import SchedulerSettings


@dataclass(frozen=True, slots=True)
class Slice:
    """The next piece of work of a training step."""

    kind: str
    """Pieces of one kind cost alike: what is learned of one is used for the next."""
    amount: int
    """Amount of the work, in the kind's own unit (tokens, heads, layers). At least 1."""
    least: int = 1
    """Do not cut it smaller than this: below, the overhead is the most of it."""
    then: str | None = None
    """Kind of the work that will later be done on exactly this piece: it should fit too."""
    again: str | None = None
    """This piece is there already, as a whole: to cut it is to compute it again, which is work of this kind."""


# A learned cost that keeps work from being tried is lowered by this factor.
DOUBTED_COST_FACTOR = 0.9
# Weight of the newest value in learned costs; and of one that exceeds `JUMP_RATIO` times what was learned.
COST_WEIGHT = 0.2
JUMP_WEIGHT, JUMP_RATIO = 0.5, 2.0
# Weight of the newest value in smoothed budgets.
EMA_WEIGHT = 0.1

T = TypeVar("T")
Sliced: TypeAlias = Generator[Slice, int, T]
"""Yields the work to do; is sent how much of it may be done: at least the `least`, at most the `amount`."""
Slices: TypeAlias = Sliced[None]


class Pacer:
    """Drives a generator of slices, some seconds at a time."""

    def __init__(self, slices: Slices, clock: Callable[[], float] = time.monotonic, *, whole: bool = False) -> None:
        """`whole`: cut nothing, however long it takes."""
        self._slices = slices
        self._clock = clock
        self._whole = whole
        self._rates: dict[str, float] = {}
        self._next: Slice | None = None
        self._started = False
        self.done = False
        self._usual = 0.0
        """Seconds of a budget: smoothed."""
        self.busy_seconds = 0.0
        """Spent inside slices so far."""

    def run(
        self,
        budget: float,
        may_go_on: Callable[[], bool] = lambda: True,
        *,
        longest: float | None = None,
        rest: bool = False,
    ) -> float:
        """Do slices for about `budget` seconds; returns the seconds spent.

        A slice that would not fit is cut, but never below its `least`: then it is left for another time. One of
        unknown cost is tried with the least there can be. `may_go_on` is called before each. With
        `longest` the last slice may exceed the budget: none is cut that takes no longer than that. `rest`: it is what
        is left of a budget, so that nothing is learned where no slice fits.
        """
        if longest is None and not rest:
            self._usual += EMA_WEIGHT * (budget - self._usual) if self._usual else budget
        spent = 0.0
        while not self.done and may_go_on() and (longest is None or spent < budget):
            wanted = self.peek()
            if wanted is None:
                break
            kind, granted = self._grant(wanted, longest or budget - spent)
            if granted == 0:
                if spent == 0 and not rest:
                    self._doubt(kind, wanted.then)
                break
            spent += self.do(kind, granted)
        return spent

    @property
    def rates(self) -> dict[str, float]:
        """Seconds for one of each kind's unit, for the kinds measured so far. A copy."""
        return dict(self._rates)

    def learn(self, rates: Mapping[str, float]) -> None:
        """Take over another run's rates, so that the same pieces are cut as it would have cut."""
        self._rates.update(rates)

    def close(self) -> None:
        self._slices.close()
        self.done = True

    def peek(self) -> Slice | None:
        """The next slice; None at the end."""
        if not self._started:
            self._started = True
            self._advance(None)
        return self._next

    def _grant(self, wanted: Slice, seconds: float) -> tuple[str, int]:
        """Kind of the work to do now, and how much of the slice that is."""
        least = min(wanted.least, wanted.amount)
        kind = wanted.kind
        if self._whole:
            return kind, wanted.amount
        if wanted.again is not None:
            cost = self._rates.get(kind, 0.0) * wanted.amount
            if cost <= seconds:
                return kind, wanted.amount
            if cost <= self._usual:
                return kind, 0  # better later than twice
            kind = wanted.again
        rate = self._rates.get(kind)
        if rate is None:
            return kind, least if seconds > 0 else 0
        if wanted.then is not None:
            rate = max(rate, self._rates.get(wanted.then, rate))
        fits = wanted.amount if seconds == float("inf") else int(seconds / rate)
        if fits < least:
            return kind, 0
        # A rest too small to be worth a slice of its own is done along with this one.
        return kind, wanted.amount if wanted.amount - fits < least else fits

    def _doubt(self, kind: str, then: str | None) -> None:
        """Lower a learned cost that may be wrong (something else ran): else the work would never be tried again."""
        for one in (kind, then):
            if one in self._rates:
                self._rates[one] *= DOUBTED_COST_FACTOR

    def do(self, kind: str, granted: int) -> float:
        """Do `granted` units of the slice that `peek` gave, as work of this kind; returns the seconds it took."""
        begin = self._clock()
        self._advance(granted)
        seconds = self._clock() - begin
        self.busy_seconds += seconds
        rate = max(seconds, 1e-7) / granted
        known = self._rates.get(kind, rate)
        # Follow the mean of costs, and a jump at once: a kind that is as cheap as believed fills its budgets.
        weight = JUMP_WEIGHT if rate > JUMP_RATIO * known else COST_WEIGHT
        self._rates[kind] = known + weight * (rate - known)
        return seconds

    def _advance(self, granted: int | None) -> None:
        try:
            self._next = next(self._slices) if granted is None else self._slices.send(granted)
        except StopIteration:
            self._next = None
            self.done = True


# -- clock -----------------------------------------------------------------------------------------
#
# Time as training spends it, on any device.


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, monotonic, after all earlier work of the device is done.

    A GPU works on what was launched long after the launches have returned. By a plain clock every slice would cost
    next to nothing, but the one that waits for a result; so far more would be launched between two steps of requests
    than they allow, and they wait behind it in the same stream.
    """
    if device.type != "cuda":
        return time.monotonic

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.monotonic()

    return clock


# -- several runs ----------------------------------------------------------------------------------
#
# The choice which of several runs gets the next slice: the highest priority first, among equals by weight.
#
# Each run has a virtual time, the seconds that it trained over its weight, and the run with the least is next
# (start-time fair queueing, doi:10.1109/90.649569). A run that joins, or could do nothing for a while, begins where the
# others are: time that it did not ask for is not owed to it.

R = TypeVar("R")


@dataclass
class _Claim:
    weight: float
    priority: int
    virtual: float = 0.0


class FairQueue(Generic[R]):
    """Runs at work, told apart by their hash. Deals in seconds only."""

    def __init__(self) -> None:
        self._claims: dict[R, _Claim] = {}
        self._reached: dict[int, float] = {}
        """By priority: the least virtual time of the runs that wanted the last slice."""

    def add(self, run: R, *, weight: float = 1.0, priority: int = 0) -> None:
        """Take in a run. `weight`: its share of the time is to that of another as their weights are."""
        self._claims[run] = _Claim(weight, priority)

    def remove(self, run: R) -> None:
        """Forget a run. An unknown one is fine."""
        self._claims.pop(run, None)

    def next_of(self, ready: Iterable[R], wanting: Iterable[R] = ()) -> R | None:
        """The run that gets the next slice, of the runs that are `ready`; None where none is. `wanting`: others that
        cannot use the slice, and want their time all the same."""
        equals = self._equals(ready)
        if not equals:
            return None
        run = min(equals, key=lambda one: equals[one].virtual)
        first = equals[run].priority
        others = [claim.virtual for claim in map(self._claims.__getitem__, wanting) if claim.priority == first]
        self._reached[first] = max(self._reached.get(first, 0.0), min([equals[run].virtual, *others]))
        return run

    def turns(self, ready: Iterable[R], cost: Callable[[R], float]) -> Iterator[R]:
        """The runs that would get the next turns, if a turn of a run cost this many seconds; ends before one would have
        its second."""
        equals = self._equals(ready)
        virtual = {run: claim.virtual for run, claim in equals.items()}
        had: set[R] = set()
        while virtual and (run := min(virtual, key=virtual.__getitem__)) not in had:
            had.add(run)
            yield run
            virtual[run] += cost(run) / equals[run].weight

    def priority(self, run: R) -> int:
        """The priority that it was added with."""
        return self._claims[run].priority

    def _equals(self, ready: Iterable[R]) -> dict[R, _Claim]:
        """The claims of those with the highest priority."""
        claims = {run: self._claims[run] for run in ready}
        first = max((claim.priority for claim in claims.values()), default=0)
        equals = {run: claim for run, claim in claims.items() if claim.priority == first}
        for claim in equals.values():
            claim.virtual = max(claim.virtual, self._reached.get(first, 0.0))
        return equals

    def charge(self, run: R, seconds: float) -> None:
        """Count what a run used."""
        claim = self._claims[run]
        claim.virtual += seconds / claim.weight


# -- share -----------------------------------------------------------------------------------------
#
# Time that training may take between two inference steps, so that requests keep their latency targets.
#
# A token of a stream takes the time of its step and of the training before it. The target bounds that sum; the time
# that it leaves beside the step is the slack, and training gets it, less a reserve that grows with every token that was
# late and shrinks with every other: as large as the percentile of the target requires. A prompt that waits gets all of
# the time for a while; after that, training has its least share again. Counts seconds only, and uses no tensors.

# Part of a budget that a later one may exceed its own by, where no slice was small enough to use it.
MAX_SAVED_GAPS = 0.2
# A step counts as at most this many times the typical one.
MAX_RISE_RATIO = 1.25
# Once in this number of tokens no training precedes one, to measure what a step takes without it.
PROBE_STEPS = 64
# Part of the slack by which the reserve grows with a late token, at the most.
RESERVE_STEP = 0.05
# Part of the time without waiting prompts that refills the time of undisturbed prefill.
PATIENCE_REFILL = 0.5


@dataclass(frozen=True, kw_only=True)
class LatencyTargets:
    """Targets of requests that training must leave room for. Times in seconds."""

    tpot: float | None = None
    """Time per output token; None: `tpot_ratio` decides."""
    tpot_ratio: float = 1.3
    """Time per output token, in times of what it is without training."""
    ttft: float = 1.0
    """Time to first token."""
    percentile: float = 0.95
    """Share of tokens for which the time per output token holds."""

    @classmethod
    def of(cls, settings: SchedulerSettings) -> "LatencyTargets":
        """The targets of the settings."""
        return cls(
            tpot=settings.tpot_target,
            tpot_ratio=settings.tpot_ratio,
            ttft=settings.ttft_target,
            percentile=settings.tpot_percentile,
        )


class TrainingShare:
    """Budgets for one engine. `budget` and `settle` are called in turns, once a step."""

    def __init__(
        self,
        targets: LatencyTargets,
        *,
        min_share: float,
        on_miss: Callable[[LatencyTarget], None] = lambda target: None,
    ) -> None:
        """`min_share`: share of the time that training gets in any case. `on_miss` is called for a token that was late,
        and would have been in time without training."""
        self._targets = targets
        self._floor = min_share / (1 - min_share)
        self._on_miss = on_miss
        self._typical: float | None = None
        """Seconds of a step that only decodes: smoothed."""
        self._slowdown = 1.0
        """Times that a step takes after training (caches are cold) what it takes without: smoothed."""
        self._since_probe = 0
        self._reserve = 0.0
        """Part of the slack that is not used."""
        self._saved = 0.0
        self._spent = 0.0
        """Seconds of training before the step that comes next."""
        self._rode = 0.0
        """Seconds of the last step that riding tokens took."""
        self._patience = targets.ttft
        """Seconds of prefill that training still leaves undisturbed."""
        self._waiting = _Waiting()
        self.slack_used = 0.0
        """Part of the slack that training used: smoothed; above 1 where its least share exceeds the slack."""

    @property
    def typical(self) -> float | None:
        """Seconds of a step that only decodes, with nothing riding; None before the first."""
        return self._typical

    @property
    def slack(self) -> float:
        """Seconds that the target leaves beside such a step; at least 0."""
        return 0.0 if self._typical is None else max(0.0, self._slack(self._typical))

    @property
    def probes(self) -> bool:
        """True if the step that comes next is to be measured without training before it."""
        return self._since_probe == 0

    def budget(
        self,
        step_seconds: float,
        *,
        decoding: bool,
        waiting_since: float | None,
        now: float,
        rode: float | None = None,
    ) -> float:
        """Seconds for the gap after a step, savings and debts included; may be negative.

        Args:
            step_seconds: time of the step.
            decoding: True if the step did nothing but decode, so that it is one between two tokens.
            waiting_since: arrival of the oldest request without a token, on the clock of `now`; None: there is none.
            rode: seconds of the step that riding tokens took, which training has had; None: there were none.
        """
        self._rode = rode or 0.0
        if decoding:
            self._judge(step_seconds, rides=rode is not None)
        if self._waiting.look(waiting_since, now, self._targets.ttft):
            self._on_miss("ttft")
        if waiting_since is not None:
            return self._budget_beside_prefill(step_seconds, now - waiting_since)
        self._patience = min(self._targets.ttft, self._patience + PATIENCE_REFILL * step_seconds)
        self._since_probe += 1
        if self._since_probe > PROBE_STEPS and decoding:
            self._since_probe = 0
            return min(0.0, self._saved)
        least = self._floor * step_seconds
        gap = max(self._slack(step_seconds - self._rode) * (1 - self._reserve), least) - self._rode
        self._saved = min(self._saved, MAX_SAVED_GAPS * gap)
        return gap + self._saved

    def settle(self, budget: float, spent: float) -> None:
        """Save what is left of a budget, owe what is missing."""
        self._saved = budget - spent
        self._spent = spent
        self._waiting.trained += spent
        if budget > 0 and self._typical is not None and (slack := self._slack(self._typical)) > 0:
            self.slack_used += EMA_WEIGHT * ((spent + self._rode) / slack - self.slack_used)

    def _budget_beside_prefill(self, step_seconds: float, waited: float) -> float:
        """Nothing, until prefill has had all of the time for long enough; then, and where a first token is late
        already, the least share. Debts stay, savings go: they are for gaps between tokens."""
        self._saved = min(self._saved, 0.0)
        self._patience -= step_seconds
        if self._patience > 0 and waited <= self._targets.ttft:
            return self._saved
        self._patience = max(self._patience, 0.0)
        return self._floor * step_seconds + self._saved

    def _slack(self, step_seconds: float) -> float:
        """Seconds that the target leaves beside a step; negative where a step alone exceeds it."""
        typical = self._typical or step_seconds
        if self._targets.tpot is not None:
            return self._targets.tpot - max(step_seconds, typical)  # more requests make steps longer at once
        return (self._targets.tpot_ratio / self._slowdown - 1) * typical

    def _judge(self, step_seconds: float, *, rides: bool) -> None:
        """Learn from a token: what its step took, and whether the training before it, or in it, made it late."""
        known = self._typical or step_seconds
        if self._spent == 0.0 and self._since_probe == 0 and self._typical is not None:
            seen = min(MAX_RISE_RATIO, max(1.0, known / step_seconds))
            self._slowdown += EMA_WEIGHT * (seen - self._slowdown)
        target = self._targets.tpot or self._targets.tpot_ratio * known / self._slowdown
        late = self._spent + step_seconds > target
        if step_seconds - self._rode <= target:  # else training is not the cause
            part = self._targets.percentile if late else self._targets.percentile - 1
            self._reserve = min(1.0, max(0.0, self._reserve + RESERVE_STEP * part))
            if late:
                self._on_miss("tpot")
        if rides and step_seconds >= known:  # how much of it is the step's own is not known
            return
        # One step that took ten times as long, because something else ran, is not typical.
        self._typical = known + EMA_WEIGHT * (min(step_seconds, MAX_RISE_RATIO * known) - known)


class _Waiting:
    """The oldest request without a token, and the training while it waits."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.trained = 0.0
        """Seconds."""

    def look(self, since: float | None, now: float, target: float) -> bool:
        """True if the request that waited so far has its token, late because of training. Then another one waits."""
        if since == self._since:
            return False
        waited = 0.0 if self._since is None else now - self._since
        missed = waited > target >= waited - self.trained
        self._since, self.trained = since, 0.0
        return missed
