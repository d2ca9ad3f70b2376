"""The structs that cross a boundary: API to engine, scheduler to worker, engine to client stream.

All of them encode with msgspec, so the same messages drive an in-process worker or
torch.distributed ranks. Imports no torch and no web framework. Times are `time.monotonic()` seconds.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from msgspec import Meta, Struct, field
from msgspec.structs import force_setattr

from runtime.errors import InvalidRequest
from settings.api import LimitSettings

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]

MAX_SEED = 2**63 - 1

MAX_BIAS = 100.0
"""Largest absolute value of a logit bias."""

new_sequence_id = itertools.count(1).__next__
"""The engine's own id for a sequence: unique in this process, never chosen by a client. Callable from any thread."""


class Bounds(NamedTuple):
    """Range of a number in a request."""

    least: float
    most: float
    above: bool = False
    """True if `least` itself is excluded."""
    text: str = ""
    """Words for the range in an error, where the numbers alone do not say it."""

    def holds(self, value: float) -> bool:
        """True if the value is in the range; never for NaN."""
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.text:
            return self.text
        if self.above:
            return f"above {self.least:g} and at most {self.most:g}"
        return f"between {self.least:g} and {self.most:g}"


def within(least: float, most: float, text: str = "", *, above: bool = False) -> Meta:
    """Annotation of a field with the range of its values. Decoding does not check it: `verify` does, and its error
    has the value too."""
    schema = {"exclusiveMinimum" if above else "minimum": least, "maximum": most}
    return Meta(extra={"bounds": Bounds(least, most, above, text)}, extra_json_schema=schema)


def bounds_of(kind: type[Struct]) -> dict[str, Bounds]:
    """Ranges of the fields that are declared with `within`."""
    hints = get_type_hints(kind, include_extras=True)
    metas = [(name, meta) for name, hint in hints.items() for meta in getattr(hint, "__metadata__", ())]
    return {name: meta.extra["bounds"] for name, meta in metas if meta.extra and "bounds" in meta.extra}


class DefaultedParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling fields for which a model or the operator may have other defaults than these neutral ones."""

    max_tokens: Annotated[int | None, within(1, 2**31 - 1, "at least 1 and below 2^31")] = None
    """Most tokens to generate; None means as many as the context holds."""
    temperature: Annotated[float, within(0, 100)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, within(0, 1, above=True)] = 1.0
    top_k: Annotated[int, within(-1, 2**31 - 1, "at least 1, or 0 or -1 for no limit")] = 0
    """0 and -1 both mean: no limit."""
    min_p: Annotated[float, within(0, 1)] = 0.0
    repetition_penalty: Annotated[float, within(0.01, 100)] = 1.0
    """Divisor of the positive logits of tokens that the prompt or the output has, and factor of the negative ones."""


class SamplingParams(DefaultedParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules for turning logits into tokens, and for the end of the output. Field names as in the OpenAI and vLLM
    APIs.

    Each field is declared here and nowhere else: the bodies of requests inherit them (`api.openai.schema`), and they
    travel as they are to the sampler (`Admission.params`).
    """

    min_tokens: Annotated[int, within(0, 2**31 - 1, "at least 0 and below 2^31")] = 0
    """Stop tokens, end-of-sequence and stop strings do not end the output before this many tokens."""
    presence_penalty: Annotated[float, within(-2, 2)] = 0.0
    """Subtracted from the logits of tokens that the output has."""
    frequency_penalty: Annotated[float, within(-2, 2)] = 0.0
    """Subtracted from a token's logit once for each time that the output has it."""
    logit_bias: dict[int, float] = {}
    """Token id → number that is added to its logit."""
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens must not follow each other in the output, with a space in front or without."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be sampled."""
    logprobs: Annotated[int | None, within(0, 2**31 - 1, "at least 0")] = None
    """Number of the likeliest tokens at each position of the output whose log-probabilities are reported, besides that
    of the token itself. Of the model's own distribution: before temperature, penalties and masks."""
    prompt_logprobs: Annotated[int | None, within(0, 2**31 - 1, "at least 0")] = None
    """The same for the tokens of the prompt, except the first."""
    seed: Annotated[int | None, within(-MAX_SEED - 1, MAX_SEED, "a signed 64-bit integer")] = None
    """Same seed, same prompt: same tokens, whatever else runs. None draws one per request."""
    stop: str | tuple[str, ...] = ()
    """A single string becomes a tuple of one."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            force_setattr(self, "stop", (self.stop,))

    def verify(self, *, vocab_size: int, eos_ids: Collection[int], limits: LimitSettings) -> None:
        """Raise `InvalidRequest` naming the first field out of range, its limit and the value given. `eos_ids` end an
        output unless `ignore_eos`."""
        for name in _BOUNDS:
            check_bounds(name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        stop, stop_ids = self.stop_strings, self.stop_token_ids
        _check_count("stop", len(stop), limits.max_stop, "strings")
        if any(not text for text in stop):
            raise InvalidRequest("stop must not hold an empty string.", param="stop")
        if (longest := max(map(len, stop), default=0)) > limits.max_stop_chars:
            raise _out_of_range("stop", f"strings of at most {limits.max_stop_chars} characters", f"one of {longest}")
        _check_count("stop_token_ids", len(stop_ids), limits.max_stop_token_ids, "ids")
        check_ids(stop_ids, vocab_size, "stop_token_ids")
        self._verify_rules(vocab_size, limits)
        ends = {*stop_ids, *(() if self.ignore_eos else eos_ids)} if self.min_tokens else set()
        if self.allowed_token_ids is not None and ends.issuperset(self.allowed_token_ids):
            raise InvalidRequest(
                "allowed_token_ids must have a token that does not end the output, to generate before min_tokens.",
                param="allowed_token_ids",
            )
        if len(ends) >= vocab_size:
            raise InvalidRequest(
                f"stop_token_ids must leave a token to generate before min_tokens: they are all {vocab_size} of them.",
                param="stop_token_ids",
            )

    def _verify_rules(self, vocab_size: int, limits: LimitSettings) -> None:
        _check_count("logit_bias", len(self.logit_bias), limits.max_logit_bias, "tokens")
        check_ids(list(self.logit_bias), vocab_size, "logit_bias")
        for token, bias in self.logit_bias.items():
            if not -MAX_BIAS <= bias <= MAX_BIAS:  # NaN fails every comparison
                raise InvalidRequest(
                    f"logit_bias[{token}] must be between {-MAX_BIAS:g} and {MAX_BIAS:g}, got {bias}.",
                    param="logit_bias",
                )
        _check_count("bad_words", len(self.bad_words), limits.max_bad_words, "texts")
        if not all(map(str.strip, self.bad_words)):
            raise InvalidRequest("bad_words must not hold empty texts, or white space alone.", param="bad_words")
        if (longest := max(map(len, self.bad_words), default=0)) > limits.max_stop_chars:
            limit = f"texts of at most {limits.max_stop_chars} characters"
            raise _out_of_range("bad_words", limit, f"one of {longest}")
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must have at least one token id.", param="allowed_token_ids")
            check_ids(self.allowed_token_ids, vocab_size, "allowed_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > limits.max_logprobs:
                raise _out_of_range(name, f"at most {limits.max_logprobs}", getattr(self, name))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def has_penalty(self) -> bool:
        """True if the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def top_k_limit(self) -> float:
        """`top_k` as a limit that compares: infinity when there is none."""
        return self.top_k if self.top_k > 0 else math.inf


_BOUNDS = bounds_of(SamplingParams)


def check_bounds(field: str, value: float | None, *, shown: str | None = None) -> None:
    """Raise `InvalidRequest` for a value out of the range of a field of `SamplingParams`. `shown`: the client's name of
    the field, if it is another one."""
    if value is not None and not _BOUNDS[field].holds(value):
        raise _out_of_range(shown or field, str(_BOUNDS[field]), value)


