"""Limits of each key: requests and tokens a minute, requests at once, and its share of the queue.

A rate is a bucket that holds a minute's worth and refills evenly, so a client may send a burst and then continue at its
rate. Tokens are reserved when a request starts, as prompt plus `max_tokens`, and settled at its end by what was
computed. State is kept per key that exists and in no other form: headers and addresses of a client change nothing.
"""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from time import monotonic

from runtime.access.keys import KeyLimits, Principal
from runtime.errors import InvalidRequest, TooManyRequests

SECONDS = 60.0


class RateLimited(TooManyRequests):
    """A key has reached one of its limits."""

    default_code = "rate_limit_exceeded"


class QueueShareFull(RateLimited):
    """A key has its full share of the queue waiting already."""

    default_code = "queue_share_full"


class Bucket:
    """`limit` units that refill evenly over a minute. The level may fall below zero: what is owed delays the next."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._time = now

    def level(self, now: float) -> float:
        if now > self._time:
            self._level = min(float(self.limit), self._level + (now - self._time) * self.limit / SECONDS)
            self._time = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take `amount` units; a negative amount gives them back."""
        self._level = min(float(self.limit), self.level(now) - amount)

    def seconds_until(self, amount: float, now: float) -> float:
        """Seconds until `amount` units are there; for more than fit, until the bucket is full."""
        missing = min(amount, self.limit) - self.level(now)
        return max(0.0, missing * SECONDS / self.limit)


class _Use:
    """Current use of one key."""

    def __init__(self, limits: KeyLimits, now: float) -> None:
        self.limits = limits
        self.open = 0
        """Requests that are not answered yet."""
        self.pending = 0
        """Sequences that were submitted and have brought nothing yet: they wait, or their prompt is computed."""
        self.requests = self._bucket(None, limits.requests_per_minute, now)
        self.tokens = self._bucket(None, limits.tokens_per_minute, now)

    def adopt(self, limits: KeyLimits, now: float) -> None:
        """The key's limits may have changed in its file: a rate that stays keeps its level."""
        if limits != self.limits:
            self.limits = limits
            self.requests = self._bucket(self.requests, limits.requests_per_minute, now)
            self.tokens = self._bucket(self.tokens, limits.tokens_per_minute, now)

    @staticmethod
    def _bucket(known: Bucket | None, limit: int | None, now: float) -> Bucket | None:
        if limit is None:
            return None
        return known if known is not None and known.limit == limit else Bucket(limit, now)


class Limiter:
    """The use of every key. Event-loop thread only."""

    def __init__(self, *, max_waiting: int, max_running: int, clock: Callable[[], float] = monotonic) -> None:
        self._uses: dict[str, _Use] = {}
        self.max_waiting = max_waiting
        self.max_running = max_running
        self.clock = clock

    def __len__(self) -> int:
        return len(self._uses)

    def enter(self, principal: Principal) -> "Quota":
        """Count a request that arrives. Raises `RateLimited`; the quota's `headers` are for that answer too."""
        use = self._uses.get(principal.label)
        if use is None:
            use = self._uses[principal.label] = _Use(principal.limits, self.clock())
        use.adopt(principal.limits, self.clock())
        return Quota(self, use, principal)

    def keep(self, labels: Container[str]) -> None:
        """Forget the keys that are gone, once nothing of theirs is open."""
        self._uses = {label: use for label, use in self._uses.items() if label in labels or use.open}


