"""A queue by rank, then arrival: what most policies are, apart from the rank."""

import itertools
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import ClassVar

from runtime.scheduler.pace import Pace
from runtime.scheduler.request import Request

SPARE = 64
"""Removed entries that the heap may hold before it is worth rebuilding."""


class Ranked:
    """A heap whose removed entries are only dropped when they come to the top, or have become the majority."""

    preemptive: ClassVar[bool] = False

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Request]] = []
        self._pushes = itertools.count()
        self._waiting: dict[str, Request] = {}

    def rank(self, request: Request) -> float:
        """Fixed for as long as the request waits."""
        return 0.0

    def outranks(self, waiting: Request, running: Request) -> bool:
        return False

    def hopeless(self, request: Request, now: float, pace: Pace) -> bool:
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
