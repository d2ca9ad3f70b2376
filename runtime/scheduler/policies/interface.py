"""What the scheduler asks of a policy. A policy orders; it never allocates and never changes a request."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from runtime.scheduler.request import Request


class Policy(Protocol):
    """The waiting requests, in the order in which they should run."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...

    def push(self, request: Request) -> None:
        """A new request, or a preempted one (its state says which), waits."""

    def peek(self) -> Request:
        """The one that should run next. Only asked when there is one."""

    def remove(self, request: Request) -> None:
        """It was admitted, or it finished while it waited."""

    def victim(self, running: Sequence[Request]) -> Request:
        """Which of the running requests (in order of admission, never empty) gives up its blocks."""
