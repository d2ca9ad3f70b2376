"""What load to put on a server."""

import math
import random
from typing import Literal

from msgspec import Struct

from runtime.cli.errors import UsageError

DEFAULT_CONCURRENCY = 8


class LoadSpec(Struct, frozen=True, kw_only=True):
    """A load, reproducible from its seed. Lengths are in tokens, times in seconds."""

    url: str = "http://127.0.0.1:8000"
    """The server, with or without a trailing /v1."""
    model: str | None = None
    """Default: the first model that the server lists."""
    endpoint: Literal["chat", "completions"] = "chat"
    requests: int = 64
    concurrency: int | None = None
    """Closed loop: this many requests at once, the next one when one ends. Default 8; not with `rate`."""
    rate: float | None = None
    """Open loop: requests a second on average, at Poisson times, however slow the answers are."""
    input_len: int = 128
    """Prompt tokens of each request's own, after the shared prefix."""
    output_len: int = 128
    """Tokens to generate; exactly so many with `ignore_eos`, at most otherwise."""
    ignore_eos: bool = True
    """Send `ignore_eos` and `min_tokens`. Turn off for servers that refuse fields they do not know."""
    shared_prefix: int = 0
    """Tokens that every prompt begins with."""
    seed: int = 0
    """Of the prompts, the arrival times, and (plus the request's number) the sampling."""
    temperature: float = 0.0
    api_key: str | None = None
    timeout: float = 600.0
    """A request that takes longer has failed."""

    def verify(self) -> None:
        """Raise `UsageError` naming the first field that makes no sense."""
        least = {"requests": 1, "input_len": 1, "output_len": 1, "shared_prefix": 0}
        for name, limit in least.items():
            if (value := getattr(self, name)) < limit:
                raise UsageError(f"{name} must be at least {limit}, got {value}")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.rate is not None and not 0.0 < self.rate < math.inf:
            raise UsageError(f"rate must be a number above 0, got {self.rate}")
        if self.rate is not None and self.concurrency is not None:
            raise UsageError("give concurrency (closed loop) or rate (open loop), not both")
        if not 0.0 < self.timeout < math.inf:
            raise UsageError(f"timeout must be a number above 0, got {self.timeout}")
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature must be from 0 to 100, got {self.temperature}")

    @property
    def in_flight(self) -> int:
        """Most requests at once."""
        if self.rate is not None:
            return self.requests
        return min(self.requests, self.concurrency or DEFAULT_CONCURRENCY)

    def due_times(self) -> list[float]:
        """When each request may start, in seconds from the beginning; all at once in a closed loop."""
        if self.rate is None:
            return [0.0] * self.requests
        rng = random.Random(f"arrivals {self.seed}")
        now, times = 0.0, []
        for _ in range(self.requests):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times
