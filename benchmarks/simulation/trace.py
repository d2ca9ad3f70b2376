"""Made-up requests: when they arrive, how long they are, what they share and whose they are. Reproducible by seed."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

MEAN_PROMPT, MEAN_OUTPUT = 161.3, 338.0
"""Tokens of ShareGPT conversations: Kwon et al., "Efficient Memory Management for LLM Serving with
PagedAttention", 2023 (arXiv:2309.06180), figure 11."""

SPREAD = 0.9
"""Sigma of the log-normal lengths: long tails, as in that figure."""

LONGEST = 1024
"""Tokens of a prompt, and of an output; the context is twice that."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come."""

    at: float
    """Seconds from the start."""
    prompt: int
    output: int
    prefix: int
    """Which shared beginning the prompt has; -1 for none."""
    tenant: int
    priority: int
    deadline: float | None
    """Seconds from the start."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a trace is made of."""

    requests: int
    rate: float
    """Requests a second, on average."""
    burstiness: float = 1.0
    """Coefficient of variation of the time between arrivals: 1 is Poisson, more comes in bursts."""
    prefixes: int = 0
    """Different shared beginnings; 0 for none."""
    prefix_tokens: int = 256
    tenants: tuple[float, ...] = (1.0,)
    """Share of the requests of each tenant."""
    urgent: float = 0.0
    """Share of the requests with priority -1; the others have 0."""
    patience: float | None = None
    """Seconds from arrival to deadline, on average; each request has from half to one and a half of it."""
    seed: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        """In order of time. Lengths do not depend on rate and burstiness: each has a generator of its own."""
        when, what = random.Random(f"{self.seed} when"), random.Random(f"{self.seed} what")
        shape = 1 / self.burstiness**2
        now = 0.0
        for _ in range(self.requests):
            now += when.gammavariate(shape, 1 / (shape * self.rate))
            yield Arrival(
                at=now,
                prompt=_length(what, MEAN_PROMPT),
                output=_length(what, MEAN_OUTPUT),
                prefix=what.randrange(self.prefixes) if self.prefixes else -1,
                tenant=what.choices(range(len(self.tenants)), self.tenants)[0],
                priority=-1 if what.random() < self.urgent else 0,
                deadline=None if self.patience is None else now + self.patience * (0.5 + what.random()),
            )


def _length(random_: random.Random, mean: float) -> int:
    length = random_.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
    return min(max(4, round(length)), LONGEST)
