"""First come, first served; whoever was admitted last is preempted first."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from runtime.scheduler.request import Request, State


class FirstComeFirstServed:
    """Arrival order. A preempted request goes back to the front: it arrived before all that wait."""

    def __init__(self) -> None:
        self._queue: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue.values())

    def push(self, request: Request) -> None:
        self._queue[request.id] = request
        if request.state is State.PREEMPTED:
            self._queue.move_to_end(request.id, last=False)

    def peek(self) -> Request:
        return next(iter(self._queue.values()))

    def remove(self, request: Request) -> None:
        del self._queue[request.id]

    def victim(self, running: Sequence[Request]) -> Request:
        return running[-1]
