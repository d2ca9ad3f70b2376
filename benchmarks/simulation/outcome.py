"""What a replay measured."""

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Served:
    """The times of the requests that came to their end, in seconds: a column each, for there may be a million."""

    priority: "array[int]" = field(default_factory=lambda: array("b"))
    ttft: "array[float]" = field(default_factory=lambda: array("d"))
    tpot: "array[float]" = field(default_factory=lambda: array("d"))
    """Per output token after the first."""

    def __len__(self) -> int:
        return len(self.ttft)

    def add(self, *, priority: int, ttft: float, tpot: float) -> None:
        self.priority.append(priority)
        self.ttft.append(ttft)
        self.tpot.append(tpot)


@dataclass
class Outcome:
    """All requests of a trace, and what the pool looked like meanwhile."""

    served: Served = field(default_factory=Served)
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
        served = self.served
        if priority is None:
            return _summary(served.ttft, share)
        of_it = zip(served.priority, served.ttft, strict=True)
        return _summary([ttft for its, ttft in of_it if its == priority], share)

    def tpot(self, share: float | None = None) -> float:
        return _summary(self.served.tpot, share)


def _summary(values: Sequence[float], share: float | None) -> float:
    if not values:
        return 0.0
    if share is None:
        return statistics.fmean(values)
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
