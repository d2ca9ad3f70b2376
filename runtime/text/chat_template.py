"""Chat templates: Jinja in a sandbox, with the names and whitespace rules that Hugging Face templates expect.

Knows nothing of tokens. A template comes from the model or from the operator, never from a request: the
sandbox keeps it from files and attributes, not from loops that never end.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import InvalidRequest

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """The template's source is not valid Jinja."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Raises `ChatTemplateError`, naming the line, when `source` does not compile."""
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text of a chat. Keys whose value is None are dropped first: templates test `is defined`.

        Raises `InvalidRequest` when the template refuses the messages, or trips over them.
        """
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if not chat:
            raise InvalidRequest("messages must not be empty.", param="messages")
        mark = secrets.token_hex(8)
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other.",
                    param="continue_final_message",
                )
            chat[-1] = _with_mark_at_end(chat[-1], mark + " ")
        try:
            text = self._template.render(
                {
                    **variables,
                    "messages": chat,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
            raise InvalidRequest(f"The chat template refused the messages: {reason}", param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # What Python itself raises when a template adds, indexes or calls a value of the wrong type.
            raise InvalidRequest(
                f"The chat template cannot render these messages: {error}", param="messages"
            ) from error
        return _cut_at_mark(text, mark) if continue_final_message else text


def _with_mark_at_end(message: Message, mark: str) -> dict[str, Any]:
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
    """Drop what the template wrote after the message. A template that strips messages took the mark's
    trailing space too; then the message's own trailing space goes as well, as it would have."""
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
    """Unlike Jinja's own filter this one does not escape HTML."""
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
