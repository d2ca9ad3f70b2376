"""How fast things go here, learned from the steps themselves: what deadlines and Retry-After are reckoned with."""

import math

MEMORY = 30.0
"""Seconds after which an observation counts for a third."""

LEARNING = 0.1
"""Weight of a new observation in a running mean."""


class Rate:
    """An amount per second, over about the last `MEMORY` seconds."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._last = 0.0
        self._sum = 0.0

    def add(self, amount: float, now: float) -> None:
        if self._start is None:
            self._start = self._last = now
        self._sum = self._sum * math.exp((self._last - now) / MEMORY) + amount
        self._last = now

    def per_second(self, now: float) -> float:
        """0 until something was seen for some time."""
        if self._start is None or now <= self._start:
            return 0.0
        decayed = self._sum * math.exp((self._last - now) / MEMORY)
        return decayed / (MEMORY * -math.expm1((self._start - now) / MEMORY))


class Mean:
    """An exponentially weighted mean; None until there was a first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + LEARNING * (value - self.value)


class Pace:
    """What steps, prompts and outputs take."""

    def __init__(self) -> None:
        self._step_seconds = Mean()
        self._prompt_rate = Mean()
        self._output_tokens = Mean()
        self._admitted = Rate()

    @property
    def step_seconds(self) -> float:
        """What a step usually takes; 0 until there was one."""
        return self._step_seconds.value or 0.0

    def on_step(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """A step of `num_rows` computed `num_tokens`. One with more tokens than rows tells how fast prompts go."""
        if seconds <= 0 or not num_rows:
            return
        self._step_seconds.add(seconds)
        if num_tokens > 2 * num_rows:
            self._prompt_rate.add(num_tokens / seconds)

    def on_admission(self, num_tokens: int, now: float) -> None:
        self._admitted.add(num_tokens, now)

    def on_output(self, num_tokens: int) -> None:
        """A request came to its own end after so many tokens."""
        self._output_tokens.add(num_tokens)

    def seconds_for(self, num_prompt: int, least_output: int, most_output: int) -> float:
        """How long a request would take that starts now: its prompt, then a step for each token.

        Outputs are taken to be as long as they usually are, within the bounds. 0 as long as nothing is known.
        """
        if self._step_seconds.value is None:
            return 0.0
        prompt = num_prompt / self._prompt_rate.value if self._prompt_rate.value else self._step_seconds.value
        usual = most_output if self._output_tokens.value is None else int(self._output_tokens.value)
        output = max(1, least_output, min(usual, most_output))
        return prompt + (output - 1) * self._step_seconds.value

    def seconds_to_admit(self, num_tokens: float, now: float) -> float | None:
        """How long it will be until so many tokens have left the queue; None while nothing is known."""
        rate = self._admitted.per_second(now)
        return num_tokens / rate if rate > 0 else None
