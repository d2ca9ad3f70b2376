"""Orders of the waiting requests: one interface, one file an implementation, and this registry."""

from collections.abc import Callable, Mapping

from runtime.scheduler.policies.fair import Fair
from runtime.scheduler.policies.interface import Policy
from runtime.scheduler.policies.ranked import BackgroundLast, EarliestDeadline, FirstComeFirstServed, Priority

POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "deadline": EarliestDeadline,
    "fair": Fair,
}


def make_policy(name: str, *, weights: Mapping[str, float] | None = None) -> Policy:
    """The policy called `name`; `ValueError` lists the names that there are. `weights` are those of `fair`."""
    if name not in POLICIES:
        raise ValueError(f"no scheduling policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return Fair(weights) if name == "fair" else POLICIES[name]()


__all__ = ["POLICIES", "BackgroundLast", "Fair", "Policy", "make_policy"]
