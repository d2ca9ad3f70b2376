"""Prompts of requests: a chat's messages as a template takes them, texts to token ids, and token ids to the text before
an output."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from litestar.types import Receive

from runtime.api.http.sse import unless_disconnected
from runtime.api.openai.schema import ChatMessage, ChatRequest, ContentPart, TokenizeRequest
from runtime.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from runtime.messages import check_ids
from runtime.text.chat_template import TemplateMessage
from runtime.text.grammar.schema import check_depth
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_prompt import shown_call
from settings.api import LimitSettings

# -- messages --------------------------------------------------------------------------------------
#
# Conversion of a chat's messages to the input of a chat template.

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

MESSAGE_COST = 8
"""Cost of rendering a message or a part of one: the number of characters that tokenise in the same time."""

_EMPTY = frozenset({b"null", b"[]", b"{}"})


@dataclass(frozen=True)
class ChatPrompt:
    """The arguments of `Tokenizer.encode_chat`."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]
    tools: tuple[dict[str, Any], ...] = ()
    template: str | None = None
    """Source of a template of the request's own."""

    @property
    def has_tools(self) -> bool:
        """True if there are tools, or calls or their results in the history."""
        return bool(self.tools) or any(one["tool_calls"] or one["role"] == "tool" for one in self.messages)

    @property
    def last_role(self) -> str:
        return str(self.messages[-1]["role"])

    @property
    def num_chars(self) -> int:
        """Characters of all texts. A template may write its variables for each message, so they count that often."""
        variables = sum(len(str(value)) for value in self.template_kwargs.values())
        texts = sum(_num_chars(value) for message in self.messages for value in message.values() if value)
        tools = sum(len(json.dumps(tool)) for tool in self.tools)
        return texts + variables * len(self.messages) + tools

    @property
    def cost(self) -> int:
        """Cost of rendering and tokenising this, as the number of characters that tokenise in the same time."""
        if self.template is not None:  # it must be compiled, and may run for long
            return LONG + 1
        parts = sum(len(message["content"]) for message in self.messages if isinstance(message["content"], list))
        parts += sum(len(message["tool_calls"] or ()) for message in self.messages)
        return self.num_chars + MESSAGE_COST * (len(self.messages) + parts)


def chat_prompt(
    request: ChatRequest | TokenizeRequest,
    template: str | None,
    limits: LimitSettings,
    *,
    tools: tuple[dict[str, Any], ...] = (),
    variables: Mapping[str, Any] | None = None,
    trust_template: bool = False,
) -> ChatPrompt:
    """Input of the template. `variables`: those of other fields than `chat_template_kwargs`; `trust_template`: the
    request may bring a template of its own.

    Raises `InvalidRequest` and `Unsupported`, naming the message and the part."""
    if request.chat_template is not None and not trust_template:
        raise Unsupported(
            "`chat_template`: this server takes no template from requests, since a template is a program that may "
            "never end. Its operator can allow it (model.trust_request_chat_template), or serve with another template "
            "(--chat-template).",
            param="chat_template",
        )
    template = request.chat_template or template
    messages, max_messages, max_parts = request.messages or [], limits.max_messages, limits.max_content_parts
    if not 1 <= len(messages) <= max_messages:
        raise InvalidRequest(
            f"messages must have between 1 and {max_messages} messages, got {len(messages)}.", param="messages"
        )
    parts = sum(len(message.content) for message in messages if isinstance(message.content, list))
    if parts > max_parts:
        raise InvalidRequest(f"messages must have at most {max_parts} content parts, got {parts}.", param="messages")
    _check_labels(messages, limits.max_label)
    kwargs = {**(variables or {}), **_template_kwargs(request.chat_template_kwargs or {})}
    if isinstance(request, ChatRequest) and request.documents:
        kwargs["documents"] = _documents(request.documents, template or "", max_parts)
    proceed = _flag(request.continue_final_message, kwargs.pop("continue_final_message", None), default=False)
    return ChatPrompt(
        messages=[_message(message, index, template or "") for index, message in enumerate(messages)],
        add_generation_prompt=_flag(
            request.add_generation_prompt, kwargs.pop("add_generation_prompt", None), default=not proceed
        ),
        continue_final_message=proceed,
        template_kwargs=kwargs,
        tools=tools,
        template=request.chat_template,
    )


