"""Who gives up slot and blocks for whom."""

from collections.abc import Iterable

from runtime.scheduler.policies import Policy
from runtime.scheduler.request import Request


class Preemption:
    """Chooses victims by the policy's rank, and none that has been one too often.

    A request at the cap comes in only with blocks for its longest possible output. So it never needs another
    one's blocks, and nobody may take its own: every request is preempted a bounded number of times and then
    runs to its end. That is why a pool of any size makes progress.
    """

    def __init__(self, policy: Policy, cap: int) -> None:
        self._policy = policy
        self._cap = cap

    def protects(self, request: Request) -> bool:
        return request.timing.preemptions >= self._cap

    def tokens_to_hold(self, request: Request) -> int:
        """For how many tokens a request must find blocks to come in.

        Blocks for the whole prompt are taken at once, although it may be computed in chunks: a request
        that comes in can always finish its prompt, and two prompts never starve each other.
        """
        return request.max_len if self.protects(request) else len(request.tokens)

    def victim(self, running: Iterable[Request]) -> Request:
        """Who gives way when one of `running` must grow: maybe that one itself. It is never protected, as
        those have all they need, so there is always somebody."""
        return max((r for r in running if not self.protects(r)), key=self.standing)

    def outranked(self, waiting: Request, running: Iterable[Request]) -> list[Request]:
        """Whose places `waiting` may take, the worst one last."""
        policy = self._policy
        found = [r for r in running if policy.outranks(waiting, r) and not self.protects(r)]
        return sorted(found, key=self.standing)

    def standing(self, request: Request) -> tuple[float, int]:
        """Whoever has the highest goes first."""
        return self._policy.rank(request), request.order
