"""Chat templates: Jinja in a sandbox, with the names and whitespace rules that Hugging Face templates expect.

Independent of tokens. A template comes from the model or from the operator, never from a request: the sandbox protects
files and attributes, not against endless loops.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import InvalidRequest

# -- content format --------------------------------------------------------------------------------
#
# The form of a message's content that a chat template takes: a string or a list of parts.
#
# Some templates print `message.content`, some iterate over it and print the text of each part, and some do either,
# which may depend on the role. A template silently loses the text of a form that it does not expect. So each template
# is probed: with a marked text for each role, in both forms.

TemplateMessage = Mapping[str, Any]
Render = Callable[[Sequence[TemplateMessage]], str]
"""Renders messages as they are. Raises `InvalidRequest` for what the template refuses."""

OTHERS = "user"
"""Role whose forms are assumed for a role that could not be probed."""


@dataclass(frozen=True)
class Accepts:
    """Forms of a content that the template prints with their whole text."""

    string: bool
    parts: bool


class ContentFormat:
    """The forms that one template accepts, by role."""

    def __init__(self, render: Render) -> None:
        tried = {role: _try(render, role) for role in ("user", "system", "developer", "assistant", "tool")}
        self._roles = {role: accepts for role, accepts in tried.items() if accepts is not None}
        self._others = self._roles.get(OTHERS, Accepts(string=True, parts=False))

    def adapt(self, messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
        """The messages with each content in a form that the template prints."""
        return [self._adapt(message) for message in messages]

    def _adapt(self, message: TemplateMessage) -> TemplateMessage:
        content, accepts = message.get("content"), self._roles.get(message.get("role", ""), self._others)
        if isinstance(content, str) and accepts.parts and not accepts.string:
            return {**message, "content": [{"type": "text", "text": content}]}
        if accepts.parts or (texts := _texts(content)) is None:
            return message
        return {**message, "content": "\n".join(texts)}


def _texts(content: object) -> list[str] | None:
    """The texts of a list of text parts; None for anything else."""
    if not isinstance(content, Sequence) or isinstance(content, str | bytes) or not content:
        return None
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    found = [text for text in texts if isinstance(text, str)]
    return found if len(found) == len(texts) else None


def _try(render: Render, role: str) -> Accepts | None:
    """Forms that the template accepts for a role; None where it refuses every chat with this role."""
    text, key = f"q{secrets.token_hex(8)}q", f"k{secrets.token_hex(8)}k"
    string = _shown(render, role, text)
    parts = _shown(render, role, [{"type": "text", "text": text, key: key}])
    if string is None and parts is None:
        return None
    # A template that prints a list unchanged shows everything in it, including the key that no template reads.
    return Accepts(
        string=string is not None and text in string.lower(),
        parts=parts is not None and text in parts.lower() and key not in parts.lower(),
    )


def _shown(render: Render, role: str, content: Any) -> str | None:
    """Rendering of the first chat with such a message that the template does not refuse; None where it refuses all."""
    for chat in _chats(role, content):
        try:
            return render(chat)
        except InvalidRequest:
            continue
    return None


def _chats(role: str, content: Any) -> list[list[TemplateMessage]]:
    """Chats in which `role` has its usual place. The other messages are of the same form."""
    message = {"role": role, "content": content}
    other = "Hello" if isinstance(content, str) else [{"type": "text", "text": "Hello"}]
    user, assistant = {"role": "user", "content": other}, {"role": "assistant", "content": other}
    if role == "user":
        return [[message]]
    if role in ("system", "developer"):
        return [[message, user]]
    if role == "assistant":
        return [[user, message], [user, message, user]]
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "tool_calls": [call]}
    result = {**message, "name": "f", "tool_call_id": "call00000"}
    return [[user, {**calls, "content": ""}, result], [user, calls, result], [user, assistant, result]]


class ChatTemplateError(ValueError):
    """The template's source is not valid Jinja."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        """Compile a template. `variables` are the variables of every rendering, such as `bos_token`.

        Raises `ChatTemplateError`, naming the line, when `source` does not compile.
        """
        self.source = source
        self._variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        self._format = ContentFormat(lambda messages: self._render(messages, {"add_generation_prompt": False}))

    def render(
        self,
        messages: Sequence[TemplateMessage],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text of a chat. Keys whose value is None are dropped first: templates test `is defined`. A
        content may be a string or a list of text parts, whichever of them the template prints.

        Raises `InvalidRequest` when the template refuses the messages, or fails on them.
        """
        chat: list[TemplateMessage] = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        if not chat:
            raise InvalidRequest("messages must not be empty.", param="messages")
        chat = self._format.adapt(chat)
        mark = secrets.token_hex(8)
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other.",
                    param="continue_final_message",
                )
            chat[-1] = _with_mark_at_end(chat[-1], mark + " ")
        text = self._render(chat, {**variables, "tools": tools, "add_generation_prompt": add_generation_prompt})
        return _cut_at_mark(text, mark) if continue_final_message else text

    def _render(self, chat: Sequence[TemplateMessage], variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(
                {"tools": None, "documents": None, **self._variables, **variables, "messages": chat}
            )
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
            raise InvalidRequest(f"The chat template refused the messages: {reason}", param="messages") from error
        except Exception as error:
            # Errors of Python itself, when a template adds, indexes or calls a value of the wrong type; or of Jinja's
            # own functions, such as a RuntimeError of `cycler()`.
            raise InvalidRequest(
                f"The chat template cannot render these messages: {error}", param="messages"
            ) from error


def _with_mark_at_end(message: TemplateMessage, mark: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}
    if isinstance(content, Sequence):
        for index in range(len(content) - 1, -1, -1):
            part = content[index]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + mark}
                return {**message, "content": [*content[:index], marked, *content[index + 1 :]]}
    raise InvalidRequest(
        "continue_final_message is set, but the last message has no text to continue.", param="messages"
    )


def _cut_at_mark(text: str, mark: str) -> str:
    """Drop the template's text after the message. A template that strips messages removes the mark's trailing space
    too; then the message's own trailing space is removed as well, as without the mark."""
    at = text.rfind(mark)
    if at < 0:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template leaves out the last message.",
            param="messages",
        )
    return text[:at] if text.startswith(" ", at + len(mark)) else text[:at].rstrip()


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only prints."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, which unlike Jinja's own does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
