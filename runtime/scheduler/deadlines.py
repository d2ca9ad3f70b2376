"""Which requests have run out of time."""

import itertools
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from runtime.scheduler.request import Request

SPARE = 64
"""Entries of finished requests that may lie about before it is worth tidying up."""


class Deadlines:
    """Every request that has one, whatever the policy: a deadline is a promise, not only an order."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._entries = itertools.count()

    def add(self, request: Request, num_requests: int) -> None:
        """`num_requests` are not finished; when most entries are of finished ones, those go."""
        deadline = request.submission.deadline
        if deadline is None:
            return
        if len(self._heap) > 2 * num_requests + SPARE:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)
        heappush(self._heap, (deadline, next(self._entries), request))

    def passed(self, now: float) -> Iterator[Request]:
        """Those whose deadline is over, each once. O(1) when there are none."""
        while self._heap and self._heap[0][0] <= now:
            request = heappop(self._heap)[2]
            if not request.finished:
                yield request
