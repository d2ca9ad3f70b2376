"""The requests, answers and events of /v1/responses.

Items that come in are read loosely (`Item`), since clients send back what any server gave them; what goes out is exact.
Sampling fields of a chat that OpenAI does not list here (`top_k`, `seed`, `stop`, …) are passed on to the chat.
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

Status = Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "access_programs": (None, {}),
    "background_options": (None, {}),
    "context_management": (None, [], {}),
    "conversation": (None,),
    "image": (None, {}),
    "moderation": (None,),
    "prompt": (None,),
    "prompt_cache_options": (None, {}),
    "prompt_cache_retention": (None, "in_memory", "in-memory"),
    "service_tier": (None, "auto", "default"),
    "truncation": (None, "disabled"),
}
"""Known fields that nothing acts on, with the values that change nothing."""

INSTEAD: Mapping[str, str] = {
    "access_programs": "There are no such programs here.",
    "background_options": "A response in the background begins at once; batches have a completion window.",
    "context_management": "Shorten the input, or send truncate_prompt_tokens.",
    "conversation": "Name the response before it in previous_response_id.",
    "image": "Inputs and answers are text.",
    "moderation": "Check the text before it is sent.",
    "prompt": "Prompts are not kept here: send them in instructions and input.",
    "prompt_cache_options": "Prompts are cached by their content; cache_salt separates them.",
    "prompt_cache_retention": "Prompts are cached by their content, while there is memory.",
    "service_tier": "Use priority, where the server's scheduler.policy is priority.",
    "truncation": "Send truncate_prompt_tokens: -1 drops the oldest tokens that leave no room for the answer.",
}
"""Field name → the way to what it asks for, or the reason why there is none."""

INCLUDED = frozenset(
    {
        "message.output_text.logprobs",
        "reasoning.encrypted_content",  # thoughts are sent as text, so nothing is missing from a stateless history
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Values of `include`. Those of tools that this server does not run add nothing."""


# -- requests --------------------------------------------------------------------------------------


class InputPart(Struct, kw_only=True):
    """A part of a message's content, or of a function's output."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Struct, kw_only=True):
    """An input item of any type: a message has none where it is short."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    encrypted_content: str | None = None
    phase: str | None = None


class FunctionTool(Struct, kw_only=True):
    """A tool. The tools that OpenAI itself runs have another `type`, and are refused."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseTextFormat(Struct, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct, kw_only=True):
    format: ResponseTextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Struct, kw_only=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Struct, kw_only=True):
    include_obfuscation: bool | None = None


class ResponseRequest(Struct, kw_only=True):
    """Body of POST /v1/responses."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    """Limits calls of tools that the server itself runs: there are none."""
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    # Labels for the client's own book-keeping.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# -- answers ---------------------------------------------------------------------------------------


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[Any] = field(default_factory=list)
    content: list[ReasoningText]
    status: ItemStatus


class FunctionCallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(Struct, kw_only=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    """Always 0: tokens are cached without being charged for."""


class OutputTokensDetails(Struct, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct, kw_only=True):
    reason: Literal["max_output_tokens", "content_filter"]


FailureCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class ResponseFailure(Struct, kw_only=True):
    code: FailureCode
    """Those of OpenAI's codes that may arise here."""
    message: str
    type: str | None = None
    """Code that the same error has in other endpoints."""
    param: str | None = None


class ResponseObject(Struct, kw_only=True):
    """A response, complete or not. What the request left out is shown as it was computed with, where that is known."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[OutputItem] = field(default_factory=list)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: ReasoningOptions = field(default_factory=ReasoningOptions)
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float | None = None
    text: TextOptions = field(default_factory=lambda: TextOptions(format=ResponseTextFormat(type="text")))
    tool_choice: Any = "auto"
    tools: list[Any] = field(default_factory=list)
    top_logprobs: int = 0
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


class DeletedResponse(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


# -- events ----------------------------------------------------------------------------------------


class ResponseEvent(Struct, kw_only=True):
    """One event of a stream. Fields that its type does not have are left out."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
