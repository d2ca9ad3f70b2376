"""Strict priority: lower numbers first, in the queue and in the batch."""

from typing import ClassVar

from runtime.scheduler.policies.ranked import Ranked
from runtime.scheduler.request import Request


class Priority(Ranked):
    """`priority` of the request, lower first, equals by arrival. One that waits takes the place of one of worse
    priority that runs, whether it lacks a slot or blocks."""

    preemptive: ClassVar[bool] = True

    def rank(self, request: Request) -> float:
        return request.submission.priority

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.submission.priority < running.submission.priority
