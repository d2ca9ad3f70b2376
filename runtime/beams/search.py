"""Which beams go on, which are complete, and when nothing better can come.

The algorithm is that of transformers' `GenerationMixin._beam_search` (5.x), so that sequences and scores are the
same. Knows tokens and log-probabilities, and neither requests nor text.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from runtime.messages import BeamSearch

Candidates = list[tuple[int, float]]
"""Token ids that may follow, and their log-probabilities."""


class Beam(NamedTuple):
    """A sequence that is not complete, and what may follow it."""

    tokens: list[int]
    """What was generated so far."""
    logprob: float
    candidates: Candidates


class Branch(NamedTuple):
    """A sequence that goes on: one of the beams, and a token."""

    logprob: float
    parent: int
    """Index of the beam."""
    token: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete output."""

    score: float
    """Its log-probability by its length to the power of `length_penalty`."""
    logprob: float
    tokens: list[int]
    stopped: bool
    """By its last token; else it has reached the length."""


class Search:
    """One prompt's search."""

    def __init__(self, search: BeamSearch, *, max_tokens: int, stop_ids: frozenset[int], keep: int) -> None:
        """`max_tokens` of output at most. The `keep` likeliest sequences of a step are looked at, more than `width`,
        because some of them may be complete."""
        self._search = search
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._keep = keep
        self._done: list[Hypothesis] = []
        self.over = False

    @property
    def best(self) -> list[Hypothesis]:
        """The answer so far, best first."""
        return self._done[: self._search.best]

    def advance(self, beams: Sequence[Beam]) -> list[Branch]:
        """One more token: which sequences are followed now, likeliest first. None when it is over."""
        length = len(beams[0].tokens) + 1
        branches = (
            Branch(beam.logprob + logprob, index, token)
            for index, beam in enumerate(beams)
            for token, logprob in beam.candidates
        )
        likeliest = heapq.nlargest(self._keep, branches, key=attrgetter("logprob"))
        open_ = [branch for branch in likeliest if not self._complete(branch, length)]
        for branch in likeliest[: self._search.width]:
            if self._complete(branch, length):
                self._finish(branch, beams[branch.parent], length)
        self.over = not open_ or self._enough(open_[0], length)
        return [] if self.over else open_[: self._search.width]

    def _complete(self, branch: Branch, length: int) -> bool:
        return branch.token in self._stop_ids or length >= self._max_tokens

    def _finish(self, branch: Branch, beam: Beam, length: int) -> None:
        self._done.append(
            Hypothesis(
                score=branch.logprob / length**self._search.length_penalty,
                logprob=branch.logprob,
                tokens=[*beam.tokens, branch.token],
                stopped=branch.token in self._stop_ids,
            )
        )
        self._done.sort(key=attrgetter("score"), reverse=True)
        del self._done[self._search.width :]

    def _enough(self, first: Branch, length: int) -> bool:
        """Is no live sequence to become better than the worst complete one? `first` is the likeliest of them."""
        search = self._search
        if len(self._done) < search.width:
            return False
        if search.early_stopping is True:
            return True
        longest = search.early_stopping == "never" and search.length_penalty > 0
        power: float = (self._max_tokens if longest else length) ** search.length_penalty
        return first.logprob / power <= self._done[-1].score
