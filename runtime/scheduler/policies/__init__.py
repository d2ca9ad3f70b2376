"""Orders of the waiting requests: one interface, one file an implementation, and this registry."""

from collections.abc import Callable

from runtime.scheduler.policies.fcfs import FirstComeFirstServed
from runtime.scheduler.policies.interface import Policy

POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FirstComeFirstServed}


def make_policy(name: str) -> Policy:
    """The policy called `name`; `ValueError` lists the names that there are."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ValueError(f"no scheduling policy {name!r}; there are: {', '.join(sorted(POLICIES))}") from None


__all__ = ["POLICIES", "Policy", "make_policy"]
