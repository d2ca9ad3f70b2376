"""Options of a request as they are checked: sampling parameters, the checks that do not depend on the prompt, and the
room in the context."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from runtime.api.http.record import MAX_ID
from runtime.api.openai.models import Served
from runtime.api.openai.schema import ChatRequest, CompletionRequest, GenerationRequest
from runtime.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Unsupported,
)
from runtime.messages import (
    MAX_SEED,
    BeamSearch,
    SamplingDefaults,
    SamplingParams,
    check_bounds,
)
from settings.api import LimitSettings
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService


DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` in completions; a chat's is the rest of the context."""


def choices_of(request: GenerationRequest) -> int:
    """Number of choices that are answered for each prompt."""
    return 1 if request.n is None else request.n


def sequences_of(request: GenerationRequest) -> int:
    """Number of sequences submitted per prompt, of which the best `n` are the answer; 1 for a beam search."""
    if request.use_beam_search:
        return 1
    return choices_of(request) if request.best_of is None else request.best_of


@dataclass(frozen=True)
class Wanted:
    """Checked sampling options of a request, before the prompt length and so the room for output are known."""

    params: SamplingParams
    max_field: str
    """The field that `max_tokens` comes from."""
    default: int | None
    """Default of `max_tokens` for a request without it; None: the rest of the context."""
    scores_only: bool
    """True if the prompt is scored and what is generated is left out: `max_tokens` 0."""
    limit: int | None
    """Upper limit of `max_tokens` for every request."""


def wanted_of(
    request: GenerationRequest,
    given: Collection[str],
    service: "EngineService",
    limits: LimitSettings,
    *,
    default_max: int | None,
    vocab_size: int | None = None,
) -> Wanted:
    """The fields that the request sets, which are `given`, and the server's defaults for the others; `default_max`: the
    endpoint's default of `max_tokens`; `vocab_size`: ids below this are valid, by default the base's. Raises
    `InvalidRequest`."""
    defaults = service.sampling_defaults
    if request.use_beam_search:  # which samples nothing
        defaults = SamplingDefaults(max_tokens=defaults.max_tokens, max_tokens_limit=defaults.max_tokens_limit)
    field, most = _asked_max(request)
    scores_only = most == 0 and isinstance(request, CompletionRequest)
    if scores_only:
        most = _check_scores_only(request)
    check_bounds("max_tokens", most, shown=field)
    own = {name: getattr(request, name) for name in SamplingParams.__struct_fields__ if name in given}
    reported = {"logprobs": _check_logprobs(request, limits), "prompt_logprobs": _prompt_logprobs(request)}
    params = SamplingParams(**{**defaults.values, **own, **reported, "max_tokens": most})
    params.verify(vocab_size=vocab_size or service.vocab_size, eos_ids=service.eos_ids, limits=limits)
    limit = defaults.max_tokens_limit
    if limit is not None and params.min_tokens > limit:
        raise InvalidRequest(
            f"min_tokens must be at most {limit}, the most that this server generates, got {params.min_tokens}.",
            param="min_tokens",
        )
    default = defaults.max_tokens if default_max is None else default_max
    return Wanted(params, field, default, scores_only, limit)


def _check_scores_only(request: GenerationRequest) -> int:
    """The tokens to generate, which are left out, for a `max_tokens` of 0."""
    if not getattr(request, "echo", None) and request.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens must be at least 1 and below 2^31, or 0 with echo or prompt_logprobs, which scores the prompt; "
            "got 0.",
            param="max_tokens",
        )
    return 1


def _check_logprobs(request: GenerationRequest, limits: LimitSettings) -> int | None:
    """Number of the likeliest tokens that the request asks for at each position."""
    if isinstance(request, ChatRequest):
        most, given = limits.max_logprobs, request.top_logprobs
        if not 0 <= given <= most:
            raise InvalidRequest(f"top_logprobs must be between 0 and {most}, got {given}.", param="top_logprobs")
        if given and not request.logprobs:
            raise InvalidRequest(f"top_logprobs needs logprobs: true, got {given} without.", param="top_logprobs")
    return request.num_logprobs


def _prompt_logprobs(request: GenerationRequest) -> int | None:
    """The same for the prompt, which with `echo` is a part of the answer's text."""
    asked = request.prompt_logprobs
    if asked is not None and request.stream:
        raise InvalidRequest(
            f"prompt_logprobs is for answers that are not streamed, got {asked} with stream: true.",
            param="prompt_logprobs",
        )
    if isinstance(request, CompletionRequest) and request.echo and request.num_logprobs is not None:
        return max(asked or 0, request.num_logprobs)
    return asked


