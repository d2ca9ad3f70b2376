"""Measured speed of steps, prompts and outputs: the basis of deadlines and Retry-After."""

import math
from dataclasses import asdict, dataclass

# An observation counts for a third (1/e) after this time.
RATE_DECAY_SECONDS = 30.0

# Weight of a new observation in the running means.
EMA_WEIGHT = 0.1

# Tokens of prompts at least in a step beside streams, whatever their target.
MIN_PROMPT_TOKENS = 16
# What older steps with prompts count, step by step: what a token costs follows its context, and the load.
COST_DECAY = 0.9
# Part of the target that a step is planned to take.
AIM = 0.95
# A step counts as at most this many times what was expected of it.
MAX_SURPRISE = 2.0
# Part of the time for prompts by which the reserve grows with a late step, and its largest value.
RESERVE_STEP, MAX_RESERVE = 0.02, 0.5
# Context, in tokens, by which its price is known: keeps both prices near one in size.
DEPTH_UNIT = 1024.0


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


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of a step, as far as its time depends on it."""

    streams: int
    """Rows of one token."""
    tokens: int
    """Tokens of the other rows: prompts in chunks."""
    depth: float
    """Sum of the tokens before each of `tokens`."""


class PromptPace:
    """Tokens of prompts that a step may have beside streams, so that these keep the target for a token.

    A step takes what its streams take and, for each token of a prompt, a price that rises with the tokens before it.
    Both are learned from the steps: the time without prompts by the number of streams, the price by least squares over
    the last steps with prompts, older ones counting less. A reserve grows with every late step and shrinks with every
    other one: as large as the percentile of the target requires.
    """

    def __init__(self, target: float | None, percentile: float) -> None:
        """`target`: seconds for a token; None: there is none, and steps take all tokens that they may.
        `percentile`: share of steps beside streams that keep it."""
        self._target = target
        self._percentile = percentile
        self._reserve = 0.0
        self._alone: dict[int, Mean] = {}
        """Seconds of steps without prompts, by the bits of the number of streams."""
        self._squares = [0.0, 0.0, 0.0]
        """Decayed sums over steps with prompts: of tokens squared, tokens times depth, depth squared."""
        self._products = [0.0, 0.0]
        """The same of tokens and of depth, times the seconds that prompts took."""

    @property
    def learns(self) -> bool:
        """True if there is a target, so that steps are to be told."""
        return self._target is not None

    @property
    def reserve(self) -> float:
        """Part of the time for prompts that is held back, as steps were late."""
        return self._reserve

    def on_step(self, work: StepWork, seconds: float) -> bool:
        """A step has taken `seconds`. Returns True if prompts made it miss the target: its streams alone would have
        kept it."""
        if self._target is None or seconds <= 0:
            return False
        if not work.tokens:
            if work.streams:
                mean = self._alone.setdefault(work.streams.bit_length(), Mean())
                mean.add(min(seconds, MAX_SURPRISE * mean.value) if mean.value else seconds)
            return False
        alone = self._seconds_alone(work.streams)
        depth = work.depth / DEPTH_UNIT
        token, deeper = self._prices()
        expected = alone + work.tokens * token + depth * deeper
        spent = max(0.0, (min(seconds, MAX_SURPRISE * expected) if token or deeper else seconds) - alone)
        # Per token, so that long chunks, which are cheaper by token, do not hide what short ones cost.
        mean_depth = depth / work.tokens
        new = (1.0, mean_depth, mean_depth * mean_depth)
        self._squares = [COST_DECAY * old + add for old, add in zip(self._squares, new, strict=True)]
        price = spent / work.tokens
        self._products = [
            COST_DECAY * old + add for old, add in zip(self._products, (price, price * mean_depth), strict=True)
        ]
        if not work.streams or alone > self._target:  # no chunk would be small enough
            return False
        late = seconds > self._target
        # Half of the late steps that the percentile allows: so it holds where they come in turns with others.
        allowed = (1 - self._percentile) / 2
        part = 1 - allowed if late else -allowed
        self._reserve = min(MAX_RESERVE, max(0.0, self._reserve + RESERVE_STEP * part))
        return late

    def seconds_beside(self, streams: int) -> float:
        """Seconds that prompts may take in a step with this number of streams; infinity: as long as they want."""
        if self._target is None or not streams:
            return math.inf
        return max(0.0, (AIM * self._target - self._seconds_alone(streams)) * (1 - self._reserve))

    def tokens_in(self, seconds: float, context: int) -> int:
        """Tokens that a prompt gets in `seconds`, after `context` ones that are computed."""
        token, deeper = self._prices()
        if seconds <= 0 or not (token or deeper):
            return 0
        deeper /= DEPTH_UNIT
        first = token + deeper * context
        # first * n + deeper * n ** 2 / 2 = seconds
        return int(2 * seconds / (first + math.sqrt(first * first + 2 * deeper * seconds)))

    def seconds_of(self, tokens: int, context: int) -> float:
        """Seconds that `tokens` of a prompt take after `context` ones."""
        token, deeper = self._prices()
        return tokens * (token + deeper * (context + tokens / 2) / DEPTH_UNIT)

    def _seconds_alone(self, streams: int) -> float:
        """Seconds of a step of this number of streams, or of the nearest that there was; 0 before the first."""
        if not streams or not self._alone:
            return 0.0
        nearest = min(self._alone, key=lambda bits: abs(bits - streams.bit_length()))
        return self._alone[nearest].value or 0.0

    def _prices(self) -> tuple[float, float]:
        """Seconds of a token, and of `DEPTH_UNIT` tokens before it; both 0 before the first step with prompts."""
        count, depth, square = self._squares
        price, priced_depth = self._products
        if not count:
            return 0.0, 0.0
        spread = square * count - depth * depth
        deeper = (priced_depth * count - price * depth) / spread if spread > 1e-3 * count * count else 0.0
        # Neither is ever negative; where one would be, the other explains all.
        deeper = min(max(0.0, deeper), price / depth if depth else 0.0)
        return max(0.0, (price - deeper * depth) / count), deeper


class Pace:
    """Running means of the time of steps, the rate of prompts and the length of outputs."""

    def __init__(self, target: float | None = None, percentile: float = 0.95) -> None:
        """`target` and `percentile`: see `PromptPace`."""
        self.prompts = PromptPace(target, percentile)
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

    paced_steps: int = 0
    """Steps with prompts beside streams that have a target."""
    paced_tokens: int = 0
    """Tokens of prompts in `paced_steps`."""
    late_steps: int = 0
    """Those of `paced_steps` that missed the target because of their prompts."""

    swapped_out: int = 0
    """Blocks of preempted sequences copied to host memory."""
    swapped_in: int = 0
    """Blocks copied back from there. Blocks still cached, or of requests that ended meanwhile, are not copied."""

    def since(self, earlier: "SchedulerCounts") -> "SchedulerCounts":
        """Increase of each counter since `earlier`."""
        before = asdict(earlier)
        return SchedulerCounts(**{name: value - before[name] for name, value in asdict(self).items()})
