"""Who may join the queue. What can never run is refused before this (`Engine.check`); here it is only full."""

import math

from runtime.errors import TooManyRequests
from runtime.scheduler.pace import Pace

SHORTEST_RETRY, LONGEST_RETRY = 1, 120
"""Seconds that a client may be told to stay away."""


class Admission:
    """The queue's limits, in requests and in tokens."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int | None) -> None:
        self._max_waiting = max_waiting
        self._max_tokens = max_waiting_tokens

    def check(self, newcomer: int, num_waiting: int, waiting_tokens: int, pace: Pace, now: float) -> None:
        """Raise `TooManyRequests` when a prompt of `newcomer` tokens is more than the queue takes.

        A prompt over the limit on tokens is let into an empty queue: it can run, so it must be able to wait.
        """
        full = num_waiting >= self._max_waiting
        limit = self._max_tokens
        if limit is not None and num_waiting and waiting_tokens + newcomer > limit:
            what = f"{waiting_tokens} prompt tokens are waiting, and {newcomer} more would exceed {limit}"
        elif full:
            what = f"{num_waiting} requests are waiting, of at most {self._max_waiting}"
        else:
            return
        # Half of the queue, not one place: others were sent away too, and come back for the same place.
        seconds = pace.seconds_to_admit(waiting_tokens / 2, now) or SHORTEST_RETRY
        retry_after = min(max(math.ceil(seconds), SHORTEST_RETRY), LONGEST_RETRY)
        raise TooManyRequests(f"The queue is full: {what}. Try again later.", retry_after=retry_after)
