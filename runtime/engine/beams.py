"""Searches on the engine: each beam is a request of its own for the scheduler, and one together for the client.

A step gives a beam's likeliest next tokens. Once all beams of a search have theirs, beams without a child end, which
frees the blocks that only they held. One child of each other beam continues in its parent's place. Further children
branch off in blocks that they share with it.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from runtime.engine.delivery import Delivery
from runtime.messages import BeamSearch, FinishReason, Output
from runtime.scheduler import INTERNAL_ERROR, Committed, Request, Scheduler

# -- beam search -----------------------------------------------------------------------------------
#
# Choice of the beams that continue or are complete, and the test for the end of a search.
#
# The algorithm is that of transformers' `GenerationMixin._beam_search` (5.x), so that sequences and scores are the
# same. Deals in tokens and log-probabilities, not in requests or text.

Candidates = list[tuple[int, float]]
"""Token ids that may follow, and their log-probabilities."""


class Beam(NamedTuple):
    """A sequence that is not complete, and what may follow it."""

    tokens: list[int]
    """Tokens generated so far."""
    logprob: float
    candidates: Candidates


class Branch(NamedTuple):
    """A sequence that continues: one of the beams, and a token."""

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
    """True if its last token ended it, False if it has reached the length."""


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
        """Advance the search by one token. Returns the sequences to follow now, likeliest first; None when it is
        over."""
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
        """True if no live sequence is to become better than the worst complete one. `first` is the likeliest of the
        live ones."""
        search = self._search
        if len(self._done) < search.width:
            return False
        if search.early_stopping is True:
            return True
        longest = search.early_stopping == "never" and search.length_penalty > 0
        power: float = (self._max_tokens if longest else length) ** search.length_penalty
        return first.logprob / power <= self._done[-1].score


@dataclass(slots=True)
class BeamGroup:
    """One search and its live beams."""

    leader: Request
    """The request of the client. As a beam it may have ended."""
    search: Search
    live: list[tuple[Request, float]]
    """Beams and their log-probabilities."""
    members: dict[int, Request] = field(default_factory=dict)
    """Its beams that have not ended, by id: those in `live`, and while a step is taken in also their children."""
    candidates_of: dict[int, Candidates] = field(default_factory=dict)
    """Candidates by beam id, of the beams that have them already."""

    @property
    def complete(self) -> bool:
        return len(self.candidates_of) == len(self.live)

    def beams(self) -> list[Beam]:
        return [
            Beam(request.tokens[request.prompt_len :], logprob, self.candidates_of[request.id])
            for request, logprob in self.live
        ]


class BeamSearches:
    """All searches that run."""

    def __init__(self, scheduler: Scheduler, delivery: Delivery) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._groups: dict[int, BeamGroup] = {}
        """Searches by the id of the client's request."""
        self._group_of: dict[int, BeamGroup] = {}
        """Searches by the ids of their live beams."""

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._groups

    def begin(self, request: Request, beams: BeamSearch) -> None:
        """Begin a search. `request` is queued; its prompt is the first beam."""
        search = Search(
            beams,
            max_tokens=request.max_len - request.prompt_len,
            stop_ids=request.stop_ids,
            keep=request.candidates,
        )
        group = BeamGroup(request, search, [(request, 0.0)], {request.id: request})
        self._groups[request.id] = self._group_of[request.id] = group

    def deliver(self, item: Committed) -> list[Output]:
        """Take in a beam's candidates, or its end by the scheduler. Returns the one output of a search that is over."""
        group = self._group_of.get(item.request.id)
        if group is None:  # ended with its search
            return []
        if item.candidates is None:
            return [self._end(group, item.request.finish_reason or "error", error=item.error)]
        group.candidates_of[item.request.id] = item.candidates
        return self._advance(group) if group.complete else []

    def fail(self, item: Committed) -> list[Output]:
        """End the search with a beam for which `deliver` has raised."""
        group = self._group_of.get(item.request.id)
        return [] if group is None else [self._end(group, "error", error=INTERNAL_ERROR)]

    def end(self, request_id: int, reason: FinishReason) -> None:
        """End a search in any state."""
        self._end(self._groups[request_id], reason)

    def _advance(self, group: BeamGroup) -> list[Output]:
        followed = group.search.advance(group.beams())
        error = self._delivery.note_tokens(group.leader, len(followed) or len(group.live))
        if error is not None:
            return [self._end(group, "error", error=error)]
        if group.search.over:
            best = group.search.best
            return [self._end(group, "stop" if best[0].stopped else "length", best)]
        self._follow(group, followed)
        return []

    def _follow(self, group: BeamGroup, followed: list[Branch]) -> None:
        """Make `followed` the live beams."""
        parents = [request for request, _ in group.live]
        for index in set(range(len(parents))) - {branch.parent for branch in followed}:
            self._drop(group, parents[index])
        heirs: dict[int, Branch] = {}
        live: list[tuple[Request, float]] = []
        for branch in followed:
            request = parents[branch.parent]
            if branch.parent in heirs:
                request = self._scheduler.branch(request, branch.token)
                self._group_of[request.id] = group
                group.members[request.id] = request
            else:
                heirs[branch.parent] = branch
            live.append((request, branch.logprob))
        for index, branch in heirs.items():  # after all have branched off
            self._scheduler.extend(parents[index], branch.token)
        group.live = live
        group.candidates_of.clear()

    def _drop(self, group: BeamGroup, request: Request) -> None:
        self._scheduler.finish(request, "abort")
        del self._group_of[request.id], group.members[request.id]

    def _end(
        self, group: BeamGroup, reason: FinishReason, best: list[Hypothesis] | None = None, error: str | None = None
    ) -> Output:
        leader, best = group.leader, best or []
        choices = [self._choice(leader, one) for one in best]  # first: what raises here has ended nothing yet
        for request in list(group.members.values()):
            self._drop(group, request)
        del self._groups[leader.id]
        timing = leader.timing
        timing.finish_reason, timing.finished = reason, time.monotonic()
        timing.generated_tokens = sum(len(one.tokens) for one in best)
        error = self._delivery.forget(leader) or error
        return Output(
            id=leader.id,
            request_id=leader.submission.request_id,
            finish_reason=timing.finish_reason,
            prompt_tokens=leader.prompt_len,
            cached_tokens=timing.cached_tokens,
            generated_tokens=timing.generated_tokens,
            choices=choices,
            error=error,
        )

    def _choice(self, leader: Request, one: Hypothesis) -> Output:
        asked = leader.params.stop_token_ids
        return Output(
            id=leader.id,
            request_id=leader.submission.request_id,
            text=self._delivery.text_of(leader, one.tokens[:-1] if one.stopped else one.tokens),
            token_ids=one.tokens,
            finish_reason="stop" if one.stopped else "length",
            stop_reason=one.tokens[-1] if one.stopped and one.tokens[-1] in asked else None,
            generated_tokens=len(one.tokens),
            cumulative_logprob=one.logprob,
        )