class Quota:
    """One HTTP request's part of its key's use. `leave` must be called."""

    def __init__(self, limiter: Limiter, use: _Use, principal: Principal) -> None:
        self._limiter = limiter
        self._use = use
        self._who = f"The key `{principal.name}`" if principal.label else "All clients without a key together"
        self._pending = 0
        self._reserved = 0
        self._settled = False
        self._entered = False
        self.refused: str | None = None
        """Code of the limit that the request was refused for."""

    def admit(self) -> None:
        """Raises `RateLimited` where the key has too many requests a minute, or at once."""
        with self._noting_refusals():
            self._admit()

    def _admit(self) -> None:
        use, limits, now = self._use, self._use.limits, self._limiter.clock()
        if limits.max_concurrent is not None and use.open >= limits.max_concurrent:
            raise RateLimited(f"{self._who} may have {limits.max_concurrent} requests at once, which are running now.")
        if use.requests is not None:
            if use.requests.level(now) < 1:
                raise _limited(self._who, "requests", use.requests, 1, now)
            use.requests.take(1, now)
        use.open += 1
        self._entered = True

    def reserve(
        self,
        *,
        sequences: int,
        prompt_tokens: int,
        max_tokens: int,
        num_running: int,
        priority: int,
        deadline: float | None,
    ) -> None:
        """Reserve tokens. Called before the sequences of the request are submitted.

        Args:
            prompt_tokens: of all prompts together.
            max_tokens: most that all sequences may generate together; 0 where the request does not say.
            num_running: sequences that the engine runs now, of all keys.
            priority, deadline: as requested, the deadline in seconds.

        Raises:
            RateLimited: the key's tokens are used up, or its share of the queue.
            InvalidRequest: the key may not request such urgency.
        """
        self._check_urgency(self._use.limits, priority, deadline)
        with self._noting_refusals():
            self._reserve(sequences, prompt_tokens, max_tokens, num_running)

    def _reserve(self, sequences: int, prompt_tokens: int, max_tokens: int, num_running: int) -> None:
        use, limits, now = self._use, self._use.limits, self._limiter.clock()
        if limits.max_queue_share is not None:
            most = max(1, int(limits.max_queue_share * self._limiter.max_waiting))
            free = max(0, self._limiter.max_running - num_running)
            if use.pending + sequences - free > most:
                raise QueueShareFull(
                    f"{self._who} may have {most} sequences waiting; there are {use.pending}, and {sequences} would "
                    "be added."
                )
        if use.tokens is not None:
            # A request that could need more than a minute's worth waits for a full bucket, and owes the rest.
            needed = min(prompt_tokens + max_tokens, use.tokens.limit)
            if use.tokens.level(now) < needed:
                raise _limited(self._who, "tokens", use.tokens, needed, now)
            self._reserved = prompt_tokens + max_tokens
            use.tokens.take(self._reserved, now)
        self._pending = sequences
        use.pending += sequences

    def started(self) -> None:
        """A sequence has brought its first output."""
        if self._pending > 0:
            self._pending -= 1
            self._use.pending -= 1

    def settle(self, tokens: int) -> None:
        """Charge the tokens that were computed, prompt and output, in place of the reserved ones."""
        if self._use.tokens is not None:
            self._use.tokens.take(tokens - self._reserved, self._limiter.clock())
        self._reserved = tokens
        self._settled = True

    def leave(self) -> None:
        """The answer is out, or its client is gone. Any number of times."""
        if self._reserved and not self._settled:  # it was refused after all, and computed nothing
            self.settle(0)
        self._use.pending -= self._pending
        self._pending = 0
        if self._entered:
            self._use.open -= 1
            self._entered = False

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` headers, for the rates that are limited."""
        now, found = self._limiter.clock(), {}
        for name, bucket in (("requests", self._use.requests), ("tokens", self._use.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.limit, now))
        return found

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except RateLimited as error:
            self.refused = error.code
            raise

    def _check_urgency(self, limits: KeyLimits, priority: int, deadline: float | None) -> None:
        if limits.min_priority is not None and priority < limits.min_priority:
            raise InvalidRequest(
                f"priority must be at least {limits.min_priority} (a limit of this API key), got {priority}.",
                param="priority",
            )
        if limits.min_deadline is not None and deadline is not None and deadline < limits.min_deadline:
            least = math.ceil(limits.min_deadline * 1000)
            raise InvalidRequest(
                f"deadline_ms must be at least {least} (a limit of this API key), got {round(deadline * 1000)}.",
                param="deadline_ms",
            )


def duration(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1.5s`, `20ms`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{max(1, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return (f"{int(minutes)}m" if minutes else "") + f"{rest:g}s"


def _limited(who: str, what: str, bucket: Bucket, amount: float, now: float) -> RateLimited:
    wait = bucket.seconds_until(amount, now)
    return RateLimited(
        f"{who} may use {bucket.limit} {what} a minute. Try again in {duration(wait)}.",
        retry_after=max(1, math.ceil(wait)),
    )
