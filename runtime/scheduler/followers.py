"""Choices of one prompt: the first computes it, the others wait for that and then share its blocks."""

from collections.abc import Iterator

from runtime.scheduler.request import Request


class Followers:
    """Requests that wait for another one's prompt. They are in no queue until then."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Request]] = {}
        """Leader's id → its followers by id."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for followers in self._of.values():
            yield from followers.values()

    def leads(self, request: Request) -> bool:
        return request.id in self._of

    def add(self, request: Request, leader: Request) -> None:
        request.source = leader
        self._of.setdefault(leader.id, {})[request.id] = request
        self._count += 1

    def release(self, leader: Request) -> list[Request]:
        """The leader has computed its prompt, or will never: those who waited for it, in order of arrival."""
        followers = list(self._of.pop(leader.id, {}).values())
        self._count -= len(followers)
        return followers

    def remove(self, request: Request) -> bool:
        """One that ends while it waits; False when it is not here."""
        leader = request.source
        followers = self._of.get(leader.id) if leader else None
        if leader is None or followers is None or followers.pop(request.id, None) is None:
            return False
        self._count -= 1
        if not followers:
            del self._of[leader.id]
        return True


def same_prompt(one: Request, other: Request) -> bool:
    """Would both have the same KV for their prompt?"""
    a, b = one.submission, other.submission
    return (a.prompt_ids, a.adapter, a.cache_salt) == (b.prompt_ids, b.adapter, b.cache_salt)