class SamplingDefaults(DefaultedParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values for requests that leave these fields out: the model's, or the operator's."""

    max_tokens_limit: int | None = None
    """Most tokens of any request, even if its `max_tokens` is higher."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end an output, besides the tokenizer's."""

    @property
    def values(self) -> dict[str, Any]:
        """Field of `SamplingParams` → its default."""
        return {name: getattr(self, name) for name in DefaultedParams.__struct_fields__}

    @property
    def params(self) -> SamplingParams:
        """The parameters of a request that sets none."""
        return SamplingParams(**self.values)

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not neutral."""
        neutral = SamplingDefaults()
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return {name: value for name, value in fields if value != getattr(neutral, name)}


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `InvalidRequest` for an id without an embedding in the model."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        what = "Token ids" if param in ("prompt", "tokens") else f"{param}: token ids"
        raise InvalidRequest(f"{what} must be from 0 to {vocab_size - 1}, got {wrong}.", param=param)


def _check_count(field: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise _out_of_range(field, f"at most {most} {unit}", f"{count} {unit}")


def _out_of_range(field: str, limit: str, given: object) -> InvalidRequest:
    return InvalidRequest(f"{field} must be {limit}, got {given}.", param=field)


Pooling = Literal["mean", "last"]
"""Way to make one vector of a prompt's hidden states after the last norm: their mean, or that of the last token."""


class BeamSearch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Look for the likeliest outputs instead of sampling them."""

    width: int
    """Sequences that are followed at once."""
    best: int
    """Number of them in the answer, at most `width`."""
    length_penalty: float = 1.0
    """Outputs rank by their log-probability divided by their length to this power: more favours long ones."""
    early_stopping: bool | Literal["never"] = False
    """True ends the search as soon as `width` outputs are complete; False when the live sequences are unlikely to
    become better than those; "never" when they cannot."""


class Submission(Struct, frozen=True, kw_only=True):
    """One sequence to generate, as the API hands it to the engine. Already tokenised and checked."""

    request_id: str
    """Label from the client or the API, for hooks and logs. Sequences of one request share it, and it may come again
    once that has ended: the engine keys nothing by it."""
    prompt_ids: list[int]
    params: SamplingParams
    id: int = field(default_factory=new_sequence_id)
    priority: int = 0
    """Lower runs first (policy `priority`)."""
    deadline: float | None = None
    """Time by which the last token must be there; later the request ends with "timeout"."""
    tenant: str = ""
    """Tenant that is charged for it: a label made from the API key, never the key (policy `fair`)."""
    fork_of: int = 0
    """`id` of a sequence with the same prompt, submitted before: its KV of the prompt is shared once it is computed.
    0: of none."""
    scored: bool = False
    """Add up the log-probabilities of the generated tokens, which `best_of` ranks by."""
    beams: BeamSearch | None = None
    """Search instead of sampling; of `params`, the lengths and the stop ids count."""
    pooling: Pooling | None = None
    """Pool the hidden states of the prompt instead of generating; of `params` nothing counts."""
    background: bool = False
    """Runs on what all other requests leave, whatever the policy: it comes after them, and gives its place to them."""
    adapter: str = ""
    """Adapter *version* key; the empty string is the base model. Part of every KV block's key."""
    cache_salt: str = ""
    """Requests share cached KV only with requests of the same salt."""
    grammar: str = ""
    """Source of the grammar that the output is held to (`text.grammar`), which compiles; empty: none."""
    arrival: float = 0.0
    """Set by the engine when 0."""


class TokenLogprob(Struct, frozen=True, array_like=True):
    """Log-probability of a token where it stands, in the model's own distribution: before temperature, penalties and
    masks."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: list[tuple[int, float]] = []
    """The likeliest tokens and their log-probabilities, likeliest first."""


ROW_FAILED = "An internal error ended this request; the others go on."
"""`Output.error` of a sequence that could not be computed."""

ADAPTER_UNLOADED = "The adapter version that this request was for is not loaded any more."
"""`Output.error` of a sequence whose adapter version was deleted or unloaded while it waited for it."""

ADAPTER_UNREADABLE = "The adapter version that this request was for cannot be loaded: its files are missing or damaged."
"""`Output.error` of a sequence whose adapter version could not be read."""

GRAMMAR_TOO_COMPLEX = "The output cannot be held to its grammar any further: the grammar is too complex."
"""`Output.error` of a sequence that its own grammar ended: the request's fault, where all others are the server's."""


class Output(Struct, frozen=True, kw_only=True):
    """Addition of one step to one sequence. Deltas: the consumer appends."""

    id: int = 0
    """`id` of the submission."""
    request_id: str = ""
    """Label of the submission."""
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
    """Sum over the generated tokens so far; 0 unless the submission was `scored`, or has `params.logprobs`."""
    logprobs: list[TokenLogprob] = []
    """One for each of `token_ids`; empty unless `params.logprobs`."""
    prompt_logprobs: list[TokenLogprob] = []
    """One for each token of the prompt except the first, on the first output; empty unless `params.prompt_logprobs`."""
    pooled: list[float] = []
    """Pooled hidden states, [hidden]; on the last output of a submission with `pooling`."""
    choices: list["Output"] = []
    """Best sequences of a beam search, whole, best first; on the last output only."""
    error: str | None = None
    """Message for the client with finish_reason "error". Never a traceback or a path."""
    timing: "RequestTiming | None" = None
    """On the last output only: the engine thread changes it no more."""

    def merge(self, later: "Output") -> "Output":
        """This output and the next one of the same request as one (a slow reader's queue is bounded)."""
        return Output(
            id=self.id,
            request_id=self.request_id,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
            prompt_tokens=later.prompt_tokens,
            cached_tokens=later.cached_tokens,
            generated_tokens=later.generated_tokens,
            cumulative_logprob=later.cumulative_logprob,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            pooled=later.pooled,
            choices=later.choices,
            error=later.error,
            timing=later.timing,
        )


class RequestTiming(Struct, kw_only=True):
    """The life of one request in times and counts, for metrics. One writer: the engine thread."""

    arrival: float
    adapter: str = ""
    """Key of the adapter version that it names."""
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
    """A sequence enters (or re-enters) a slot: all data that a worker needs of it."""

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
    num_logprobs: int | None = None
    """Number of the likeliest tokens that the worker reports with each that it samples; None: it reports none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; None: they are not asked for, or were reported already."""
    bad_word_ids: list[list[int]] = []
    """Sequences of tokens that must not be completed: `params.bad_words`."""
    pooling: Pooling | None = None
    """The worker pools the prompt's hidden states instead of sampling."""
    candidates: int = 0
    """Number of the likeliest next tokens that the worker reports instead of sampling; 0: it samples."""
    grammar: str = ""
    """Source of the grammar of the output; empty: none."""

    @property
    def has_rules(self) -> bool:
        """True if the logits are changed before a token is chosen, other than by `min_tokens`."""
        params = self.params
        masked = params.allowed_token_ids is not None or bool(self.bad_word_ids)
        return masked or bool(params.logit_bias) or params.has_penalty


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
    new_token_ids: list[int] = []
    """The last tokens that the row computes, where the worker did not sample them."""
    forces: bool = False
    """True if the worker may add tokens that the sequence's grammar forces after the sampled ones."""


class Move(Struct, frozen=True, array_like=True):
    """Copy a whole block before anything of the step is computed."""

    kind: Literal["copy", "out", "in"]
    """Within the cache, from it to the pool in host memory, or back."""
    source: int
    target: int


class RidingRow(Struct, frozen=True, kw_only=True):
    """Part of a step that is of a sequence in training: `count` tokens, at least 2, from position `start`."""

    ride: int
    """Id of the sequence, which no other has."""
    length: int
    """Tokens of the sequence."""
    start: int
    count: int
    blocks: list[int] = []
    """All blocks of the sequence, once the planner has given it some."""


class StepPlan(Struct, frozen=True, kw_only=True):
    """Work of the next step. Workers keep tokens and tables per slot; the plan carries deltas."""

    step: int
    admitted: list[Admission]
    rows: list[Row]
    moves: list[Move] = []
    """In the order in which they count."""
    riding: RidingRow | None = None
    """Tokens of training that ride in this step."""

    @property
    def num_tokens(self) -> int:
        """Tokens of requests."""
        return sum(row.count for row in self.rows)

    @property
    def empty(self) -> bool:
        """True if there is nothing to do."""
        return not self.rows and not self.moves


class StepResult(Struct, frozen=True, kw_only=True):
    """Result of a step: the tokens that it sampled."""

    step: int
    slots: list[int]
    """Slots of the rows with `sample`; one that had a draft comes once for every token that it got."""
    tokens: list[int]
    """One token id for each of `slots`."""
    failed: dict[int, str] = {}
    """Slots whose row could not be computed, with the reason; the others went on. Rows of such a slot in later
    plans are not computed, until another sequence enters it."""
    logprobs: dict[int, list[TokenLogprob]] = {}
    """Slots of sequences with `num_logprobs` → one for each of their new tokens."""
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    """Slots of sequences with `prompt_logprobs` → one for each token of the prompt after one that the row computed."""
    pooled: dict[int, list[float]] = {}
    """Slots of sequences with `pooling` whose prompt is complete → the pooled vector."""
    forced: dict[int, list[int]] = {}
    """Slots → tokens that follow on the sampled ones, as the grammar allows no others. They are not computed yet."""
    candidates: dict[int, list[tuple[int, float]]] = {}
    """Slots of sequences with `candidates` → token ids and their log-probabilities, likeliest first."""
    ridden: bool = False
    """True if the plan's riding tokens were computed."""
