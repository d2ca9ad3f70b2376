"""Training cut into slices: the noun, and the controller that learns what each kind costs.

A training step is a generator. Before each piece of work it yields a `Slice` that says what comes next and how
much of it there is, and is sent back how much it may do now. So the same loop runs a whole layer at once on an idle
machine, and a few tokens of it between two inference steps. Knows no tensors.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar


@dataclass(frozen=True, slots=True)
class Slice:
    """The next piece of work of a training step."""

    kind: str
    """Pieces of one kind cost alike: what is learned of one is used for the next."""
    amount: int
    """How much there is of it, in the kind's own unit (tokens, heads, layers). At least 1."""
    least: int = 1
    """Do not cut it smaller than this: below, the overhead is the most of it."""
    then: str | None = None
    """Kind of the work that will later be done on exactly this piece: it should fit too."""
    again: str | None = None
    """This piece is there already, as a whole: whoever cuts it has it computed again, which is work of this kind."""


DOUBT = 0.9
SMOOTHING = 0.1

T = TypeVar("T")
Sliced: TypeAlias = Generator[Slice, int, T]
"""Yields what it wants to do; is sent how much it may: at least the `least`, at most the `amount`."""
Slices: TypeAlias = Sliced[None]


class Pacer:
    """Drives a generator of slices, some seconds at a time."""

    def __init__(self, slices: Slices, clock: Callable[[], float] = time.monotonic) -> None:
        self._slices = slices
        self._clock = clock
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
        which nothing is known yet is tried with the least there can be. `may_go_on` is asked before each. With
        `longest` the last slice may exceed the budget: none is cut that takes no longer than that.
        """
        if longest is None:
            self._usual += SMOOTHING * (budget - self._usual) if self._usual else budget
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

    def close(self) -> None:
        self._slices.close()
        self.done = True

    def peek(self) -> Slice | None:
        """What is to be done next; None at the end."""
        if not self._started:
            self._started = True
            self._advance(None)
        return self._next

    def _grant(self, wanted: Slice, seconds: float) -> tuple[str, int]:
        """How much of the slice to do now, and which kind of work that is."""
        least = min(wanted.least, wanted.amount)
        kind = wanted.kind
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
        """What was learned may be wrong (something else ran): without doubt it would never be tried again."""
        for one in (kind, then):
            if one in self._rates:
                self._rates[one] *= DOUBT

    def do(self, kind: str, granted: int) -> float:
        """Do so much of what `peek` gave, as work of this kind; returns the seconds it took."""
        begin = self._clock()
        self._advance(granted)
        seconds = self._clock() - begin
        self.busy_seconds += seconds
        rate = max(seconds, 1e-7) / granted
        known = self._rates.get(kind, rate)
        # Dearer news counts at once, cheaper news slowly: too much time taken shows, too little does not.
        self._rates[kind] = max(0.5 * (known + rate), 0.9 * known)
        return seconds

    def _advance(self, granted: int | None) -> None:
        try:
            self._next = next(self._slices) if granted is None else self._slices.send(granted)
        except StopIteration:
            self._next = None
            self.done = True
