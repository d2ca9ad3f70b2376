"""Measured speed of steps, prompts and outputs: the basis of deadlines and Retry-After."""

import math
from dataclasses import asdict, dataclass

# An observation counts for a third (1/e) after this time.
RATE_DECAY_SECONDS = 30.0

# Weight of a new observation in the running means.
EMA_WEIGHT = 0.1


class Rate:
    """An amount per second, over about the last `RATE_DECAY_SECONDS`."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._last = 0.0
        self._sum = 0.0

    def add(self, amount: float, now: float) -> None:
        if self._start is None:
            self._start = self._last = now
        self._sum = self._sum * math.exp((self._last - now) / RATE_DECAY_SECONDS) + amount
        self._last = now

    def per_second(self, now: float) -> float:
        """0 until observations cover some time."""
        if self._start is None or now <= self._start:
            return 0.0
        decayed = self._sum * math.exp((self._last - now) / RATE_DECAY_SECONDS)
        return decayed / (RATE_DECAY_SECONDS * -math.expm1((self._start - now) / RATE_DECAY_SECONDS))


class Mean:
    """An exponentially weighted mean; None until there was a first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + EMA_WEIGHT * (value - self.value)


class Pace:
    """Running means of the time of steps, the rate of prompts and the length of outputs."""

    def __init__(self) -> None:
        self._step_seconds = Mean()
        self._prompt_rate = Mean()
        self._output_tokens = Mean()
        self._admitted = Rate()

    @property
    def step_seconds(self) -> float:
        """Usual time of a step, in seconds; 0 before the first."""
        return self._step_seconds.value or 0.0

    def on_step(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """A step of `num_rows` computed `num_tokens`. One with more than two tokens a row measures the rate of
        prompts."""
        if seconds <= 0 or not num_rows:
            return
        self._step_seconds.add(seconds)
        if num_tokens > 2 * num_rows:
            self._prompt_rate.add(num_tokens / seconds)

    def on_admission(self, num_tokens: int, now: float) -> None:
        self._admitted.add(num_tokens, now)

    def on_output(self, num_tokens: int) -> None:
        """A request came to its own end after `num_tokens` of output."""
        self._output_tokens.add(num_tokens)

    def seconds_for(self, num_prompt: int, least_output: int, most_output: int) -> float:
        """Seconds that a request would take if it started now: its prompt, then a step for each token.

        Assumes outputs of the usual length, within the bounds. 0 before the first measurement.
        """
        if self._step_seconds.value is None:
            return 0.0
        prompt = num_prompt / self._prompt_rate.value if self._prompt_rate.value else self._step_seconds.value
        usual = most_output if self._output_tokens.value is None else int(self._output_tokens.value)
        output = max(1, least_output, min(usual, most_output))
        return prompt + (output - 1) * self._step_seconds.value

    def seconds_to_admit(self, num_tokens: float, now: float) -> float | None:
        """Seconds until `num_tokens` have left the queue; None before the first measurement."""
        rate = self._admitted.per_second(now)
        return num_tokens / rate if rate > 0 else None


# -- counts ----------------------------------------------------------------------------------------
#
# Counts of the scheduler since its start, for metrics.


@dataclass(slots=True)
class SchedulerCounts:
    """Counters that only rise."""

    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens of admitted requests, new or resumed."""
    prefix_hits: int = 0
    """Tokens of `prefix_queries` whose KV was there already: cached, or shared with another choice of the same
    prompt."""
    drafts: int = 0
    """Times that tokens of a sequence were guessed ahead."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that proved right."""

    swapped_out: int = 0
    """Blocks of preempted sequences copied to host memory."""
    swapped_in: int = 0
    """Blocks copied back from there. Blocks still cached, or of requests that ended meanwhile, are not copied."""

    def since(self, earlier: "SchedulerCounts") -> "SchedulerCounts":
        """Increase of each counter since `earlier`."""
        before = asdict(earlier)
        return SchedulerCounts(**{name: value - before[name] for name, value in asdict(self).items()})
