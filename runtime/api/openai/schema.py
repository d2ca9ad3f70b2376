"""The requests of OpenAI's API, with vLLM's additions: every field that we act on, and the reading of a body into them.

Sampling fields are declared in `SamplingParams`. Known fields that we do not act on are in `neutral`. A field that is
null counts as absent: clients send both.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from litestar import Request

from runtime.api.handle import Api
from runtime.api.http.body import LARGE, Fields, decode, has_many_strings, parse_fields, read_body
from runtime.api.http.record import record_of
from runtime.api.openai.neutral import INSTEAD, NEUTRAL
from runtime.errors import InvalidRequest, Unsupported
from runtime.messages import SamplingParams
from runtime.support.logs import clean, get_logger
from settings.api import LimitSettings

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _null() -> msgspec.Raw:
    return msgspec.Raw(b"null")


def is_null(value: msgspec.Raw) -> bool:
    """True for a field that is null or absent."""
    return bytes(value) == b"null"


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message. `type` is open: unsupported types and misspelt ones get different errors."""

    type: str
    text: str | None = None
    refusal: str | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """OpenAI's `json_schema`. It is enforced whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=_null)
    strict: bool | None = None


class StructuralTag(msgspec.Struct, kw_only=True):
    """vLLM's structure: a text that begins with one of the triggers is held to a schema, up to an end."""

    begin: str
    end: str
    schema: msgspec.Raw = msgspec.field(default_factory=_null)


class ResponseFormat(msgspec.Struct, kw_only=True):
    """`type` is open: unsupported types and misspelt ones get the same error."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: list[StructuralTag] | None = None
    triggers: list[str] | None = None
    format: msgspec.Raw = msgspec.field(default_factory=_null)
    """xgrammar's form of structural tags, which is refused by name."""


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's: exactly one of these."""

    json: msgspec.Raw = msgspec.field(default_factory=_null)
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | ResponseFormat | None = None


class FunctionSpec(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=_null)
    strict: bool | None = None


class ToolSpec(msgspec.Struct, kw_only=True):
    """`type` is open: only functions are supported."""

    type: str
    function: FunctionSpec | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call in the history."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction
    index: int | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # Clients send answers of other servers back as history with these. Not decoded: nothing in them is used.
    annotations: msgspec.Raw = msgspec.field(default_factory=_null)
    audio: msgspec.Raw = msgspec.field(default_factory=_null)
    function_call: msgspec.Raw = msgspec.field(default_factory=_null)
    tool_calls: list[ToolCall] | None = None


