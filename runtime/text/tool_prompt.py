"""Tools and calls in prompts: in the form that a chat template prints, or as text where it prints none. The same for
requests and for the rows that are trained on.

A template that knows nothing of tools would leave them out in silence, and calls in the history too. Then the tools are
described in the system message, and calls and their results are written into the messages, in the form of Hermes, which
most models have seen.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import InvalidRequest
from runtime.text.chat_template import ChatTemplate, TemplateMessage

INSTRUCTIONS = """You can call these functions, one JSON schema a line:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON inside of <tool_call></tool_call>, for each call:
<tool_call>
{{"name": "function", "arguments": {{"argument": "value"}}}}
</tool_call>"""
"""The text that describes the tools to a model whose template does not."""


@dataclass(frozen=True)
class ToolSupport:
    """The parts of tools and calls that a chat template prints."""

    tools: bool
    """It prints the descriptions of tools."""
    calls: bool
    """It prints calls in the history."""
    text_arguments: bool
    """It prints the arguments of calls as it gets them, so they have to be JSON already."""
    system: bool
    """It takes a system message."""

    @classmethod
    def of(cls, template: ChatTemplate) -> "ToolSupport":
        """Find out by rendering chats with marked tools and calls."""
        name, key, value = (f"{letter}{secrets.token_hex(6)}" for letter in "nkv")
        user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}

        def shown(messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
            try:
                return template.render(messages, add_generation_prompt=False, tools=tools, variables={})
            except InvalidRequest:
                return ""

        def with_call(arguments: object) -> str:
            function = {"name": name, "arguments": arguments}
            call = {"id": "call00000", "type": "function", "function": function}
            result = {"role": "tool", "name": name, "tool_call_id": "call00000", "content": "7"}
            calling = {"role": "assistant", "tool_calls": [call]}
            chats: list[list[TemplateMessage]] = [
                [user, one, result, answer] for one in ({**calling, "content": ""}, calling)
            ]
            return next((text for chat in chats if name in (text := shown(chat))), "")

        tool = {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
        as_object, as_text = with_call({key: value}), with_call(json.dumps({key: value}))
        return cls(
            tools=name in shown([user], [tool]),
            calls=bool(as_object or as_text),
            text_arguments=f'"{key}"' not in as_object and f'"{key}"' in as_text,
            system=bool(shown([{"role": "system", "content": "Hello"}, user])),
        )


def shown_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as prompts have it, in OpenAI's shape: the name, the description and the parameters of its function, with
    nothing that the model is not to see."""
    shown: dict[str, Any] = {"name": function["name"]}
    if function.get("description") is not None:
        shown["description"] = function["description"]
    parameters = function.get("parameters")
    shown["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
    return {"type": "function", "function": shown}


def shown_call(function: Mapping[str, Any], index: int, id: str | None) -> dict[str, Any]:
    """A call in the history as prompts have it; `index` is its number in its message."""
    arguments = function.get("arguments")
    called = {"name": function["name"], "arguments": {} if arguments is None or arguments == "" else arguments}
    return {"id": id or f"call{index:05}", "type": "function", "function": called}


def prepare_tools(
    known: ToolSupport, messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[TemplateMessage], list[Mapping[str, Any]] | None]:
    """The messages and the tools as the template gets them, where there are tools or calls in the history. Arguments of
    calls in `messages` are objects."""
    if known.calls and (known.tools or not tools):
        found = [_with_text_arguments(message) for message in messages] if known.text_arguments else list(messages)
        return found, list(tools) or None
    written = _merged([_as_text(message) for message in messages])
    if known.tools:
        return written, list(tools) or None
    return (_described(written, tools, known) if tools else written), None


def _with_text_arguments(message: TemplateMessage) -> TemplateMessage:
    if not (calls := message.get("tool_calls")):
        return message
    each = [
        {**call, "function": {**call["function"], "arguments": _dumped(call["function"]["arguments"])}}
        for call in calls
    ]
    return {**message, "tool_calls": each}


def _as_text(message: TemplateMessage) -> TemplateMessage:
    """A message with its calls as text, or with the result of one."""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    if not (calls := message.get("tool_calls")):
        return message
    each = [
        f"<tool_call>\n{_dumped({k: call['function'][k] for k in ('name', 'arguments')})}\n</tool_call>"
        for call in calls
    ]
    content = "\n".join(filter(None, [_text(message), *each]))
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _merged(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """Results of several calls as one message: many templates want users and assistants to take turns."""
    found: list[TemplateMessage] = []
    for message in messages:
        last = found[-1] if found else None
        if (
            last is not None
            and _is_result(last)
            and message.get("role") == "user"
            and isinstance(message.get("content"), str)
        ):
            found[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            found.append(message)
    return found


def _is_result(message: TemplateMessage) -> bool:
    content = message.get("content")
    return message.get("role") == "user" and isinstance(content, str) and content.startswith("<tool_response>")


def _described(
    messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]], known: ToolSupport
) -> list[TemplateMessage]:
    """The messages with a description of the tools in the first one, or in one before it."""
    text = INSTRUCTIONS.format(tools="\n".join(_dumped(tool["function"]) for tool in tools))
    first, *rest = messages
    if first.get("role") == ("system" if known.system else "user"):
        return [{**first, "content": f"{_text(first)}\n\n{text}".strip()}, *rest]
    return [{"role": "system" if known.system else "user", "content": text}, *messages]


def _text(message: TemplateMessage) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def _dumped(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