def fit_context(wanted: Wanted, prompt_tokens: int, context: int, *, prompt_field: str) -> SamplingParams:
    """The parameters with a `max_tokens` that fits beside the prompt. Raises `ContextLengthExceeded`.

    A value from the client must fit as it is, up to the server's limit; a default is lowered.
    """
    params, room = wanted.params, context - prompt_tokens
    if room <= 0:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens, and at least one must be left for the "
            f"output. The prompt has {prompt_tokens} tokens.",
            param=prompt_field,
        )
    most = min(room if wanted.limit is None else wanted.limit, room)
    if params.max_tokens is None:
        if wanted.default is None and wanted.limit is None:
            return params
        default = room if wanted.default is None else wanted.default
        return replace(params, max_tokens=max(min(default, most), min(params.min_tokens, most)))
    if wanted.limit is not None and params.max_tokens > wanted.limit:
        params = replace(params, max_tokens=wanted.limit)
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. You asked for "
            f"{prompt_tokens + params.max_tokens}: {prompt_tokens} in the prompt and {params.max_tokens} in "
            f"{wanted.max_field}. Shorten the prompt or the output.",
            param=wanted.max_field,
        )
    return params


def truncate(prompt: list[int], request: GenerationRequest, context: int) -> list[int]:
    """The last `truncate_prompt_tokens` of `prompt`, or the first where `truncation_side` is right; -1 keeps as many
    as leave room for the output."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == -1:
        keep = max(1, context - (_asked_max(request)[1] or 1))
    if not 1 <= keep <= context:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1, or between 1 and {context}, got {keep}.",
            param="truncate_prompt_tokens",
        )
    return prompt[:keep] if request.truncation_side == "right" else prompt[-keep:]


def choice_of(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of `n` choices: the first keeps the seed, the others count on from it. The prompt that they
    share is scored once."""
    if choice and params.prompt_logprobs is not None:
        params = replace(params, prompt_logprobs=None)
    if params.seed is None or choice == 0:
        return params
    span = 2 * (MAX_SEED + 1)
    return replace(params, seed=(params.seed + choice + MAX_SEED + 1) % span - MAX_SEED - 1)


def _asked_max(request: GenerationRequest) -> tuple[str, int | None]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens


# -- checks ----------------------------------------------------------------------------------------
#
# Checks of a request that do not depend on its prompt: ranges, caps, and combinations of fields.

MAX_SALT = 128
"""Bytes of a cache salt."""

MAX_PRIORITY = 2**31
"""Largest absolute value of a priority."""

MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000
"""Longest deadline: a week, in milliseconds."""

LABELS = ("user", "safety_identifier", "prompt_cache_key", "session_id")


def check(
    request: GenerationRequest,
    given: Collection[str],
    served: Served,
    settings: Settings,
    *,
    num_prompts: int = 1,
    default_max: int | None,
) -> Wanted:
    """Sampling options of the request, with all checks that do not depend on its prompts. Cheap, so it runs before
    tokenising. `default_max`: the endpoint's default of `max_tokens`. Raises `InvalidRequest`, `Unsupported`."""
    limits = settings.limits
    _check_sequences(request, limits, num_prompts)
    _check_labels(request, limits)
    service = served.service
    wanted = wanted_of(request, given, service, limits, default_max=default_max, vocab_size=served.vocab_size)
    check_beams(request, given, limits, service.eos_ids)
    _check_urgency(request, settings.scheduler.policy)
    if (size := len((request.cache_salt or "").encode())) > MAX_SALT:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT} bytes, got {size}.", param="cache_salt")
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise InvalidRequest(
            f"truncation_side needs truncate_prompt_tokens, got {request.truncation_side}.", param="truncation_side"
        )
    if request.include_metrics and (num_prompts * sequences_of(request) > 1 or request.use_beam_search):
        raise InvalidRequest(
            "include_metrics is for requests of one sequence: with several prompts, `n`, `best_of` or a beam search "
            "the times belong to none of them.",
            param="include_metrics",
        )
    options = request.stream_options
    if options is not None and not request.stream:
        raise InvalidRequest("stream_options is only for requests with stream set.", param="stream_options")
    if options is not None and options.include_obfuscation:
        field = "stream_options.include_obfuscation"
        raise Unsupported(f"`{field}` is not supported yet, got true.", param=field)
    return wanted


def _check_sequences(request: GenerationRequest, limits: LimitSettings, num_prompts: int) -> None:
    choices = choices_of(request)
    if not 1 <= choices <= limits.max_n:
        raise InvalidRequest(f"n must be between 1 and {limits.max_n}, got {choices}.", param="n")
    if request.best_of is not None and request.best_of < choices:
        raise InvalidRequest(f"best_of must be at least n ({choices}), got {request.best_of}.", param="best_of")
    if request.best_of is not None and request.best_of > limits.max_n:
        raise InvalidRequest(f"best_of must be at most {limits.max_n}, got {request.best_of}.", param="best_of")
    each, field = (choices, "n") if request.best_of is None else (request.best_of, "best_of")
    if num_prompts * each > limits.max_sequences:
        raise InvalidRequest(
            f"Prompts times {field} must be at most {limits.max_sequences}, got {num_prompts} times {each}: "
            f"{num_prompts * each}.",
            param=field,
        )
    if request.stream and sequences_of(request) > choices:
        raise InvalidRequest(
            f"best_of above n ({choices}) cannot be streamed, got {request.best_of}: which are best is only known "
            "at the end.",
            param="best_of",
        )