class GenerationRequest(SamplingParams, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Fields that chat and completions have in common: those of sampling, and these."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    include_metrics: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    deadline_ms: int | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's older names of what `structured_outputs` holds.
    guided_json: msgspec.Raw = msgspec.field(default_factory=_null)
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: str | ResponseFormat | None = None
    spaces_between_special_tokens: bool | None = None
    """The `tokenizers` library writes none in either case."""
    # Labels for the client's own book-keeping: accepted, and kept nowhere, but for those of a stored chat.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Number of the likeliest tokens whose log-probabilities are asked for with each token of the output; None: not
        even its own."""
        return self.logprobs

    @property
    def asks_for_form(self) -> bool:
        """True if a field of structured output is set (`api.openai.forms`)."""
        return any(getattr(self, name) is not None for name in _FORM_FIELDS) or not is_null(self.guided_json)

    @property
    def wants_usage(self) -> bool:
        """True if a chunk with the usage ends the stream. `include_usage: false` means none at all; without that
        field, `continuous_usage_stats` implies this chunk too."""
        options = self.stream_options or StreamOptions()
        return bool(options.continuous_usage_stats if options.include_usage is None else options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """True if every chunk holds the usage so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    # A flag here, with the number in a field of its own.
    logprobs: bool = False
    top_logprobs: int = 0
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    store: bool | None = None
    documents: list[dict[str, str]] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def asks_for_form(self) -> bool:
        """True if a field of the form of an answer is set (`api.openai.forms`)."""
        return any(getattr(self, name) is not None for name in _CHAT_FORM_FIELDS) or super().asks_for_form


_FORM_FIELDS = (
    "response_format", "structured_outputs", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
)  # fmt: skip
_CHAT_FORM_FIELDS = ("tools", "tool_choice", "reasoning_effort", "thinking_token_budget")


class BatchChatRequest(ChatRequest, frozen=True, kw_only=True):
    """Several chats with the same options, in vLLM's shape."""

    messages: list[list[ChatMessage]]  # type: ignore[assignment]  # in the place of one chat

    def chats(self) -> list[ChatRequest]:
        """Each chat as a request of its own."""
        options = {name: getattr(self, name) for name in ChatRequest.__struct_fields__ if name != "messages"}
        return [ChatRequest(messages=messages, **options) for messages in self.messages]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """vLLM's: a text in `prompt`, or a chat in `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolSpec] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


# -- fields ----------------------------------------------------------------------------------------
#
# Request fields that are known but not acted on (`NEUTRAL`), and unknown fields.

T = TypeVar("T")

_log = get_logger("api")

_MESSAGE_FIELDS = frozenset(ChatMessage.__struct_fields__)
_OPTION_FIELDS = frozenset(StreamOptions.__struct_fields__)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_objects = msgspec.json.Decoder(list[msgspec.Raw] | None)
_message = msgspec.json.Decoder(dict[str, msgspec.Raw])

_MAX_NEUTRAL = 64
"""Bytes of the longest encoded neutral value, with room for spaces; longer ones need no decoding."""

_MAX_NAMED = 8
"""Most unknown fields that the warning lists."""


def check_fields(
    fields: Fields,
    known: Iterable[str],
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
    instead: Mapping[str, str] = INSTEAD,
) -> list[str]:
    """Raise `Unsupported` for the first field with a value that is not supported; return the unknown names.

    `known` are the fields that the endpoint acts on; `neutral` and `instead` as `NEUTRAL` and `INSTEAD` are for
    OpenAI's API.
    """
    unknown = []
    for name, value in fields.items():
        if name in known:
            continue
        if name not in neutral:
            unknown.append(name)
        elif not _is_neutral(value, neutral[name]):
            hint = f" {instead[name]}" if name in instead else ""
            raise Unsupported(f"`{name}` is not supported yet, got {_shown(value)}.{hint}", param=name)
    return unknown


def unknown_nested(fields: Fields, *, max_messages: int) -> list[str]:
    """Unknown keys inside messages and stream options, as `messages[0].colour`.

    `fields` were decoded already, so their types are right. Also refuses too many messages.
    """
    unknown: list[str] = []
    if options := _value(fields, "stream_options", _object):
        unknown += [f"stream_options.{name}" for name in options if name not in _OPTION_FIELDS]
    return unknown + _unknown_in_messages(fields.get("messages", _null()), "messages", max_messages)


def unknown_keys(value: msgspec.Raw | None, kind: type[msgspec.Struct], path: str) -> list[str]:
    """Keys of the object `value`, decoded as `kind` already, that `kind` does not have; each with its path."""
    known = frozenset(kind.__struct_fields__)
    given = (None if value is None else _object.decode(value)) or {}
    return [f"{path}.{name}" for name, one in given.items() if name not in known and bytes(one) != b"null"]


def _unknown_in_messages(value: msgspec.Raw, path: str, max_messages: int) -> list[str]:
    """Unknown keys in a list of messages, or in each of a list of such lists."""
    unknown: list[str] = []
    messages = _objects.decode(value) or []
    if len(messages) > max_messages:
        raise InvalidRequest(f"{path} must have at most {max_messages} messages, got {len(messages)}.", param=path)
    for index, message in enumerate(messages):
        if bytes(memoryview(message)[:1]) == b"[":
            unknown += _unknown_in_messages(message, f"{path}[{index}]", max_messages)
        else:
            keys = _message.decode(message)
            unknown += [f"{path}[{index}].{name}" for name in keys if name not in _MESSAGE_FIELDS]
    return unknown


def _value(fields: Fields, name: str, decoder: msgspec.json.Decoder[T]) -> T | None:
    return decoder.decode(fields[name]) if name in fields else None


def report_unknown(
    request: Request[Any, Any, Any], names: list[str], mode: Literal["ignore", "warn", "reject"]
) -> None:
    """Ignore unknown fields, warn of them, or raise `InvalidRequest`, as `mode` says."""
    if not names or mode == "ignore":
        return
    listed = ", ".join(clean(name[:64]).strip() or '""' for name in names[:_MAX_NAMED])
    if len(names) > _MAX_NAMED:
        listed += f" and {len(names) - _MAX_NAMED} more"
    if mode == "reject":
        raise InvalidRequest(f"Unknown fields: {listed}.", param=names[0], code="unknown_parameter")
    record_of(request).warnings.append(f"unknown fields: {listed}")
    _log.warning("unknown_fields", fields=listed)


def _is_neutral(value: msgspec.Raw, neutral: tuple[Any, ...]) -> bool:
    if len(bytes(value)) > _MAX_NEUTRAL:
        return False
    given = msgspec.json.decode(value)
    return any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in neutral)


def _shown(value: msgspec.Raw) -> str:
    text = bytes(value)[:400].decode("utf-8", "ignore")
    return text if len(text) <= 100 else text[:100] + "…"


# -- cost ------------------------------------------------------------------------------------------
#
# Cost of decoding a body, estimated before it is decoded.
#
# Why is said where all values are counted (`runtime.api.http.body`). The limits are far beyond what fits a context.

MAX_FIELD = 1024 * 1024
"""Most bytes of a field, unless it holds the prompt."""

MAX_IDS = 2_000_000
"""Most token ids in all prompts."""

MAX_LISTS = 20_000
"""Most lists of token ids."""

_TEXTS = frozenset(
    {"prompt", "messages", "system", "input", "text_1", "text_2", "queries", "query", "documents", "instructions"}
)
_IDS = frozenset({"prompt", "tokens", "input"})


def check_messages(body: bytes, *, max_messages: int) -> None:
    """Raise `InvalidRequest` for a body that has too many strings because it has too many messages."""
    if has_many_strings(body) and body.count(b'"role"') > max_messages:
        raise InvalidRequest(f"messages must have at most {max_messages} messages.", param="messages")


def check_cost(fields: Fields, limits: Mapping[str, int] | None = None) -> None:
    """Raise `InvalidRequest` for a field that would take too long to decode, or exceeds its limit of bytes in
    `limits`."""
    for name, value in fields.items():
        size = len(memoryview(value))
        limit = (limits or {}).get(name, MAX_FIELD)
        if size <= limit:
            continue
        if name not in _TEXTS | _IDS:
            raise InvalidRequest(f"`{name}` must have at most {limit} bytes, got {size}.", param=name)
        if name in _IDS:
            _check_ids(name, bytes(value))


def _check_ids(name: str, value: bytes) -> None:
    if not value.startswith(b"[") or value[1:64].lstrip().startswith(b'"'):
        return  # a text, or a list of texts
    if value.count(b",") >= MAX_IDS or value.count(b"[") > MAX_LISTS:
        raise InvalidRequest(f"`{name}` has more than {MAX_IDS} ids or {MAX_LISTS} lists.", param=name)


# -- intake ----------------------------------------------------------------------------------------
#
# Intake, the same for all POST endpoints: from bytes to a checked struct.

S = TypeVar("S", bound=msgspec.Struct)


class Parsed(NamedTuple, Generic[S]):
    """A body that was read."""

    asked: S
    given: frozenset[str]
    """Names of the fields that it sets."""
    unknown: list[str]
    fields: Fields
    """Its top level."""


class Intake(Generic[S]):
    """Reader of requests of one kind."""

    def __init__(
        self,
        kind: type[S],
        *,
        neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
        instead: Mapping[str, str] = INSTEAD,
        passed: Iterable[str] = (),
    ) -> None:
        """`neutral`, `instead`: as `NEUTRAL` and `INSTEAD` are for OpenAI's API. `passed`: fields that another reader
        of the body acts on."""
        self._neutral = neutral
        self._instead = instead
        self._known = frozenset(kind.__struct_fields__).union(passed)
        self._optional = frozenset(field.encode_name for field in msgspec.structs.fields(kind) if not field.required)
        self._decoder = msgspec.json.Decoder(kind)

    async def read(self, request: Request[Any, Any, Any], api: Api) -> S:
        """The request's body as a struct. Raises a `RequestError` for an invalid body."""
        return (await self.read_given(request, api))[0]

    async def read_given(self, request: Request[Any, Any, Any], api: Api) -> tuple[S, frozenset[str]]:
        """The request's body as a struct, and the names of the fields that it sets."""
        body = await read_body(request, api.settings.server)
        limits = api.settings.limits
        parsed = await self.parse(body, limits)
        report_unknown(request, parsed.unknown, limits.unknown_fields)
        return parsed.asked, parsed.given

    async def parse(self, body: bytes, limits: LimitSettings) -> Parsed[S]:
        """A body as a struct. Raises a `RequestError` for an invalid one."""
        if len(body) > LARGE:
            return await asyncio.to_thread(self._parse, body, limits)
        return self._parse(body, limits)

    def _parse(self, body: bytes, limits: LimitSettings) -> Parsed[S]:
        check_messages(body, max_messages=limits.max_messages)
        fields = parse_fields(body)
        check_cost(fields, {"chat_template_kwargs": limits.max_template_kwargs})
        unknown = check_fields(fields, self._known, self._neutral, self._instead)
        absent = {name for name, value in fields.items() if name in self._optional and bytes(value) == b"null"}
        if absent:
            body = msgspec.json.encode({name: value for name, value in fields.items() if name not in absent})
        asked = decode(body, self._decoder)
        unknown += unknown_nested(fields, max_messages=limits.max_messages)
        return Parsed(asked, frozenset(fields.keys() - absent), unknown, fields)
