"""The choice which of several runs gets the next slice: the highest priority first, among equals by weight.

Each run has a virtual time, the seconds that it trained over its weight, and the run with the least is next
(start-time fair queueing, doi:10.1109/90.649569). A run that joins, or could do nothing for a while, begins where the
others are: time that it did not ask for is not owed to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

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
        """The run that gets the next slice, of those that have anything to do; None where there are none."""
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
