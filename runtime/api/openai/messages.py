"""From a chat's messages to what a chat template takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.api.openai.schema import ChatMessage, ChatRequest, ContentPart, TokenizeRequest
from runtime.errors import InvalidRequest, Unsupported

TEMPLATE_KWARGS: Mapping[str, type] = {
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "date_string": str,
    "enable_thinking": bool,
    "keep_thinking": bool,
    "reasoning_effort": str,
    "thinking": bool,
    "thinking_budget": int,
}
"""Template variables that a request may set, with their types. Scalars only: a template may loop over a list."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_OTHER_PARTS = frozenset(
    {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file"}
)


_EMPTY = frozenset({b"null", b"[]", b"{}"})


@dataclass(frozen=True)
class ChatPrompt:
    """The arguments of `Tokenizer.encode_chat`."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]

    @property
    def num_chars(self) -> int:
        """Characters of all texts: what tokenising will cost."""
        return sum(len(text) for message in self.messages for text in message.values() if text)


def chat_prompt(request: ChatRequest | TokenizeRequest, template: str | None, *, max_messages: int) -> ChatPrompt:
    """What to render. Raises `InvalidRequest` and `Unsupported`, naming the message and the part."""
    messages = request.messages or []
    if not 1 <= len(messages) <= max_messages:
        raise InvalidRequest(
            f"messages must have between 1 and {max_messages} messages, got {len(messages)}.", param="messages"
        )
    kwargs = _template_kwargs(request.chat_template_kwargs or {})
    proceed = _flag(request.continue_final_message, kwargs.pop("continue_final_message", None), default=False)
    return ChatPrompt(
        messages=[_message(message, index, template or "") for index, message in enumerate(messages)],
        add_generation_prompt=_flag(
            request.add_generation_prompt, kwargs.pop("add_generation_prompt", None), default=not proceed
        ),
        continue_final_message=proceed,
        template_kwargs=kwargs,
    )


def _message(message: ChatMessage, index: int, template: str) -> dict[str, Any]:
    path = f"messages[{index}]"
    for field in ("tool_calls", "function_call", "audio"):
        if bytes(getattr(message, field)) not in _EMPTY:
            raise Unsupported(f"`{path}.{field}` is not supported yet.", param=f"{path}.{field}")
    role = message.role
    if role == "developer" and "developer" not in template:
        role = "system"  # OpenAI's newer name of it, which few templates know
    return {
        "role": role,
        "content": _content(message, path),
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }


def _content(message: ChatMessage, path: str) -> str:
    content = message.content if message.content is not None else message.refusal
    if isinstance(content, str):
        return content
    if not content:
        raise InvalidRequest(f"{path}.content must be a text, or a list of parts.", param=f"{path}.content")
    return "\n".join(_part(part, f"{path}.content[{index}]") for index, part in enumerate(content))


def _part(part: ContentPart, path: str) -> str:
    if part.type in _OTHER_PARTS:
        raise Unsupported(f"`{path}`: parts of type `{part.type}` are not supported yet; send text.", param=path)
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in _TEXT_PARTS and part.type != "refusal":
        raise InvalidRequest(f"{path}.type must be `text`, got `{part.type[:64]}`.", param=f"{path}.type")
    if text is None:
        raise InvalidRequest(f"{path} has no text.", param=f"{path}.text")
    return text


def _template_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        param = f"chat_template_kwargs.{name[:64]}"
        kind = TEMPLATE_KWARGS.get(name)
        if kind is None:
            known = ", ".join(sorted(TEMPLATE_KWARGS))
            raise InvalidRequest(f"`{param}` is not one of the template variables {known}.", param=param)
        if value is not None and type(value) is not kind:
            raise InvalidRequest(f"`{param}` must be of type {kind.__name__}.", param=param)
    return {name: value for name, value in given.items() if value is not None}


def _flag(given: bool | None, in_kwargs: bool | None, *, default: bool) -> bool:
    if given is not None:
        return given
    return default if in_kwargs is None else in_kwargs
