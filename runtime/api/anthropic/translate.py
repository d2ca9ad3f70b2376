"""A message request as the body of a chat, and the chat's answer as a message or as its events."""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from runtime.api.anthropic.schema import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    Citations,
    CountRequest,
    InputJsonDelta,
    InputMessage,
    InputTool,
    Message,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputBlock,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from runtime.api.openai.responses import ChatCompletion, Usage
from runtime.errors import InvalidRequest, Unsupported

CLIENT_TOOLS = (None, "custom")
"""Types of tools that the client runs."""

DEFAULT_EFFORT = "high"
"""Anthropic's: the same as none."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOPS: Mapping[str, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}

# -- requests --------------------------------------------------------------------------------------


def chat_body(asked: CountRequest, *, max_messages: int, takes_effort: bool) -> dict[str, Any]:
    """The same request as the body of a chat in OpenAI's shape. `takes_effort`: the chat template prints a reasoning
    effort. Raises `InvalidRequest` and `Unsupported`."""
    if not 1 <= len(asked.messages) <= max_messages:
        raise InvalidRequest(
            f"messages must have between 1 and {max_messages} messages, got {len(asked.messages)}.", param="messages"
        )
    body: dict[str, Any] = {"model": asked.model, "messages": list(_messages(asked))}
    if asked.messages[-1].role == "assistant":  # a prefilled answer
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if asked.tools:
        body["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools)]
    if (choice := asked.tool_choice) is not None:
        if choice.type == "tool":
            if not choice.name:
                raise InvalidRequest("tool_choice.name must name a tool where the type is `tool`.", param="tool_choice")
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            body["tool_choice"] = _CHOICES[choice.type]
        if choice.disable_parallel_tool_use is not None:
            body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    body |= _thinking(asked)
    body["reasoning_effort"] = _effort(asked, takes_effort)
    if asked.output_config is not None and asked.output_config.format is not None:
        schema = {"name": "output", "schema": asked.output_config.format.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(asked, MessageRequest):
        body |= {
            "max_tokens": asked.max_tokens,
            "stop": asked.stop_sequences,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "stream": asked.stream,
        }
        if asked.stream:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return {name: value for name, value in body.items() if value is not None}


def _thinking(asked: CountRequest) -> dict[str, Any]:
    if asked.thinking is None:
        return {}
    thinks = asked.thinking.type != "disabled"
    fields: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": thinks}}
    budget = asked.thinking.budget_tokens
    if thinks and budget is not None:
        most = asked.max_tokens if isinstance(asked, MessageRequest) else None
        if budget < 1 or (most is not None and budget >= most):
            raise InvalidRequest(
                f"thinking.budget_tokens must be at least 1 and less than max_tokens ({most}), got {budget}.",
                param="thinking.budget_tokens",
            )
        fields["thinking_token_budget"] = budget
    return fields


def _effort(asked: CountRequest, takes_effort: bool) -> str | None:
    effort = asked.output_config.effort if asked.output_config is not None else None
    if effort is None or takes_effort:
        return "xhigh" if effort == "max" else effort  # the highest that templates know
    if effort == DEFAULT_EFFORT:
        return None
    raise Unsupported(
        f"`output_config.effort` must be `{DEFAULT_EFFORT}`, the default, or left out, got `{effort}`: the chat "
        "template of this model has no reasoning effort.",
        param="output_config.effort",
    )


def _tool(tool: InputTool, path: str) -> dict[str, Any]:
    if tool.type not in CLIENT_TOOLS:
        raise Unsupported(
            f"`{path}.type` must be `custom`, got `{str(tool.type)[:64]}`: this server runs no tools of its own.",
            param=f"{path}.type",
        )
    if tool.input_schema is None:
        raise InvalidRequest(f"{path}.input_schema is missing.", param=f"{path}.input_schema")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _messages(asked: CountRequest) -> Iterator[dict[str, Any]]:
    if asked.system:
        yield {"role": "system", "content": _joined(asked.system, "system")}
    for index, message in enumerate(asked.messages):
        path = f"messages[{index}].content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content, path)
        else:
            yield from _user(message, path)


def _user(message: InputMessage, path: str) -> Iterator[dict[str, Any]]:
    """Results of tools as messages of their own, in front of the text that came with them."""
    texts: list[str] = []
    for index, block in enumerate(message.content):
        assert isinstance(block, Block)
        where = f"{path}[{index}]"
        if block.type == "tool_result":
            if not block.tool_use_id:
                raise InvalidRequest(f"{where}.tool_use_id is missing.", param=f"{where}.tool_use_id")
            text = _joined(block.content or "", f"{where}.content")
            text = f"Error: {text}" if block.is_error else text
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
        else:
            texts.append(_text(block, where))
    if texts or not message.content:
        yield {"role": message.role, "content": "\n".join(texts)}


def _assistant(blocks: list[Block], path: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        where = f"{path}[{index}]"
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "redacted_thinking":
            continue  # encrypted by another server
        elif block.type == "tool_use":
            if not block.id or not block.name:
                raise InvalidRequest(f"{where} must have an id and a name.", param=where)
            arguments = msgspec.json.encode(block.input or {}).decode()
            calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
        else:
            texts.append(_text(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(content: str | list[Block], path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{path}[{index}]") for index, block in enumerate(content))


def _document(block: Block, path: str) -> str:
    """The text of a document, below its title and what is said of it."""
    source, where = block.source, f"{path}.source"
    if source is None:
        raise InvalidRequest(f"{where} is missing.", param=where)
    if isinstance(block.citations, Citations) and block.citations.enabled:
        raise Unsupported(f"`{path}.citations`: answers have no citations; leave it out.", param=f"{path}.citations")
    if source.type not in ("text", "content"):
        raise Unsupported(
            f"`{where}.type` must be `text` or `content`, got `{source.type[:64]}`: send the text of the document.",
            param=f"{where}.type",
        )
    field = "data" if source.type == "text" else "content"
    given = getattr(source, field)
    if given is None:
        raise InvalidRequest(f"{where}.{field} is missing.", param=f"{where}.{field}")
    return "\n".join(filter(None, (block.title, block.context, _joined(given, f"{where}.{field}"))))


def _text(block: Block, path: str) -> str:
    if block.type == "document":
        return _document(block, path)
    if block.type != "text":
        raise Unsupported(f"`{path}`: blocks of type `{block.type[:64]}` are not supported; send text.", param=path)
    if block.text is None:
        raise InvalidRequest(f"{path} has no text.", param=f"{path}.text")
    return block.text


# -- answers ---------------------------------------------------------------------------------------


def message_of(chat: ChatCompletion, id: str) -> Message:
    """The answer to a chat as a message."""
    choice = msgspec.to_builtins(chat.choices[0])
    content: list[OutputBlock] = []
    if thoughts := choice["message"].get("reasoning_content"):
        content.append(ThinkingBlock(thinking=thoughts))
    if text := choice["message"].get("content"):
        content.append(TextBlock(text=text))
    for call in choice["message"].get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        content.append(ToolUseBlock(id=call["id"], name=call["function"]["name"], input=_input(arguments)))
    reason, stop = _end(choice)
    return Message(
        id=id,
        model=chat.model,
        content=content or [TextBlock(text="")],
        stop_reason=reason,
        stop_sequence=stop,
        usage=usage_of(chat.usage),
    )


def usage_of(usage: Usage) -> MessageUsage:
    """Usage in Anthropic's terms, where cached tokens are not input tokens."""
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )


def _input(arguments: str) -> dict[str, Any]:
    """Arguments of a call; one that `max_tokens` cut off has none."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _end(choice: Mapping[str, Any]) -> tuple[StopReason, str | None]:
    stop = choice.get("stop_reason")
    if choice["finish_reason"] == "stop" and isinstance(stop, str):
        return "stop_sequence", stop
    return _STOPS.get(choice["finish_reason"], "end_turn"), None


class EventTranslator:
    """Events of a message out of the chunks of a chat: blocks open and close as the kind of the text changes."""

    def __init__(self, id: str, model: str) -> None:
        self._id = id
        self._model = model
        self._index = -1
        """Of the newest block."""
        self._open: tuple[str, int] | None = None
        """The kind of the open block, and for a call its number."""
        self._end: tuple[StopReason, str | None] = ("end_turn", None)
        self._usage = MessageUsage(input_tokens=0, output_tokens=0)

    async def events(self, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[MessageEvent, None]:
        begun = False
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk.usage, Usage):
                    self._usage = usage_of(chunk.usage)
                if not begun:
                    begun = True
                    yield self._start()
                for choice in chunk.choices:
                    for event in self._on_choice(msgspec.to_builtins(choice)):
                        yield event
        for event in self._close():
            yield event
        reason, stop = self._end
        yield MessageDelta(delta=MessageEnd(stop_reason=reason, stop_sequence=stop), usage=self._usage)
        yield MessageStop()

    def _start(self) -> MessageStart:
        return MessageStart(
            message=Message(
                id=self._id, model=self._model, content=[], stop_reason=None, stop_sequence=None, usage=self._usage
            )
        )

    def _on_choice(self, choice: dict[str, Any]) -> Iterator[MessageEvent]:
        delta = choice["delta"]
        if thoughts := delta.get("reasoning_content"):
            yield from self._enter("thinking", 0, ThinkingBlock(thinking=""))
            yield BlockDelta(index=self._index, delta=ThinkingDelta(thinking=thoughts))
        if text := delta.get("content"):
            yield from self._enter("text", 0, TextBlock(text=""))
            yield BlockDelta(index=self._index, delta=TextDelta(text=text))
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if call.get("id"):
                block = ToolUseBlock(id=call["id"], name=function.get("name") or "", input={})
                yield from self._enter("tool_use", call["index"], block)
            if arguments := function.get("arguments"):
                yield BlockDelta(index=self._index, delta=InputJsonDelta(partial_json=arguments))
        if choice.get("finish_reason"):
            self._end = _end(choice)

    def _enter(self, kind: str, number: int, block: OutputBlock) -> Iterator[MessageEvent]:
        if self._open == (kind, number):
            return
        yield from self._close()
        self._open = (kind, number)
        self._index += 1
        yield BlockStart(index=self._index, content_block=block)

    def _close(self) -> Iterator[MessageEvent]:
        if self._open is not None:
            self._open = None
            yield BlockStop(index=self._index)
