"""From request fields to sampling parameters: defaults, ranges, and what fits the context."""

from msgspec.structs import replace

from runtime.api.openai.beams import check_beams
from runtime.api.openai.schema import ChatRequest, GenerationRequest
from runtime.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from runtime.messages import MAX_SEED, SamplingParams
from settings.schema import LimitSettings

MAX_SALT = 128
"""Bytes of a cache salt."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` in completions; a chat's is the rest of the context."""


MAX_PRIORITY = 2**31
"""Priorities lie between minus this and this."""

MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000
"""A week."""


def choices_of(request: GenerationRequest) -> int:
    return 1 if request.n is None else request.n


def sequences_of(request: GenerationRequest) -> int:
    """How many are submitted for each prompt, of which the best `n` are the answer. A beam search is one."""
    if request.use_beam_search:
        return 1
    return choices_of(request) if request.best_of is None else request.best_of


def check_common(request: GenerationRequest, limits: LimitSettings, *, policy: str) -> None:
    """Raise for what is wrong whatever the prompt. Cheap, so it comes before tokenising."""
    choices = choices_of(request)
    if not 1 <= choices <= limits.max_n:
        raise InvalidRequest(f"n must be between 1 and {limits.max_n}, got {choices}.", param="n")
    if request.best_of is not None and request.best_of < choices:
        raise InvalidRequest(f"best_of must be at least n ({choices}), got {request.best_of}.", param="best_of")
    if request.best_of is not None and request.best_of > limits.max_n:
        raise InvalidRequest(f"best_of must be at most {limits.max_n}, got {request.best_of}.", param="best_of")
    check_beams(request)
    if request.stream and sequences_of(request) > choices:
        raise InvalidRequest(
            f"best_of above n ({choices}) cannot be streamed, got {request.best_of}: which are best is only known "
            "at the end.",
            param="best_of",
        )
    _check_urgency(request, policy)
    if len((request.cache_salt or "").encode()) > MAX_SALT:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT} bytes.", param="cache_salt")
    options = request.stream_options
    if options is not None and not request.stream:
        raise InvalidRequest("stream_options is only for requests with stream set.", param="stream_options")
    if options is not None and options.include_obfuscation:
        field = "stream_options.include_obfuscation"
        raise Unsupported(f"`{field}` is not supported yet, got true.", param=field)


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


def sampling_params(
    request: GenerationRequest, *, vocab_size: int, limits: LimitSettings
) -> tuple[SamplingParams, str]:
    """The request's parameters, verified, and the name of the field that `max_tokens` comes from."""
    field, given = _asked_max(request)
    if given is not None and not 1 <= given < 2**31:
        raise InvalidRequest(f"{field} must be at least 1 and below 2^31, got {given}.", param=field)
    params = SamplingParams(
        max_tokens=given,
        min_tokens=0 if request.min_tokens is None else request.min_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=0 if request.top_k is None else request.top_k,
        min_p=0.0 if request.min_p is None else request.min_p,
        seed=request.seed,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
    )
    params.verify(vocab_size=vocab_size, max_stop=limits.max_stop)
    return params, field


def fit_context(
    params: SamplingParams, prompt_tokens: int, context: int, *, max_field: str, prompt_field: str, default: int | None
) -> SamplingParams:
    """`params` with a `max_tokens` that fits beside the prompt. Raises `ContextLengthExceeded`.

    A limit that the client gave must fit as it is; `default` (None: the rest of the context) gives way.
    """
    room = context - prompt_tokens
    if room <= 0:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens, and at least one must be left for the "
            f"output. The prompt has {prompt_tokens} tokens.",
            param=prompt_field,
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. You asked for "
            f"{prompt_tokens + params.max_tokens}: {prompt_tokens} in the prompt and {params.max_tokens} in "
            f"{max_field}. Shorten the prompt or the output.",
            param=max_field,
        )
    if params.max_tokens is None and default is not None:
        return replace(params, max_tokens=max(min(default, room), min(params.min_tokens, room)))
    return params


def truncate(prompt: list[int], request: GenerationRequest, context: int) -> list[int]:
    """The last `truncate_prompt_tokens` of `prompt`; -1 keeps as many as leave room for the output."""
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
    return prompt[-keep:]


def seed_of(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of `n` choices: the first keeps the seed, the others count on from it."""
    if params.seed is None or choice == 0:
        return params
    span = 2 * (MAX_SEED + 1)
    return replace(params, seed=(params.seed + choice + MAX_SEED + 1) % span - MAX_SEED - 1)


def _asked_max(request: GenerationRequest) -> tuple[str, int | None]:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens", request.max_completion_tokens
    return "max_tokens", request.max_tokens
