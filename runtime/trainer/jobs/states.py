"""The states of a job, and which may follow which."""

from typing import Literal, get_args

State = Literal[
    "validating",
    "queued",
    "running",
    "paused",
    "evaluating",
    "publishing",
    "succeeded",
    "failed",
    "cancelled",
    "interrupted",
]
STATES: tuple[State, ...] = get_args(State)

TRANSITIONS: dict[State, frozenset[State]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"paused", "evaluating", "failed", "cancelled", "interrupted"}),
    "paused": frozenset({"running", "queued", "failed", "cancelled"}),
    "evaluating": frozenset({"publishing", "succeeded", "failed", "cancelled", "interrupted"}),
    "publishing": frozenset({"succeeded", "failed", "interrupted"}),
    # The process ended while the job was at work; the next process decides at its start.
    "interrupted": frozenset({"queued", "paused", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)
AT_WORK: frozenset[State] = frozenset({"running", "evaluating", "publishing"})
"""At most one job is in one of these: the one that the manager holds."""
WAITING: frozenset[State] = frozenset({"validating", "queued"})
"""Counted by `trainer.max_queued_jobs`."""