def _documents(documents: list[dict[str, str]], template: str, most: int | None) -> list[dict[str, str]]:
    """Documents for a template that prints them, as transformers' `apply_chat_template` takes them."""
    if "documents" not in template:
        raise Unsupported(
            f"This model's chat template prints no `documents`, got {len(documents)}: put their text into a message.",
            param="documents",
        )
    if most is not None and len(documents) > most:
        raise InvalidRequest(f"documents must have at most {most} documents, got {len(documents)}.", param="documents")
    return documents


def _check_labels(messages: list[ChatMessage], most: int) -> None:
    for index, message in enumerate(messages):
        for field, text in (("name", message.name), ("tool_call_id", message.tool_call_id)):
            if text is not None and len(text) > most:
                path = f"messages[{index}].{field}"
                raise InvalidRequest(
                    f"{path} must have a text of at most {most} characters, got {len(text)}.", param=path
                )


def _message(message: ChatMessage, index: int, template: str) -> dict[str, Any]:
    path = f"messages[{index}]"
    for field in ("function_call", "audio"):
        if bytes(getattr(message, field)) not in _EMPTY:
            raise Unsupported(f"`{path}.{field}` is not supported yet.", param=f"{path}.{field}")
    role = message.role
    if role == "developer" and "developer" not in template:
        role = "system"  # OpenAI's newer name of it, which few templates support
    return {
        "role": role,
        "content": _content(message, path),
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": _calls(message, path),
        "reasoning_content": message.reasoning_content or message.reasoning,
    }


def _calls(message: ChatMessage, path: str) -> list[dict[str, Any]] | None:
    """Calls in the history, their arguments as objects: the template gets them as it prints them."""
    if not message.tool_calls:
        return None
    found = []
    for index, call in enumerate(message.tool_calls):
        field = f"{path}.tool_calls[{index}].function.arguments"
        arguments: object = call.function.arguments or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{field} must be a JSON object: {error}.", param=field) from error
        if not isinstance(arguments, dict):
            raise InvalidRequest(f"{field} must be a JSON object.", param=field)
        check_depth(arguments, field)
        found.append(shown_call({"name": call.function.name, "arguments": arguments}, index, call.id))
    return found


