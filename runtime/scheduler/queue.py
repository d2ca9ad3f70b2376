"""Those that wait: in the policy's order, or for another request's prompt."""

from collections.abc import Iterator

from runtime.scheduler.admission import Admission
from runtime.scheduler.followers import Followers, same_prompt
from runtime.scheduler.pace import Pace
from runtime.scheduler.policies import Policy
from runtime.scheduler.request import Request


class Queue:
    """The policy's queue, and beside it the followers, which join it once their leader's prompt is computed."""

    def __init__(self, policy: Policy, admission: Admission, pace: Pace) -> None:
        self._policy = policy
        self._admission = admission
        self._pace = pace
        self._followers = Followers()
        self._aside: dict[str, Request] = {}
        """Beams that have lost their blocks, and have nothing to compute until their search goes on."""
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._policy) + self.num_deferred

    def __iter__(self) -> Iterator[Request]:
        yield from self._policy
        yield from self._followers
        yield from self._aside.values()

    @property
    def num_deferred(self) -> int:
        """Those that wait for another one, not for a slot or blocks."""
        return len(self._followers) + len(self._aside)

    def check_room(self, num_tokens: int, now: float, *, at_least: int = 0) -> None:
        """Raise `TooManyRequests` when a prompt of so many tokens is more than the queue takes.
        `at_least` so many requests wait, known here or not yet."""
        self._admission.check(num_tokens, max(len(self), at_least), self._num_tokens, self._pace, now)

    def add(self, request: Request, leader: Request | None) -> None:
        """A new request; `leader` is the one of which it is a fork."""
        if leader is not None and same_prompt(leader, request):
            if leader.num_written < leader.prompt_len:
                self._followers.add(request, leader)
                return
            request.source = leader
        self.push(request)

    def push(self, request: Request) -> None:
        if request.answered:
            self._aside[request.id] = request
            return
        self._policy.push(request)
        self._num_tokens += len(request.tokens)

    def remove(self, request: Request) -> None:
        """It comes in, or it ends here."""
        if self._aside.pop(request.id, None) is None and not self._followers.remove(request):
            self._policy.remove(request)
            self._num_tokens -= len(request.tokens)

    def recall(self, request: Request) -> None:
        """A beam goes on."""
        if self._aside.pop(request.id, None) is not None:
            self.push(request)

    def head(self) -> Request | None:
        """The one that should come in next."""
        return self._policy.peek()

    def release(self, leader: Request) -> None:
        """The prompt of `leader` is computed, or never will be: whoever waited for it queues up."""
        if self._followers.leads(leader):
            for follower in self._followers.release(leader):
                self.push(follower)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the count of tokens is wrong."""
        assert self._num_tokens == sum(len(r.tokens) for r in self._policy), "waiting tokens are miscounted"
