"""The structs that cross a boundary: API to engine, scheduler to worker, engine to client stream.

All of them encode with msgspec, so the same messages drive an in-process worker or
torch.distributed ranks. Imports no torch and no web framework. Times are `time.monotonic()` seconds.
"""

import math
from typing import Literal

from msgspec import Struct

from runtime.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]

MAX_SEED = 2**63 - 1


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to turn logits into tokens, and when to stop. Field names as in the OpenAI and vLLM APIs."""

    max_tokens: int | None = None
    """Most tokens to generate; None means as many as the context holds."""
    min_tokens: int = 0
    """Stop tokens, end-of-sequence and stop strings do not end the output before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 both mean: no limit."""
    min_p: float = 0.0
    seed: int | None = None
    """Same seed, same prompt: same tokens, whatever else runs. None draws one per request."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def verify(self, *, vocab_size: int, max_stop: int) -> None:
        """Raise `InvalidRequest` naming the first field out of range, its limit and the value given."""
        if self.max_tokens is not None and not 1 <= self.max_tokens < 2**31:
            raise _out_of_range("max_tokens", "at least 1 and below 2^31", self.max_tokens)
        if not 0 <= self.min_tokens < 2**31:
            raise _out_of_range("min_tokens", "at least 0 and below 2^31", self.min_tokens)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        if not 0.0 <= self.temperature <= 100.0:  # NaN fails every comparison
            raise _out_of_range("temperature", "between 0 and 100", self.temperature)
        if not 0.0 < self.top_p <= 1.0:
            raise _out_of_range("top_p", "above 0 and at most 1", self.top_p)
        if not -1 <= self.top_k < 2**31:
            raise _out_of_range("top_k", "at least 1, or 0 or -1 for no limit", self.top_k)
        if not 0.0 <= self.min_p <= 1.0:
            raise _out_of_range("min_p", "between 0 and 1", self.min_p)
        if self.seed is not None and not -MAX_SEED - 1 <= self.seed <= MAX_SEED:
            raise _out_of_range("seed", "a signed 64-bit integer", self.seed)
        if len(self.stop) > max_stop:
            raise _out_of_range("stop", f"at most {max_stop} strings", f"{len(self.stop)} strings")
        if any(not s for s in self.stop):
            raise InvalidRequest("stop must not hold an empty string.", param="stop")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise _out_of_range("stop_token_ids", f"token ids from 0 to {vocab_size - 1}", token)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def top_k_limit(self) -> float:
        """`top_k` as a limit that compares: infinity when there is none."""
        return self.top_k if self.top_k > 0 else math.inf


def _out_of_range(field: str, limit: str, given: object) -> InvalidRequest:
    return InvalidRequest(f"{field} must be {limit}, got {given}.", param=field)


class BeamSearch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Look for the likeliest outputs instead of sampling them."""

    width: int
    """Sequences that are followed at once."""
    best: int
    """So many of them are the answer, at most `width`."""
    length_penalty: float = 1.0
    """Outputs rank by their log-probability divided by their length to this power: more favours long ones."""
    early_stopping: bool | Literal["never"] = False
    """True ends the search as soon as `width` outputs are complete; False when the live sequences are unlikely to
    become better than those; "never" when they cannot."""


class Submission(Struct, frozen=True, kw_only=True):
    """One sequence to generate, as the API hands it to the engine. Already tokenised and checked."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs first (policy `priority`)."""
    deadline: float | None = None
    """When the last token must be there; later the request ends with "timeout"."""
    tenant: str = ""
    """Who pays for it: a label made from the API key, never the key (policy `fair`)."""
    fork_of: str = ""
    """Id of a request with the same prompt, submitted before: its KV of the prompt is shared once it is computed."""
    scored: bool = False
    """Add up the log-probabilities of the generated tokens, which `best_of` ranks by."""
    beams: BeamSearch | None = None
    """Search instead of sampling; of `params`, the lengths and the stop ids count."""
    adapter: str = ""
    """Adapter *version* key; the empty string is the base model. Part of every KV block's key."""
    cache_salt: str = ""
    """Requests share cached KV only with requests of the same salt."""
    arrival: float = 0.0
    """Set by the engine when 0."""


