"""What the scheduler asks of a policy. A policy orders; it never allocates and never changes a request."""

from collections.abc import Iterator
from typing import ClassVar, Protocol

from runtime.scheduler.pace import Pace
from runtime.scheduler.request import Request


class Policy(Protocol):
    """The waiting requests, in the order in which they should run. No call takes longer than O(log waiting)."""

    preemptive: ClassVar[bool]
    """Whether one that waits may take the place of one that runs."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...

    def push(self, request: Request) -> None:
        """A new request, or a preempted one, waits."""

    def peek(self) -> Request | None:
        """The one that should run next."""

    def remove(self, request: Request) -> None:
        """It was admitted, or it finished while it waited."""

    def rank(self, request: Request) -> float:
        """Lower is better. Of those that run, the lowest goes first into a step's budget and the highest gives
        up its blocks first; between equals the order of arrival decides."""

    def outranks(self, waiting: Request, running: Request) -> bool:
        """May the one take the other's place? Only asked where `preemptive`."""

    def hopeless(self, request: Request, now: float, pace: Pace) -> bool:
        """Would it be a waste to start this one at all?"""

    def served(self, request: Request, num_prompt: int, num_generated: int) -> None:
        """It was admitted with so many prompt tokens, or got so many new ones."""
