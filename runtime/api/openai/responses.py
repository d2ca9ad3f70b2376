"""The answers of OpenAI's API, with vLLM's additions. A field that is UNSET is left out."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field

from runtime.api.openai.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs

Finish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = field(default_factory=PromptTokensDetails)
    completion_tokens_details: CompletionTokensDetails = field(default_factory=CompletionTokensDetails)


class FunctionCall(Struct, kw_only=True):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class MessageToolCall(Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDelta(Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallChunk(Struct, kw_only=True):
    """A call's beginning, with its id and name, or more of its arguments."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class AnswerTimes(Struct, kw_only=True):
    """Times of one answer, in vLLM's shape. Null where there is too little to tell."""

    time_to_first_token_ms: float | None
    """From the arrival of the request."""
    generation_time_ms: float | None
    """From the first token to the last."""
    queue_time_ms: float | None
    """From the arrival to the first computation."""
    mean_itl_ms: float | None
    """Mean time between two tokens."""
    tokens_per_second: float | None


class AssistantMessage(Struct, kw_only=True):
    role: str = "assistant"
    """`assistant`, unless the setting server.response_role says otherwise."""
    content: str | None
    """None beside calls without a text."""
    refusal: None = None
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    """The same under vLLM's newer name."""
    tool_calls: list[MessageToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AssistantMessage
    finish_reason: Finish
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | None = None
    metrics: AnswerTimes | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    index: int
    delta: ChatDelta
    finish_reason: Finish | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    metrics: AnswerTimes | UnsetType = UNSET


class CompletionChoice(Struct, kw_only=True):
    """A choice of a whole answer, or of a chunk of a stream (where `finish_reason` is null until the end)."""

    index: int
    text: str
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class TextCompletion(Struct, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    metrics: AnswerTimes | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    root: str
    """Adapter: the folder that it is served from, as in vLLM. Base model: its name."""
    max_model_len: int
    owned_by: str = "eft"
    parent: str | None = None
    prompt_format: str | UnsetType = UNSET
    """Format of the training rows of an adapter that was trained here: chat, alpaca or text."""
    default_sampling_params: dict[str, float] = {}
    """Defaults of request fields, if they differ from OpenAI's."""


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDeleted(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class Tokens(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizedText(Struct, kw_only=True):
    prompt: str