class Output(Struct, frozen=True, kw_only=True):
    """What one step added to one request. Deltas: the consumer appends."""

    request_id: str
    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    """Set on the last output of a request, and only there."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the output, if one did."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    generated_tokens: int = 0
    """Total so far, this output included."""
    cumulative_logprob: float = 0.0
    """Sum over the generated tokens so far; 0 unless the submission was `scored`."""
    choices: list["Output"] = []
    """Of a beam search, on the last output: its best sequences, whole, best first."""
    error: str | None = None
    """With finish_reason "error": what to tell the client. Never a traceback or a path."""

    def merge(self, later: "Output") -> "Output":
        """This output and the next one of the same request as one (a slow reader's queue is bounded)."""
        return Output(
            request_id=self.request_id,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
            prompt_tokens=later.prompt_tokens,
            cached_tokens=later.cached_tokens,
            generated_tokens=later.generated_tokens,
            cumulative_logprob=later.cumulative_logprob,
            choices=later.choices,
            error=later.error,
        )


class RequestTiming(Struct, kw_only=True):
    """The life of one request in times and counts, for metrics. One writer: the engine thread."""

    arrival: float
    adapter: str = ""
    """Key of the adapter version that it asked for."""
    scheduled: float | None = None
    """First time it got tokens of a step."""
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    max_tokens: int = 0
    preemptions: int = 0
    deadline: float | None = None
    finish_reason: FinishReason | None = None


class Admission(Struct, frozen=True, kw_only=True):
    """A sequence enters (or re-enters) a slot: all that a worker must know of it."""

    slot: int
    """Row of the worker's persistent tables, unique among running sequences."""
    token_ids: list[int]
    """Every token so far: the prompt, and after a preemption also what was generated."""
    prompt_len: int
    block_ids: list[int]
    params: SamplingParams
    seed: int
    suppressed_ids: list[int]
    """Stop ids that must not be sampled before `params.min_tokens` (empty when min_tokens is 0)."""
    adapter: str = ""
    scored: bool = False
    """The worker reports the log-probabilities of what it samples."""
    candidates: int = 0
    """The worker samples nothing, and reports so many of the likeliest next tokens."""


class Row(Struct, frozen=True, kw_only=True, array_like=True):
    """One running sequence's part of a step: compute `count` tokens from position `start`."""

    slot: int
    start: int
    count: int
    sample: bool
    """True when the last of these tokens is the newest one, so that a next token is due."""
    new_blocks: list[int]
    """Blocks appended to the slot's table since its last row (or its admission)."""
    draft: list[int] = []
    """Guesses at the next tokens, counted in `count`: the last `len(draft)` tokens that the row computes.
    A token is sampled before each of them and after the last, as far as they are what was sampled."""
    told: list[int] = []
    """The last tokens that the row computes, where the worker did not sample them."""


class Move(Struct, frozen=True, array_like=True):
    """Copy a whole block before anything of the step is computed."""

    kind: Literal["copy", "out", "in"]
    """Within the cache, from it to the pool in host memory, or back."""
    source: int
    target: int


class StepPlan(Struct, frozen=True, kw_only=True):
    """What the next step computes. Workers keep tokens and tables per slot; the plan carries deltas."""

    step: int
    admitted: list[Admission]
    rows: list[Row]
    moves: list[Move] = []
    """In the order in which they count."""

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def empty(self) -> bool:
        """There is nothing to do."""
        return not self.rows and not self.moves


class StepResult(Struct, frozen=True, kw_only=True):
    """What a step sampled."""

    step: int
    slots: list[int]
    """Slots of the rows with `sample`; one that had a draft comes once for every token that it got."""
    tokens: list[int]
    """One token id for each of `slots`."""
    failed: dict[int, str] = {}
    """Slots whose row could not be computed, with the reason; the others went on. Rows of such a slot in later
    plans are not computed, until another sequence enters it."""
    logprobs: dict[int, float] = {}
    """Slots of scored sequences → log-probability of their new tokens, added up."""
    candidates: dict[int, list[tuple[int, float]]] = {}
    """Slots of sequences with `candidates` → token ids and their log-probabilities, likeliest first."""
