"""Messages as chats, and chats as messages: tools, thoughts, and events for any cut of the answer."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.anthropic.schema import MessageEvent, MessageRequest
from runtime.api.anthropic.translate import EventTranslator, chat_body
from runtime.errors import InvalidRequest, Unsupported

TOOL = {"name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}


def body_of(*, takes_effort: bool = False, **fields: Any) -> dict[str, Any]:
    asked = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return chat_body(msgspec.convert(asked, MessageRequest), max_messages=100, takes_effort=takes_effort)


@pytest.mark.parametrize("effort", ["low", "medium", "high", "xhigh", "max"])
def test_an_effort_reaches_the_template_or_is_refused(effort: str) -> None:
    config = {"effort": effort}
    printed = "xhigh" if effort == "max" else effort
    assert body_of(takes_effort=True, output_config=config)["reasoning_effort"] == printed
    if effort == "high":
        assert "reasoning_effort" not in body_of(output_config=config)
    else:
        with pytest.raises(Unsupported, match=rf"`output_config.effort` must be `high`.*got `{effort}`"):
            body_of(output_config=config)


def test_a_conversation_with_tools() -> None:
    body = body_of(
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Snow."}]},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    )
    assert body["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert body["messages"][1:] == [
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "Snow."},
        {"role": "user", "content": "And now?"},
    ]


def test_a_named_tool_a_prefill_thoughts_and_a_format() -> None:
    schema = {"type": "object"}
    body = body_of(
        max_tokens=90,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather"},
        thinking={"type": "enabled", "budget_tokens": 40},
        output_config={"format": {"type": "json_schema", "schema": schema}},
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{"}],
    )
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["thinking_token_budget"] == 40
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_a_failed_tool_says_so() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no network", "is_error": True}
    body = body_of(messages=[{"role": "user", "content": [result]}])
    assert body["messages"] == [{"role": "tool", "tool_call_id": "t1", "content": "Error: no network"}]


def test_documents_are_their_text() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "Newts."}
    parts = {"type": "content", "content": [{"type": "text", "text": "Efts."}]}
    asked = [
        {"type": "document", "source": plain, "title": "Pond", "context": "Old.", "citations": {"enabled": False}},
        {"type": "text", "text": "What is it about?"},
        {"type": "document", "source": parts},
    ]
    body = body_of(messages=[{"role": "user", "content": asked}])
    assert body["messages"] == [{"role": "user", "content": "Pond\nOld.\nNewts.\nWhat is it about?\nEfts."}]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_result", "content": "x"},
        {"type": "text"},
        {"type": "document", "text": "x"},
        {"type": "document", "source": {"type": "text"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}},
        {"type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": True}},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/newt.png"}},
    ],
)
def test_blocks_that_cannot_be_read_are_named(block: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\]"):
        body_of(messages=[{"role": "user", "content": [block]}])


class Chunk(msgspec.Struct):
    """What the translation reads of a chat's chunk."""

    choices: list[dict[str, Any]]
    usage: None = None


def deltas() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Thoughts, then text, then calls, cut anywhere."""
    text = st.lists(st.text(min_size=1, max_size=3), max_size=4)

    def join(parts: tuple[list[str], list[str], list[list[str]]]) -> list[dict[str, Any]]:
        thoughts, texts, calls = parts
        found: list[dict[str, Any]] = [{"reasoning_content": part} for part in thoughts]
        found += [{"content": part} for part in texts]
        for index, arguments in enumerate(calls):
            head = {"index": index, "id": f"c{index}", "function": {"name": "f", "arguments": ""}}
            found.append({"tool_calls": [head]})
            found += [{"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in arguments]
        return found

    return st.tuples(text, text, st.lists(text, max_size=3)).map(join)


@given(deltas())
def test_blocks_open_and_close_in_order_and_lose_nothing(parts: list[dict[str, Any]]) -> None:
    async def chunks() -> AsyncGenerator[Chunk, None]:
        for part in [{"role": "assistant", "content": ""}, *parts]:
            yield Chunk([{"delta": part}])
        yield Chunk([{"delta": {}, "finish_reason": "stop", "stop_reason": None}])

    async def collect() -> list[MessageEvent]:
        return [event async for event in EventTranslator("m", "fake").events(chunks())]

    events = msgspec.to_builtins(asyncio.run(collect()))
    assert [event["type"] for event in (events[0], *events[-2:])] == ["message_start", "message_delta", "message_stop"]
    kinds, joined = [], []
    is_open = False
    for event in events[1:-2]:
        assert event["index"] == len(kinds) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            assert not is_open
            kinds.append(event["content_block"]["type"])
            joined.append("")
            is_open = True
        elif event["type"] == "content_block_stop":
            is_open = False
        else:
            assert is_open
            delta = event["delta"]
            joined[-1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
    assert not is_open
    thoughts = "".join(part.get("reasoning_content", "") for part in parts)
    text = "".join(part.get("content", "") for part in parts)
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    count = max((call["index"] + 1 for call in calls), default=0)
    arguments = ["".join(c["function"]["arguments"] for c in calls if c["index"] == i) for i in range(count)]
    expected = [("thinking", thoughts)] * bool(thoughts) + [("text", text)] * bool(text)
    assert list(zip(kinds, joined, strict=True)) == expected + [("tool_use", one) for one in arguments]
