"""The interface of scheduling policies. A policy orders; it never allocates and never changes a request."""

from collections.abc import Iterator
from typing import Protocol

from runtime.scheduler.pace import Pace
from runtime.scheduler.request import Request


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
