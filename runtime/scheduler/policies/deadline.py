"""Earliest deadline first (Liu and Layland, 1973), and no work on what will be late anyway."""

import math
from typing import ClassVar

from runtime.scheduler.pace import Pace
from runtime.scheduler.policies.ranked import Ranked
from runtime.scheduler.request import Request


class EarliestDeadline(Ranked):
    """Requests without a deadline come last, and give up their place to one that has one.

    Under overload earliest-deadline-first alone makes everybody late: each request is begun when it is nearly
    due. So one that at the measured pace cannot be done in time is shed before it is begun.
    """

    preemptive: ClassVar[bool] = True

    def rank(self, request: Request) -> float:
        deadline = request.submission.deadline
        return math.inf if deadline is None else deadline

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.submission.deadline is not None and running.submission.deadline is None

    def hopeless(self, request: Request, now: float, pace: Pace) -> bool:
        deadline = request.submission.deadline
        if deadline is None:
            return False
        most = request.max_len - len(request.tokens)
        least = most if request.params.ignore_eos else request.params.min_tokens - request.num_generated
        return now + pace.seconds_for(len(request.tokens), least, most) > deadline
