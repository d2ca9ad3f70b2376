"""The waiting requests: their order, the queue's limits, their deadlines.

`Queue` holds all requests that wait: in the policy's order, as followers of another choice of the same prompt, as
beams that wait for their search, or for a place for their adapter. `Deadlines` has the requests whose time is up.
"""

import itertools
import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from runtime.errors import TooManyRequests
from runtime.scheduler.adapters import AdapterPlaces
from runtime.scheduler.pace import Pace
from runtime.scheduler.policies import Policy
from runtime.scheduler.request import Request
from settings.schema import SchedulerSettings

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 120
"""Bounds of Retry-After in a 429."""

MAX_FINISHED_ENTRIES = 64
"""Entries of finished requests that the heap may hold before it is rebuilt."""


class Followers:
    """Choices of one prompt (`n`): the first computes it, the others wait here and then share its blocks."""

    def __init__(self) -> None:
        self._of: dict[int, dict[int, Request]] = {}
        """Leader's id → its followers by id."""
        self.count = 0
        """Followers that wait."""

    def __iter__(self) -> Iterator[Request]:
        for followers in self._of.values():
            yield from followers.values()

    def leads(self, request: Request) -> bool:
        return request.id in self._of

    def add(self, request: Request, leader: Request) -> None:
        request.source = leader
        self._of.setdefault(leader.id, {})[request.id] = request
        self.count += 1

    def release(self, leader: Request) -> list[Request]:
        """Take the followers of `leader` out, in order of arrival."""
        followers = list(self._of.pop(leader.id, {}).values())
        self.count -= len(followers)
        return followers

    def remove(self, request: Request) -> bool:
        """Remove a follower that ends while it waits; False when it is not here."""
        leader = request.source
        followers = self._of.get(leader.id) if leader else None
        if leader is None or followers is None or followers.pop(request.id, None) is None:
            return False
        self.count -= 1
        if not followers:
            del self._of[leader.id]
        return True


def same_prompt(one: Request, other: Request) -> bool:
    """True if the prompts of both have the same KV."""
    a, b = one.submission, other.submission
    return (a.prompt_ids, a.adapter, a.cache_salt) == (b.prompt_ids, b.adapter, b.cache_salt)


class Deadlines:
    """All unfinished requests that have a deadline, whatever the policy."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._entries = itertools.count()

    def add(self, request: Request, num_requests: int) -> None:
        """`num_requests` are not finished; when most entries are of finished ones, those go."""
        deadline = request.submission.deadline
        if deadline is None:
            return
        if len(self._heap) > 2 * num_requests + MAX_FINISHED_ENTRIES:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)
        heappush(self._heap, (deadline, next(self._entries), request))

    def passed(self, now: float) -> Iterator[Request]:
        """Requests whose deadline has passed, each once. O(1) when there are none."""
        while self._heap and self._heap[0][0] <= now:
            request = heappop(self._heap)[2]
            if not request.finished:
                yield request


class Queue:
    """The policy's queue, and beside it the followers, which join it once their leader's prompt is computed, and
    requests whose adapter version has no place in memory."""

    def __init__(self, policy: Policy, settings: SchedulerSettings, pace: Pace, adapters: AdapterPlaces) -> None:
        self.policy = policy
        self.adapters = adapters
        self._max_waiting = settings.max_waiting
        self._max_tokens = settings.max_waiting_tokens
        self.pace = pace
        self.followers = Followers()
        self._aside: dict[int, Request] = {}
        """Beams that have lost their blocks, and have nothing to compute until their search continues."""
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self.policy) + self.num_deferred + len(self.adapters)

    def __iter__(self) -> Iterator[Request]:
        yield from self.policy
        yield from self.followers
        yield from self._aside.values()
        yield from self.adapters

    @property
    def num_deferred(self) -> int:
        """Requests that wait for another request, not for a slot or blocks."""
        return self.followers.count + len(self._aside)

    def check_room(self, num_tokens: int, now: float, *, num_waiting: int) -> None:
        """Raise `TooManyRequests` when the queue has no room for prompts of `num_tokens`, or for a sequence more than
        `num_waiting`.

        A prompt over the limit on tokens is let into an empty queue: it can run, so it must be able to wait.
        """
        waiting, most = self._num_tokens, self._max_tokens
        if num_waiting and waiting + num_tokens > most:
            what = f"{waiting} prompt tokens are waiting, and {num_tokens} more would exceed {most}"
        elif num_waiting >= self._max_waiting:
            what = f"{num_waiting} requests are waiting, of at most {self._max_waiting}"
        else:
            return
        # Half of the queue, not one place: others were sent away too, and come back for the same place.
        seconds = self.pace.seconds_to_admit(waiting / 2, now) or MIN_RETRY_SECONDS
        retry_after = min(max(math.ceil(seconds), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
        raise TooManyRequests(f"The queue is full: {what}. Try again later.", retry_after=retry_after)

    def add(self, request: Request, leader: Request | None) -> None:
        """A new request; `leader` is the one of which it is a fork."""
        if leader is not None and same_prompt(leader, request):
            if leader.num_written < leader.prompt_len:
                self.followers.add(request, leader)
                return
            request.source = leader
        self.push(request)

    def push(self, request: Request) -> None:
        if request.awaiting_expansion:
            self._aside[request.id] = request
            return
        self._num_tokens += len(request.tokens)
        self._place(request)

    def _place(self, request: Request) -> None:
        if not self.adapters.admits(request.submission.adapter):
            self.adapters.wait(request)
            return
        self.policy.push(request)
        self.adapters.on_queued(request)

    def remove(self, request: Request) -> None:
        """The request is admitted, or ends while it waits."""
        if self._aside.pop(request.id, None) is not None or self.followers.remove(request):
            return
        if not self.adapters.discard(request):
            self.policy.remove(request)
            self.adapters.on_dequeued(request)
        self._num_tokens -= len(request.tokens)

    def defer(self, key: str) -> None:
        """Let the requests of an adapter version wait until it has a place again."""
        for request in [one for one in self.policy if one.submission.adapter == key]:
            self.policy.remove(request)
            self.adapters.on_dequeued(request)
            self.adapters.wait(request)

    def recall(self, request: Request) -> None:
        """Queue a beam whose search continues."""
        if self._aside.pop(request.id, None) is not None:
            self.push(request)

    def head(self) -> Request | None:
        """The request to admit next."""
        for request in self.adapters.take_recalled():
            self._place(request)
        return self.policy.peek()

    def release(self, leader: Request) -> None:
        """Queue the followers of `leader`: its prompt is computed, or never will be."""
        if self.followers.leads(leader):
            for follower in self.followers.release(leader):
                self.push(follower)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the count of tokens is wrong."""
        placed = [*self.policy, *self.adapters]
        assert self._num_tokens == sum(len(r.tokens) for r in placed), "waiting tokens are miscounted"
        self.adapters.check_integrity()
