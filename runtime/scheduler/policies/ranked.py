"""Queues by rank, then arrival: first come, strict priority, earliest deadline; and requests of the background behind
all others, under any policy."""

import itertools
import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import ClassVar

from runtime.scheduler.pace import Pace
from runtime.scheduler.policies.interface import Policy
from runtime.scheduler.request import Request

SPARE = 64
"""Removed entries that the heap may hold before it is worth rebuilding."""


BACKGROUND_RANK = float("inf")
"""Rank of background requests: the first to be preempted, the last to get tokens of a step."""


class Ranked:
    """A heap whose removed entries are only dropped when they come to the top, or have become the majority."""

    preemptive: ClassVar[bool] = False

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Request]] = []
        self._pushes = itertools.count()
        self._waiting: dict[int, Request] = {}

    def rank(self, request: Request) -> float:
        """Fixed for as long as the request waits."""
        return 0.0

    def outranks(self, waiting: Request, running: Request) -> bool:
        return False

    def should_shed(self, request: Request, now: float, pace: Pace) -> bool:
        return False

    def served(self, request: Request, num_prompt: int, num_generated: int) -> None:
        pass

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._waiting.values(), key=lambda request: (self.rank(request), request.order)))

    def push(self, request: Request) -> None:
        self._waiting[request.id] = request
        heappush(self._heap, (self.rank(request), request.order, next(self._pushes), request))

    def peek(self) -> Request | None:
        heap = self._heap
        while heap:
            request = heap[0][-1]
            if request.id in self._waiting:
                return request
            heappop(heap)
        return None

    def remove(self, request: Request) -> None:
        del self._waiting[request.id]
        if self._heap[0][-1] is request:
            heappop(self._heap)
        elif len(self._heap) > 2 * len(self._waiting) + SPARE:
            self._heap = [entry for entry in self._heap if entry[-1].id in self._waiting]
            heapify(self._heap)


class FirstComeFirstServed(Ranked):
    """Arrival order. A preempted request is in front again: it arrived before all that wait."""


class Priority(Ranked):
    """`priority` of the request, lower first, equals by arrival. One that waits takes the place of one of worse
    priority that runs, whether it lacks a slot or blocks."""

    preemptive: ClassVar[bool] = True

    def rank(self, request: Request) -> float:
        return request.submission.priority

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.submission.priority < running.submission.priority


class EarliestDeadline(Ranked):
    """Requests without a deadline come last, and give up their place to one that has one.

    Under overload, earliest-deadline-first alone makes every request late: each begins when it is nearly due. So a
    request that cannot be done in time at the measured pace is shed before it begins.
    """

    preemptive: ClassVar[bool] = True

    def rank(self, request: Request) -> float:
        deadline = request.submission.deadline
        return math.inf if deadline is None else deadline

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.submission.deadline is not None and running.submission.deadline is None

    def should_shed(self, request: Request, now: float, pace: Pace) -> bool:
        deadline = request.submission.deadline
        if deadline is None:
            return False
        most = request.max_len - len(request.tokens)
        least = most if request.params.ignore_eos else request.params.min_tokens - request.num_generated
        return now + pace.seconds_for(len(request.tokens), least, most) > deadline


class BackgroundLast:
    """A policy for all requests but those of the background, which come in their order of arrival when none of the
    others waits. One of the others takes the place of one of the background that runs."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._background = FirstComeFirstServed()
        self._any_background = False

    @property
    def preemptive(self) -> bool:
        """As the policy; True too once there was a background request."""
        return self._any_background or self._policy.preemptive

    def __len__(self) -> int:
        return len(self._policy) + len(self._background)

    def __iter__(self) -> Iterator[Request]:
        yield from self._policy
        yield from self._background

    def push(self, request: Request) -> None:
        self._any_background = self._any_background or request.submission.background
        self._of(request).push(request)

    def peek(self) -> Request | None:
        return self._policy.peek() or self._background.peek()

    def remove(self, request: Request) -> None:
        self._of(request).remove(request)

    def rank(self, request: Request) -> float:
        return BACKGROUND_RANK if request.submission.background else self._policy.rank(request)

    def outranks(self, waiting: Request, running: Request) -> bool:
        if waiting.submission.background:
            return False
        if running.submission.background:
            return True
        return self._policy.preemptive and self._policy.outranks(waiting, running)

    def should_shed(self, request: Request, now: float, pace: Pace) -> bool:
        return self._of(request).should_shed(request, now, pace)

    def served(self, request: Request, num_prompt: int, num_generated: int) -> None:
        """Service to the background is not counted: it takes no share from its tenant's other requests."""
        if not request.submission.background:
            self._policy.served(request, num_prompt, num_generated)

    def _of(self, request: Request) -> Policy:
        return self._background if request.submission.background else self._policy
