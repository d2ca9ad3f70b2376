"""What the scheduler has done since the start, for metrics."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counts:
    """Counters that only rise."""

    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens of requests that came in, new or resumed."""
    prefix_hits: int = 0
    """Those of them whose KV was there already: cached, or shared with another choice of the same prompt."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that proved right."""

    swapped_out: int = 0
    """Blocks of preempted sequences copied to host memory."""
    swapped_in: int = 0
    """Those of them that were copied back; what was cached still, or ended meanwhile, is not."""

    def since(self, earlier: "Counts") -> "Counts":
        """How much each has risen."""
        before = asdict(earlier)
        return Counts(**{name: value - before[name] for name, value in asdict(self).items()})
