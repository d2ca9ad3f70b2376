"""Searches on the engine: each beam is a request of its own for the scheduler, and one together for the client.

A step tells a beam's likeliest next tokens. When all beams of a search have told theirs, those that are not
followed end, which frees what only they held; one child of each beam goes on in its parent's place, and further
children branch off in blocks that they share with it.
"""

import time
from dataclasses import dataclass, field

from runtime.beams.search import Beam, Branch, Candidates, Hypothesis, Search
from runtime.delivery import Delivery
from runtime.messages import BeamSearch, FinishReason, Output
from runtime.scheduler import Committed, Request, Scheduler


@dataclass(slots=True)
class Group:
    """One search and its live beams."""

    leader: Request
    """The request of the client. As a beam it may have ended."""
    search: Search
    live: list[tuple[Request, float]]
    """Beams and their log-probabilities."""
    told: dict[str, Candidates] = field(default_factory=dict)
    """By the ids of the beams that have."""
    branches: int = 0
    """Beams that have split off so far."""

    @property
    def complete(self) -> bool:
        return len(self.told) == len(self.live)

    def beams(self) -> list[Beam]:
        return [
            Beam(request.tokens[request.prompt_len :], logprob, self.told[request.id]) for request, logprob in self.live
        ]


class BeamSearches:
    """All that run."""

    def __init__(self, scheduler: Scheduler, delivery: Delivery) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._groups: dict[str, Group] = {}
        """By the id of the client's request."""
        self._group_of: dict[str, Group] = {}
        """By the ids of the live beams."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def begin(self, request: Request, beams: BeamSearch) -> None:
        """`request` is queued; its prompt is the first beam."""
        search = Search(
            beams,
            max_tokens=request.max_len - request.prompt_len,
            stop_ids=request.stop_ids,
            keep=request.candidates,
        )
        group = Group(request, search, [(request, 0.0)])
        self._groups[request.id] = self._group_of[request.id] = group

    def deliver(self, item: Committed) -> list[Output]:
        """What a beam has told, or its end by the scheduler. Gives the one output of a search that is over."""
        group = self._group_of.get(item.request.id)
        if group is None:  # ended with its search
            return []
        if item.candidates is None:
            return [self._end(group, item.request.finish_reason or "error", error=item.error)]
        group.told[item.request.id] = item.candidates
        return self._advance(group) if group.complete else []

    def end(self, request_id: str, reason: FinishReason) -> None:
        """End a search wherever it is."""
        self._end(self._groups[request_id], reason)

    def _advance(self, group: Group) -> list[Output]:
        followed = group.search.advance(group.beams())
        error = self._delivery.note_tokens(group.leader, len(followed) or len(group.live))
        if error is not None:
            return [self._end(group, "error", error=error)]
        if group.search.over:
            best = group.search.best
            return [self._end(group, "stop" if best[0].stopped else "length", best)]
        self._follow(group, followed)
        return []

    def _follow(self, group: Group, followed: list[Branch]) -> None:
        """Make `followed` the live beams."""
        parents = [request for request, _ in group.live]
        for index in set(range(len(parents))) - {branch.parent for branch in followed}:
            self._drop(parents[index])
        heirs: dict[int, Branch] = {}
        live: list[tuple[Request, float]] = []
        for branch in followed:
            request = parents[branch.parent]
            if branch.parent in heirs:
                group.branches += 1
                name = f"{group.leader.id}/beam-{group.branches}"
                request = self._scheduler.branch(request, name, branch.token)
                self._group_of[name] = group
            else:
                heirs[branch.parent] = branch
            live.append((request, branch.logprob))
        for index, branch in heirs.items():  # after all have branched off
            self._scheduler.extend(parents[index], branch.token)
        group.live = live
        group.told.clear()

    def _drop(self, request: Request) -> None:
        self._scheduler.finish(request, "abort")
        del self._group_of[request.id]

    def _end(
        self, group: Group, reason: FinishReason, best: list[Hypothesis] | None = None, error: str | None = None
    ) -> Output:
        leader, best = group.leader, best or []
        for request, _ in group.live:
            self._drop(request)
        del self._groups[leader.id]
        timing = leader.timing
        timing.finish_reason, timing.finished = reason, time.monotonic()
        timing.generated_tokens = sum(len(one.tokens) for one in best)
        error = self._delivery.forget(leader) or error
        return Output(
            request_id=leader.id,
            finish_reason=timing.finish_reason,
            prompt_tokens=leader.prompt_len,
            cached_tokens=timing.cached_tokens,
            generated_tokens=timing.generated_tokens,
            choices=[self._choice(leader, one) for one in best],
            error=error,
        )

    def _choice(self, leader: Request, one: Hypothesis) -> Output:
        asked = leader.params.stop_token_ids
        return Output(
            request_id=leader.id,
            text=self._delivery.text_of(leader, one.tokens[:-1] if one.stopped else one.tokens),
            token_ids=one.tokens,
            finish_reason="stop" if one.stopped else "length",
            stop_reason=one.tokens[-1] if one.stopped and one.tokens[-1] in asked else None,
            generated_tokens=len(one.tokens),
            cumulative_logprob=one.logprob,
        )
