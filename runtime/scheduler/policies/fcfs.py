"""First come, first served; whoever arrived last is preempted first."""

from runtime.scheduler.policies.ranked import Ranked


class FirstComeFirstServed(Ranked):
    """Arrival order. A preempted request is in front again: it arrived before all that wait."""