def _num_chars(value: object) -> int:
    """Characters of a text, of parts of one, or of calls."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + _num_chars(item) for key, item in value.items())
    return sum(map(_num_chars, value)) if isinstance(value, list) else len(str(value))


def _content(message: ChatMessage, path: str) -> str | list[dict[str, str]]:
    """A text, or parts: the template determines which it takes (`runtime.text.chat_template`)."""
    content = message.content if message.content is not None else message.refusal
    if content is None and message.role == "assistant":
        return ""  # an empty turn
    if isinstance(content, str):
        return content
    if not content:
        raise InvalidRequest(f"{path}.content must be a text, or a list of parts.", param=f"{path}.content")
    return [{"type": "text", "text": _text_of(part, f"{path}.content[{index}]")} for index, part in enumerate(content)]


def _text_of(part: ContentPart, path: str) -> str:
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


# -- text work -------------------------------------------------------------------------------------
#
# Long texts: rendered, encoded and decoded on two threads beside the event loop, however many requests arrive.
#
# Work that waits for a thread is dropped when its client leaves.

T = TypeVar("T")

LONG = 4000
"""Characters or tokens of a long text; below that a thread costs more than the work."""

# Two, so that a short text need not wait for a long one. More would take cores from the engine.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")


async def run_text_work(work: Callable[[], T], size: int, receive: Receive) -> T:
    """The result of `work` on a text of `size` characters, for the client behind `receive`.
    Raises the errors of `work`, and `ClientDisconnected`."""
    if size <= LONG:
        return work()

    async def wait() -> T:
        return await asyncio.get_running_loop().run_in_executor(_threads, work)

    return await unless_disconnected(receive, wait())


PromptInput = str | list[str | int | list[int]]
"""A text, several, token ids, or several lists of them."""

MAX_CHAT_CHARS = 256
"""Characters for each token of the context that a chat may have before it is rendered. Templates leave parts of a chat
out, so a larger chat may still fit once rendered, but only if little of it is left."""


@dataclass(frozen=True)
class PromptEncoder:
    """Encoder of the prompts of one request. Long texts are processed on threads beside the event loop."""

    tokenizer: Tokenizer
    vocab_size: int
    """Ids below this are valid as input: rows of the model's embedding."""
    max_tokens: int | None
    """Most tokens of a prompt; None if it is truncated, or only counted."""
    max_chars: int
    """Most characters of a text whose tokens have no limit."""
    receive: Receive
    """ASGI receive function; returns a disconnect when the client has left."""
    apart: bool = False
    """Chats of any length are rendered on a thread: their template came with an adapter, and may take long."""

    async def chat(self, chat: ChatPrompt) -> list[int]:
        """Ids of a chat. Raises `InvalidRequest` where the template refuses it, `ContextLengthExceeded`."""
        self._check_chars(chat.num_chars, "messages")
        if self.max_tokens is not None and chat.num_chars > MAX_CHAT_CHARS * self.max_tokens:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_tokens} tokens; {chat.num_chars} characters are "
                "more than that.",
                param="messages",
            )
        cost = LONG + 1 if self.apart else chat.cost
        return await run_text_work(lambda: self._encode_chat(chat), cost, self.receive)

    async def prompts(self, prompt: PromptInput, *, add_special_tokens: bool, field: str = "prompt") -> list[list[int]]:
        """Ids of every prompt of a request, which are in its `field`. Raises `InvalidRequest`,
        `ContextLengthExceeded`."""
        return await run_text_work(
            lambda: self._prompts(prompt, add_special_tokens, field), _size(prompt), self.receive
        )

    async def text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of one text, which may be empty."""
        return await run_text_work(lambda: self._encode(text, "prompt", add_special_tokens), len(text), self.receive)

    async def texts(self, prompts: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """Text of each prompt's ids."""
        return await run_text_work(
            lambda: [self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in prompts],
            sum(map(len, prompts)),
            self.receive,
        )

    def _encode_chat(self, chat: ChatPrompt) -> list[int]:
        messages: Sequence[TemplateMessage] = chat.messages
        tools: Sequence[TemplateMessage] | None = None
        with _naming("messages"):
            if chat.has_tools:
                messages, tools = self.tokenizer.adapt_tools(chat.messages, chat.tools)
            return self.tokenizer.encode_chat(
                messages,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                **({"tools": tools} if tools else {}),
                template_kwargs=chat.template_kwargs,
                chat_template=chat.template,
                max_tokens=self.max_tokens,
            )

    def _prompts(self, prompt: PromptInput, add_special_tokens: bool, field: str) -> list[list[int]]:
        prompts = _split(prompt, field)
        names = [field] if len(prompts) == 1 else [f"{field}[{index}]" for index in range(len(prompts))]
        for one, name in zip(prompts, names, strict=True):
            if not one:
                raise InvalidRequest(f"The {field} is empty: it must have at least one token.", param=name)
            if isinstance(one, list):
                check_ids(one, self.vocab_size, name)
        return [
            one if isinstance(one, list) else self._encode(one, name, add_special_tokens)
            for one, name in zip(prompts, names, strict=True)
        ]

    def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        self._check_chars(len(text), param)
        with _naming(param):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=self.max_tokens)

    def _check_chars(self, chars: int, param: str) -> None:
        if self.max_tokens is None and chars > self.max_chars:
            raise InvalidRequest(
                f"{param} must have at most {self.max_chars} characters to be counted or truncated, got {chars}.",
                param=param,
            )


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Add the field's name to errors about a text."""
    try:
        yield
    except InvalidRequest as error:
        error.param = error.param or param
        raise


def count_prompts(prompt: PromptInput) -> int:
    """Number of prompts in `prompt`; a list of token ids is one."""
    return len(prompt) if isinstance(prompt, list) and not _is_ids(prompt) else 1


def _split(prompt: PromptInput, field: str) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        return [[]]
    if _is_ids(prompt):
        ids = [id for id in prompt if isinstance(id, int)]
        if len(ids) == len(prompt):
            return [ids]
    else:
        kind = type(prompt[0])
        others = [one for one in prompt if not isinstance(one, int)]
        if len(others) == len(prompt) and all(isinstance(one, kind) for one in others):
            return others
    raise InvalidRequest(f"{field} must be all texts, all token ids, or all lists of token ids.", param=field)


def _size(prompt: PromptInput) -> int:
    """Number of characters and token ids; a lower bound above `LONG`."""
    if isinstance(prompt, str) or len(prompt) > LONG:
        return len(prompt)
    return sum(1 if isinstance(one, int) else len(one) for one in prompt)


def _is_ids(prompt: list[str | int | list[int]]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)
