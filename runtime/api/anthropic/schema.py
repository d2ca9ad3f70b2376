"""The requests, answers and events of Anthropic's messages API (anthropic-version 2023-06-01).

Values are checked where they are translated (`runtime.api.anthropic.translate`), or as those of the chat that a message
becomes. Labels and hints without effect here are declared all the same, so that they are known.
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "container": (None,),
    "context_management": (None, {}),
    "diagnostics": (None, {}),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "service_tier": (None, "auto", "standard_only"),
    "speed": (None, "standard"),
}
"""Known fields that nothing acts on, with the values that change nothing."""

INSTEAD: Mapping[str, str] = {
    "container": "This server runs no tools and keeps no containers.",
    "context_management": "Send the messages that count; /v1/messages/count_tokens counts them.",
    "diagnostics": "The server's log and /metrics have them.",
    "inference_geo": "The answer is computed where the server stands.",
    "mcp_servers": "Let the client call MCP servers, and pass their tools.",
    "service_tier": "The operator gives keys their limits and the scheduler its policy.",
    "speed": "There is one speed.",
}
"""Field name → the way to what it asks for, or the reason why there is none."""


# -- requests --------------------------------------------------------------------------------------


class Citations(Struct, kw_only=True):
    enabled: bool | None = None


class DocumentSource(Struct, kw_only=True):
    """A document's text. `type` is open: what is no text is named in the error."""

    type: str
    data: str | None = None
    content: "str | list[Block] | None" = None


class Block(Struct, kw_only=True):
    """A content block of any type; `type` is open, so that types that are not supported are named in the error."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    # Of documents.
    source: DocumentSource | None = None
    title: str | None = None
    context: str | None = None
    citations: Citations | list[Any] | None = None
    """A list of them in a text of an answer of another server."""


class InputMessage(Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class InputTool(Struct, kw_only=True):
    """A tool of the client's. Anthropic's own (computer, bash, web search) have a `type` and no schema."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class InputToolChoice(Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens, and what a message has in common with it."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Prefixes are cached without being asked for.
    cache_control: dict[str, Any] | None = None


class MessageRequest(CountRequest, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # Labels for the client's own book-keeping.
    metadata: dict[str, Any] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


# -- answers ---------------------------------------------------------------------------------------


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    """Without `citations`, as Anthropic's servers send a text that has none."""

    text: str


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Of Anthropic's servers; here thoughts come back as the client has them."""


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(Struct, kw_only=True):
    """`input_tokens` are those of the prompt that no cached prefix had."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class Message(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Struct, kw_only=True):
    input_tokens: int


class MessageErrorDetail(Struct, kw_only=True):
    type: str
    message: str


class MessageError(Struct, kw_only=True, tag_field="type", tag="error"):
    error: MessageErrorDetail
    request_id: str


# -- events ----------------------------------------------------------------------------------------


class TextDelta(Struct, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Struct, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputJsonDelta(Struct, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class MessageStart(Struct, kw_only=True, tag_field="type", tag="message_start"):
    message: Message


class BlockStart(Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: OutputBlock


class BlockDelta(Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class MessageEnd(Struct, kw_only=True):
    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(Struct, kw_only=True, tag_field="type", tag="message_delta"):
    delta: MessageEnd
    usage: MessageUsage | UnsetType = UNSET


class MessageStop(Struct, kw_only=True, tag_field="type", tag="message_stop"):
    pass


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
