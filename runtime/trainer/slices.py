"""Training cut into slices: the noun, and the pacer that learns what each kind costs.

A training step is a generator. Before each piece of work it yields a `Slice` that says what comes next and how
much of it there is, and is sent back how much it may do now. So the same loop runs a whole layer at once on an idle
machine, and a few tokens of it between two inference steps. Uses no tensors.
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch


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
        self, budget: float, may_go_on: Callable[[], bool] = lambda: True, *, longest: float | None = None
    ) -> float:
        """Do slices for about `budget` seconds; returns the seconds spent.

        A slice that would not fit is cut, but never below its `least`: then it is left for another time. One of
        unknown cost is tried with the least there can be. `may_go_on` is called before each. With
        `longest` the last slice may exceed the budget: none is cut that takes no longer than that.
        """
        if longest is None:
            self._usual += EMA_WEIGHT * (budget - self._usual) if self._usual else budget
        spent = 0.0
        while not self.done and may_go_on() and (longest is None or spent < budget):
            wanted = self.peek()
            if wanted is None:
                break
            kind, granted = self._grant(wanted, longest or budget - spent)
            if granted == 0:
                if spent == 0:
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
        """By priority: the virtual time that the last run had before its slice."""

    def add(self, run: R, *, weight: float = 1.0, priority: int = 0) -> None:
        """Take in a run. `weight`: its share of the time is to that of another as their weights are."""
        self._claims[run] = _Claim(weight, priority)

    def remove(self, run: R) -> None:
        """Forget a run. An unknown one is fine."""
        self._claims.pop(run, None)

    def next_of(self, ready: Iterable[R]) -> R | None:
        """The run that gets the next slice, of the runs that are `ready`; None where none is."""
        claims = {run: self._claims[run] for run in ready}
        if not claims:
            return None
        first = max(claim.priority for claim in claims.values())
        reached = self._reached.get(first, 0.0)
        equals = {run: claim for run, claim in claims.items() if claim.priority == first}
        for claim in equals.values():
            claim.virtual = max(claim.virtual, reached)
        run = min(equals, key=lambda one: equals[one].virtual)
        self._reached[first] = equals[run].virtual
        return run

    def charge(self, run: R, seconds: float) -> None:
        """Count what a run used."""
        claim = self._claims[run]
        claim.virtual += seconds / claim.weight
