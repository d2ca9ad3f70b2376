"""Scheduling policies: the order of the waiting requests. A policy never allocates and never changes a request.

One interface; queues by rank and then arrival (first come, strict priority, earliest deadline); fair shares among
tenants; requests of the background behind all others, under any policy.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import ClassVar, Protocol

from runtime.scheduler.pace import Pace
from runtime.scheduler.request import Request

SPARE = 64
"""Removed entries that the heap may hold before it is worth rebuilding."""

BACKGROUND_RANK = float("inf")
"""Rank of background requests: the first to be preempted, the last to get tokens of a step."""

OUTPUT_PRICE = 2.0
"""Price of an output token, in prompt tokens: the paper's, and about what APIs charge."""


class Policy(Protocol):
    """The waiting requests, in the order in which they should run. No call takes longer than O(log waiting)."""

    @property
    def preemptive(self) -> bool:
        """True if a waiting request may replace a running one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...

    def push(self, request: Request) -> None:
        """Add a new request, or a preempted one."""

    def peek(self) -> Request | None:
        """The request to run next."""

    def remove(self, request: Request) -> None:
        """Remove a request that was admitted, or that finished while it waited."""

    def rank(self, request: Request) -> float:
        """Sort key, lower is better. Among running requests, the lowest goes first into a step's budget and the highest
        is preempted first; between equals the order of arrival decides."""

    def outranks(self, waiting: Request, running: Request) -> bool:
        """True if `waiting` may replace `running`. Called only where `preemptive`."""

    def should_shed(self, request: Request, now: float, pace: Pace) -> bool:
        """True if the request should be ended instead of started, since it cannot meet its deadline."""

    def served(self, request: Request, num_prompt: int, num_generated: int) -> None:
        """Count service: a request was admitted with `num_prompt` tokens, or has `num_generated` new ones."""


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


class Fair:
    """A first-come queue for each tenant, and the tenants by the service that they got.

    The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024
    (arXiv:2401.00588). Each tenant has a counter of its service: prompt tokens, and output tokens at twice the price,
    divided by the tenant's weight. The next request comes from the tenant with the lowest counter. A tenant that
    returns from idleness is lifted to the lowest counter of the waiting tenants, so that no tenant saves up service by
    being away. Between two tenants that always have requests waiting, the difference in service stays within a bound
    that does not depend on time, however unequal their load.
    """

    preemptive: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """`weights`: tenant → share relative to the others; 1 for those not named."""
        self._weights = dict(weights or {})
        self._queues: dict[str, Ranked] = {}
        """Queues of the tenants that have requests waiting."""
        self._counters: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        """One entry for each of `_queues`; its counter may be out of date, and is then too low."""
        self._num_waiting = 0
        self._floor = 0.0
        """The counter of the tenant that was chosen last: where newcomers to an empty queue begin."""

    def counter(self, tenant: str) -> float:
        """The service that `tenant` got, in prompt tokens by weight."""
        return self._counters.get(tenant, 0.0)

    def rank(self, request: Request) -> float:
        return self.counter(request.submission.tenant)

    def outranks(self, waiting: Request, running: Request) -> bool:
        return False

    def should_shed(self, request: Request, now: float, pace: Pace) -> bool:
        return False

    def served(self, request: Request, num_prompt: int, num_generated: int) -> None:
        tenant = request.submission.tenant
        cost = num_prompt + OUTPUT_PRICE * num_generated
        if self._weights:
            cost /= self._weights.get(tenant, 1.0)
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        for tenant in sorted(self._queues, key=self.counter):
            yield from self._queues[tenant]

    def push(self, request: Request) -> None:
        tenant = request.submission.tenant
        queue = self._queues.get(tenant)
        if queue is None:
            self._lift(tenant)
            queue = self._queues[tenant] = Ranked()
            heappush(self._heap, (self.counter(tenant), tenant))
        queue.push(request)
        self._num_waiting += 1

    def peek(self) -> Request | None:
        heap = self._heap
        while heap:
            counter, tenant = heap[0]
            queue = self._queues.get(tenant)
            if queue is None:
                heappop(heap)
            elif counter != self.counter(tenant):
                heapreplace(heap, (self.counter(tenant), tenant))
            else:
                self._floor = counter
                return queue.peek()
        return None

    def remove(self, request: Request) -> None:
        tenant = request.submission.tenant
        queue = self._queues[tenant]
        queue.remove(request)
        self._num_waiting -= 1
        if not len(queue):
            del self._queues[tenant]
            self._heap = [entry for entry in self._heap if entry[1] != tenant]
            heapify(self._heap)

    def _lift(self, tenant: str) -> None:
        """Lift an idle tenant to the lowest counter of the waiting ones, or to the last chosen tenant's when none
        waits."""
        lowest = min(map(self.counter, self._queues), default=self._floor)
        self._counters[tenant] = max(self.counter(tenant), lowest)


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


POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "deadline": EarliestDeadline,
    "fair": Fair,
}


def make_policy(name: str, *, weights: Mapping[str, float] | None = None) -> Policy:
    """The policy called `name`; `ValueError` lists the names that there are. `weights` are those of `fair`."""
    if name not in POLICIES:
        raise ValueError(f"no scheduling policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return Fair(weights) if name == "fair" else POLICIES[name]()
