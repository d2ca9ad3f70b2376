"""What a replay measured."""

import statistics
from dataclasses import dataclass, field


@dataclass(slots=True)
class Served:
    """One request's times, in seconds."""

    tenant: int
    priority: int
    ttft: float
    tpot: float
    """Per output token after the first."""
    e2e: float


@dataclass
class Outcome:
    """All requests of a trace, and what the pool looked like meanwhile."""

    served: list[Served] = field(default_factory=list)
    """Those that came to their end."""
    missed: int = 0
    """Requests that ended without one, at their deadline or given up on."""
    seconds: float = 0.0
    """Of simulated time."""
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    cached_share: float = 0.0
    """Of the prompt tokens that were looked up."""
    kv_waste: float = 0.0
    """Share of the held KV memory in which no token of a sequence is, on average over the steps."""
    service_gap: float = 0.0
    """Largest difference in service between the two busiest tenants while both had requests waiting, in
    prompt tokens (an output token counts twice)."""

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def ttft(self, share: float | None = None, *, priority: int | None = None) -> float:
        """The mean time to the first token, or the quantile at `share`; of one priority's requests or all."""
        return _summary([s.ttft for s in self.served if priority in (None, s.priority)], share)

    def tpot(self, share: float | None = None) -> float:
        return _summary([s.tpot for s in self.served], share)


def _summary(values: list[float], share: float | None) -> float:
    if not values:
        return 0.0
    if share is None:
        return statistics.fmean(values)
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