def _check_labels(request: GenerationRequest, limits: LimitSettings) -> None:
    metadata = request.metadata or {}
    if len(metadata) > limits.max_metadata:
        raise InvalidRequest(
            f"metadata must have at most {limits.max_metadata} entries, got {len(metadata)}.", param="metadata"
        )
    texts = [(field, getattr(request, field) or "") for field in LABELS]
    texts += [("metadata", text) for entry in metadata.items() for text in entry]
    for field, text in texts:
        if len(text) > limits.max_label:
            what = "keys and values" if field == "metadata" else "a text"
            raise InvalidRequest(
                f"{field} must have {what} of at most {limits.max_label} characters, got {len(text)}.", param=field
            )
    if len(request.request_id or "") > MAX_ID:
        raise InvalidRequest(
            f"request_id must have at most {MAX_ID} characters, got {len(request.request_id or '')}.",
            param="request_id",
        )


def _check_urgency(request: GenerationRequest, policy: str) -> None:
    priority, deadline = request.priority or 0, request.deadline_ms
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {priority}.", param="priority"
        )
    if priority and policy != "priority":
        raise Unsupported(
            f"`priority` is acted on where the server's scheduler.policy is priority; here it is {policy}, "
            f"got {priority}.",
            param="priority",
        )
    if deadline is not None and not 1 <= deadline <= MAX_DEADLINE_MS:
        raise InvalidRequest(
            f"deadline_ms must be between 1 and {MAX_DEADLINE_MS}, got {deadline}.", param="deadline_ms"
        )


# -- beams -----------------------------------------------------------------------------------------
#
# Beam search in the form of the OpenAI and vLLM APIs: `use_beam_search` and its related fields.

SEARCH_NEUTRAL: dict[str, tuple[float, ...]] = {"temperature": (0,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
"""Values of sampling fields that a search accepts: they change nothing."""

MAX_PENALTY = 10.0
"""Largest absolute value of the length penalty."""


def check_beams(
    request: GenerationRequest, given: Collection[str], limits: LimitSettings, eos_ids: Collection[int]
) -> None:
    """Raise `InvalidRequest` for options that a search does not support, and for search fields without a search."""
    penalty = 1.0 if request.length_penalty is None else request.length_penalty
    if not request.use_beam_search:
        if penalty != 1.0:
            raise InvalidRequest(f"length_penalty needs use_beam_search, got {penalty:g}.", param="length_penalty")
        if request.early_stopping:
            raise InvalidRequest(
                f"early_stopping needs use_beam_search, got {request.early_stopping}.", param="early_stopping"
            )
        return
    if not -MAX_PENALTY <= penalty <= MAX_PENALTY:  # NaN fails every comparison
        raise InvalidRequest(
            f"length_penalty must be between {-MAX_PENALTY:g} and {MAX_PENALTY:g}, got {penalty:g}.",
            param="length_penalty",
        )
    if request.stream:
        raise InvalidRequest(
            "use_beam_search cannot be streamed: which sequences are best is only known at the end.", param="stream"
        )
    if request.stop:
        raise InvalidRequest("use_beam_search has no stop strings; give stop_token_ids.", param="stop")
    for field, value in (("logprobs", request.num_logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if value is not None:
            raise InvalidRequest(
                f"use_beam_search reports no log-probabilities of single tokens: leave {field} out, got {value}.",
                param=field,
            )
    width = request.best_of or request.n or 1
    stop_ids = {*(request.stop_token_ids or ()), *(() if request.ignore_eos else eos_ids)}
    candidates = width * (1 + len(stop_ids))
    if candidates > limits.max_beam_candidates:
        field = "stop_token_ids" if request.stop_token_ids else "n" if request.best_of is None else "best_of"
        raise InvalidRequest(
            f"{field}: a beam search may compare at most {limits.max_beam_candidates} next tokens of a beam, which is "
            f"its beams times one more than its stop token ids; got {width} times {1 + len(stop_ids)}, {candidates}.",
            param=field,
        )
    for field, neutral in SEARCH_NEUTRAL.items():
        if field in given and getattr(request, field) not in neutral:
            raise InvalidRequest(
                f"use_beam_search looks for the likeliest sequences and does not sample: leave {field} out, "
                f"or give {neutral[0]}; got {getattr(request, field):g}.",
                param=field,
            )


def beams_of(request: GenerationRequest, choices: int) -> BeamSearch | None:
    """The search of a request: `best_of` beams, of which `choices` are the answer; None without a search."""
    if not request.use_beam_search:
        return None
    return BeamSearch(
        width=request.best_of or choices,
        best=choices,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        early_stopping=request.early_stopping or False,
    )
