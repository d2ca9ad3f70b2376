"""A response's request as the body of a chat, and the chat's answer as output items or as events."""

import re
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from runtime.api.http.body import Fields
from runtime.api.openai.responses import ChatChoice, ChatChunkChoice, ChatCompletion, Usage
from runtime.api.openai.schema import unknown_keys
from runtime.api.responses.compaction import unpacked
from runtime.api.responses.schema import (
    INCLUDED,
    FailureCode,
    FunctionCallItem,
    FunctionTool,
    IncompleteDetails,
    InputPart,
    InputTokensDetails,
    Item,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningOptions,
    ReasoningText,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    TextOptions,
)
from runtime.errors import InvalidRequest, RequestError, TooManyRequests, Unsupported

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16

_TEXTS = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})
_MODES = frozenset({"none", "auto", "required"})


def new_id(prefix: str) -> str:
    """A new random id."""
    return f"{prefix}_{uuid.uuid4().hex}"


# -- requests --------------------------------------------------------------------------------------


def chat_body(asked: ResponseRequest, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The same request as the body of a chat. `history`: messages of the responses before it.
    Raises `InvalidRequest` and `Unsupported`."""
    _check(asked)
    messages = list(history)
    if asked.instructions:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    messages += messages_of(items_of(asked))
    _check_results(messages)
    body: dict[str, Any] = {
        "model": asked.model,
        "messages": messages,
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "stream": asked.stream,
        "user": asked.user,
        "safety_identifier": asked.safety_identifier,
        "prompt_cache_key": asked.prompt_cache_key,
        "verbosity": None if asked.text is None else asked.text.verbosity,
    }
    if asked.stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if asked.top_logprobs or LOGPROBS in (asked.include or ()):
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    if asked.tools:
        tools, choice = _tools(asked.tools, asked.tool_choice)
        body |= {"tools": tools, "tool_choice": choice, "parallel_tool_calls": asked.parallel_tool_calls}
    if asked.reasoning is not None:
        body["reasoning_effort"] = asked.reasoning.effort
    if asked.text is not None and asked.text.format is not None and asked.text.format.type != "text":
        given = asked.text.format
        form: dict[str, Any] = {"type": given.type}
        if given.type == "json_schema":
            if given.schema is None:
                raise InvalidRequest("text.format.schema is missing.", param="text.format.schema")
            schema = {"name": given.name or "output", "schema": given.schema, "strict": given.strict}
            form["json_schema"] = {name: value for name, value in schema.items() if value is not None}
        body["response_format"] = form
    return {name: value for name, value in body.items() if value is not None}


def check_included(names: Iterable[str]) -> None:
    """Raise `InvalidRequest` for a value of `include` that OpenAI does not have."""
    for name in names:
        if name not in INCLUDED:
            raise InvalidRequest(
                f"include must hold only {', '.join(sorted(INCLUDED))}, got `{name[:64]}`.", param="include"
            )


def unknown_inside(fields: Fields) -> list[str]:
    """Unknown keys inside of the fields of a request that was decoded, each with its path. Raises `Unsupported` for
    those of OpenAI's that cannot be acted on."""
    found = unknown_keys(fields.get("reasoning"), ReasoningOptions, "reasoning")
    found += unknown_keys(fields.get("text"), TextOptions, "text")
    for index, tool in enumerate(_tool_list.decode(fields["tools"]) or () if "tools" in fields else ()):
        found += unknown_keys(tool, FunctionTool, f"tools[{index}]")
    for path in found:
        if (instead := _INSIDE.get(path.rpartition(".")[2])) is not None:
            raise Unsupported(f"`{path}` is not supported. {instead}", param=path)
    return found


_INSIDE = {
    "allowed_callers": "Tools are called by the model alone.",
    "async": "The client runs the tools, and sends their results when it has them.",
    "defer_loading": "Send the tools that the model may call.",
    "output_schema": "Describe the result in the tool's description.",
    "context": "Thoughts of earlier turns are taken from the input.",
    "mode": "There is one mode: choose an effort.",
}
"""Last part of a path → what to do instead."""

_tool_list = msgspec.json.Decoder(list[msgspec.Raw] | None)

_ASKED = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""Field of the chat → the field of the request that it is made of."""


@contextmanager
def named_as_asked() -> Iterator[None]:
    """Errors about the chat that a request becomes, with the names that its fields have in the request."""
    try:
        yield
    except RequestError as error:
        name, rest = re.fullmatch(r"(\w*)(.*)", error.param or "", re.DOTALL).groups()  # type: ignore[union-attr]
        if name in _ASKED:
            error.message = re.sub(rf"\b{name}\b", _ASKED[name], error.message)
            # The chat has the messages of earlier responses too: their numbers are not those of the input's items.
            error.param = _ASKED[name] if name == "messages" else f"{_ASKED[name]}{rest}"
        raise


def _check(asked: ResponseRequest) -> None:
    check_included(asked.include or ())
    if asked.metadata is not None:
        sizes = [(len(key), len(value)) for key, value in asked.metadata.items()]
        if len(sizes) > MAX_METADATA or any(key > 64 or value > 512 for key, value in sizes):
            raise InvalidRequest(
                f"metadata must have at most {MAX_METADATA} keys of at most 64 characters, with values of at most 512.",
                param="metadata",
            )
    if asked.max_tool_calls is not None and asked.max_tool_calls < 1:
        raise InvalidRequest(f"max_tool_calls must be at least 1, got {asked.max_tool_calls}.", param="max_tool_calls")
    if asked.background and asked.store is False:
        raise InvalidRequest("background needs store: the response is fetched later.", param="background")


def _check_results(messages: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InvalidRequest` for the result of a call that is not in the conversation."""
    called: set[str] = set()
    for message in messages:
        if message["role"] == "tool" and message["tool_call_id"] not in called:
            id = message["tool_call_id"][:100]
            raise InvalidRequest(f"No call before this result has the call_id `{id}`.", param="input")
        called.update(call["id"] for call in message.get("tool_calls", ()))


def items_of(asked: ResponseRequest) -> list[Item]:
    """The input as items. Raises `InvalidRequest` for an empty one."""
    if isinstance(asked.input, str):
        return [Item(role="user", content=[InputPart(type="input_text", text=asked.input)])]
    if not asked.input and asked.previous_response_id is None:
        raise InvalidRequest("input must have at least one item.", param="input")
    return asked.input


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Messages of a chat: thoughts and calls of one turn join its message."""
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        path = f"input[{index}]"
        if item.type == "message":
            if item.role is None or item.content is None:
                raise InvalidRequest(f"{path} must have a role and a content.", param=path)
            content = _text(item.content, f"{path}.content")
            if item.role == "assistant":
                last = _turn(messages)
                last["content"] = (last["content"] or "") + content
            else:
                messages.append({"role": item.role, "content": content})
        elif item.type == "function_call":
            if not item.call_id or not item.name:
                raise InvalidRequest(f"{path} must have a call_id and a name.", param=path)
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            _turn(messages).setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            if not item.call_id or item.output is None:
                raise InvalidRequest(f"{path} must have a call_id and an output.", param=path)
            messages.append(
                {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{path}.output")}
            )
        elif item.type == "reasoning":
            thoughts = item.content if item.content else item.summary or []
            _turn(messages)["reasoning_content"] = _text(thoughts, f"{path}.content")
        elif item.type == "compaction":
            messages += unpacked(item.encrypted_content, path)
        else:
            raise Unsupported(f"`{path}`: items of type `{item.type[:64]}` are not supported.", param=path)
    return messages


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that the next part of a turn joins."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: str | list[InputPart], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXTS and part.type != "refusal":
            raise Unsupported(
                f"`{path}[{index}]`: parts of type `{part.type[:64]}` are not supported; send text.",
                param=f"{path}[{index}]",
            )
        if text is None:
            raise InvalidRequest(f"{path}[{index}] has no text.", param=f"{path}[{index}].text")
        texts.append(text)
    return "".join(texts)


def _tools(tools: list[FunctionTool], choice: str | dict[str, Any] | None) -> tuple[list[dict[str, Any]], Any]:
    made = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in _MODES:
            raise InvalidRequest(
                f"tool_choice must be none, auto, required, or an object, got {choice[:64]!r}.", param="tool_choice"
            )
        return made, choice
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return made, {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        names = {tool.get("name") for tool in choice["tools"] if isinstance(tool, dict)}
        kept = [tool for tool in made if tool["function"]["name"] in names]
        if not kept:
            raise InvalidRequest("tool_choice.tools names none of the tools.", param="tool_choice")
        return kept, choice.get("mode", "auto")
    raise Unsupported("`tool_choice` must name a function or allowed tools.", param="tool_choice")


def _tool(tool: FunctionTool, path: str) -> dict[str, Any]:
    if tool.type != "function":
        raise Unsupported(
            f"`{path}.type` must be `function`, got `{tool.type[:64]}`: this server runs no tools of its own.",
            param=f"{path}.type",
        )
    if not tool.name:
        raise InvalidRequest(f"{path}.name is missing.", param=f"{path}.name")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


# -- answers ---------------------------------------------------------------------------------------


def usage_of(usage: Usage) -> ResponseUsage:
    """Usage in the terms of the Responses API."""
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


def _plain(choice: ChatChoice | ChatChunkChoice) -> dict[str, Any]:
    """A choice as JSON has it. Its log-probabilities are a list; they may be encoded already."""
    logprobs = [] if choice.logprobs is None else choice.logprobs.content
    return {**msgspec.to_builtins(replace(choice, logprobs=None)), "logprobs": logprobs}


def output_of(chat: ChatCompletion) -> list[OutputItem]:
    """Output items of an answer to a chat."""
    choice = _plain(chat.choices[0])
    message = choice["message"]
    status: ItemStatus = "incomplete" if choice["finish_reason"] == "length" else "completed"
    found: list[OutputItem] = []
    if thoughts := message.get("reasoning_content"):
        found.append(ReasoningItem(id=new_id("rs"), content=[ReasoningText(text=thoughts)], status=status))
    calls = message.get("tool_calls") or ()
    if (text := message.get("content")) or not calls:
        part = OutputText(text=text or "", logprobs=choice["logprobs"])
        found.append(OutputMessage(id=new_id("msg"), status=status, content=[part]))
    found += [
        FunctionCallItem(
            id=new_id("fc"),
            call_id=call["id"],
            name=call["function"]["name"],
            arguments=call["function"]["arguments"],
            status=status,
        )
        for call in calls
    ]
    return found


def ended(response: ResponseObject, output: list[OutputItem], usage: Usage, reason: str, now: int) -> ResponseObject:
    """The response with its output, complete or cut off by `max_output_tokens`."""
    cut = reason == "length"
    return replace(
        response,
        output=output,
        usage=usage_of(usage),
        status="incomplete" if cut else "completed",
        completed_at=None if cut else now,
        incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
    )


def failed(response: ResponseObject, error: RequestError, output: list[OutputItem]) -> ResponseObject:
    """The response, which this error has ended; `output` are the items that were complete."""
    code: FailureCode = "server_error"
    if isinstance(error, TooManyRequests):
        code = "rate_limit_exceeded"
    elif isinstance(error, InvalidRequest):
        code = "invalid_prompt"
    failure = ResponseFailure(code=code, message=error.message, type=error.code, param=error.param)
    return replace(response, status="failed", error=failure, output=output)


class _OpenItem:
    """The item whose deltas arrive now, and where it is in the output."""

    def __init__(self, kind: str, number: int, item: OutputItem, index: int) -> None:
        self.kind = kind
        self.number = number
        """Of a call among those of the answer."""
        self.item = item
        self.index = index
        self.text = ""
        self.logprobs: list[Any] = []


class ResponseEvents:
    """Events of a response out of the chunks of a chat, numbered from 0. Then `response` is the whole."""

    def __init__(self, response: ResponseObject, now: Callable[[], int]) -> None:
        self.response = response
        self._now = now
        self._number = 0
        self._open: _OpenItem | None = None
        self._output: list[OutputItem] = []
        self._usage = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)
        self._reason = "stop"

    async def events(self, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[ResponseEvent, None]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk.usage, Usage):
                    self._usage = chunk.usage
                for choice in chunk.choices:
                    for event in self._on_choice(_plain(choice)):
                        yield event
        if not self._output and self._open is None:
            for event in self._enter("text", 0, OutputMessage(id=new_id("msg"), status="in_progress", content=[])):
                yield event
        for event in self._close(final=True):
            yield event
        self.response = ended(self.response, self._output, self._usage, self._reason, self._now())
        yield self._event(f"response.{self.response.status}", response=self.response)

    def failure(self, error: RequestError) -> Iterator[ResponseEvent]:
        """The events that end a stream which failed. The response is failed from here on."""
        self.response = failed(self.response, error, self._output)
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        yield self._event("response.failed", response=self.response)

    def cancel(self) -> ResponseEvent:
        """The last event of a response that was cancelled, unless it had ended before."""
        if self.response.status == "in_progress":
            self.response = replace(self.response, status="cancelled", output=self._output)
        return self._event(f"response.{self.response.status}", response=self.response)

    def _event(self, type: str, **fields: Any) -> ResponseEvent:
        event = ResponseEvent(type=type, sequence_number=self._number, **fields)
        self._number += 1
        return event

    def _on_choice(self, choice: Mapping[str, Any]) -> Iterator[ResponseEvent]:
        delta = choice["delta"]
        if thoughts := delta.get("reasoning_content"):
            yield from self._enter("reasoning", 0, ReasoningItem(id=new_id("rs"), content=[], status="in_progress"))
            yield from self._delta("response.reasoning_text.delta", thoughts)
        if text := delta.get("content"):
            yield from self._enter("text", 0, OutputMessage(id=new_id("msg"), status="in_progress", content=[]))
            yield from self._delta("response.output_text.delta", text, choice["logprobs"])
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if call.get("id"):
                item = FunctionCallItem(
                    id=new_id("fc"),
                    call_id=call["id"],
                    name=function.get("name") or "",
                    arguments="",
                    status="in_progress",
                )
                yield from self._enter("call", call["index"], item)
            if arguments := function.get("arguments"):
                yield from self._delta("response.function_call_arguments.delta", arguments)
        self._reason = choice.get("finish_reason") or self._reason

    def _enter(self, kind: str, number: int, item: OutputItem) -> Iterator[ResponseEvent]:
        if self._open is not None and (self._open.kind, self._open.number) == (kind, number):
            return
        yield from self._close(final=False)
        self._open = _OpenItem(kind, number, item, len(self._output))
        yield self._event("response.output_item.added", output_index=self._open.index, item=item)
        if kind != "call":
            part = ReasoningText(text="") if kind == "reasoning" else OutputText(text="")
            yield self._event("response.content_part.added", part=part, **self._place())

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        place = {"output_index": self._open.index, "item_id": self._open.item.id}
        return place if self._open.kind == "call" else {**place, "content_index": 0}

    def _delta(self, type: str, text: str, logprobs: list[Any] | None = None) -> Iterator[ResponseEvent]:
        assert self._open is not None
        self._open.text += text
        self._open.logprobs += logprobs or ()
        yield self._event(type, delta=text, logprobs=UNSET if logprobs is None else logprobs, **self._place())

    def _close(self, *, final: bool) -> Iterator[ResponseEvent]:
        """End the open item. `final`: it is the last, which a limit may have cut off."""
        if (open_item := self._open) is None:
            return
        place, text = self._place(), open_item.text
        status: ItemStatus = "incomplete" if final and self._reason == "length" else "completed"
        item = open_item.item
        if isinstance(item, FunctionCallItem):
            item = replace(item, arguments=text, status=status)
            yield self._event("response.function_call_arguments.done", arguments=text, name=item.name, **place)
        elif isinstance(item, ReasoningItem):
            thought = ReasoningText(text=text)
            item = replace(item, content=[thought], status=status)
            yield self._event("response.reasoning_text.done", text=text, **place)
            yield self._event("response.content_part.done", part=thought, **place)
        else:
            part = OutputText(text=text, logprobs=open_item.logprobs)
            item = replace(item, content=[part], status=status)
            yield self._event("response.output_text.done", text=text, logprobs=open_item.logprobs, **place)
            yield self._event("response.content_part.done", part=part, **place)
        yield self._event("response.output_item.done", output_index=open_item.index, item=item)
        self._output.append(item)
        self._open = None
