"""Fair shares among tenants: the virtual token counter of Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024 (arXiv:2401.00588).

Each tenant has a counter of the service it got: prompt tokens, and output tokens at twice the price, divided by the
tenant's weight. The next request comes from the tenant with the lowest counter. A tenant that returns from idleness is
lifted to the lowest counter of the waiting tenants, so that no tenant saves up service by being away. Between two
tenants that always have requests waiting, the difference in service stays within a bound that does not depend on time,
however unequal their load.
"""

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import ClassVar

from runtime.scheduler.pace import Pace
from runtime.scheduler.policies.ranked import Ranked
from runtime.scheduler.request import Request

OUTPUT_PRICE = 2.0
"""Price of an output token, in prompt tokens: the paper's, and about what APIs charge."""


class Fair:
    """A first-come queue for each tenant, and the tenants by what they got so far."""

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
        cost = (num_prompt + OUTPUT_PRICE * num_generated) / self._weights.get(tenant, 1.0)
        self._counters[tenant] = self.counter(tenant) + cost

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
