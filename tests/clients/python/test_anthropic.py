"""The `anthropic` package on /v1/messages."""

import anthropic
import pytest
from conftest import KEY, MODEL, URL

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}


@pytest.fixture(scope="module")
def client():
    with anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def test_a_message_and_its_stream(client) -> None:
    asked = {
        "model": MODEL,
        "max_tokens": 12,
        "extra_body": {"temperature": 0},
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Name a colour."}],
    }
    whole = client.messages.create(**asked)
    assert whole.role == "assistant"
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.output_tokens > 0
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_stop_sequences(client) -> None:
    asked = {
        "model": MODEL,
        "max_tokens": 40,
        "extra_body": {"temperature": 0},
        "messages": [{"role": "user", "content": "Count to ten."}],
    }
    text = client.messages.create(**asked).content[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.messages.create(**asked, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_a_tool(client) -> None:
    asked = {
        "model": MODEL,
        "max_tokens": 200,
        "extra_body": {"temperature": 0},
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
    }
    answer = client.messages.create(**asked)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert isinstance(call.input["city"], str)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Snow."}
    messages = [
        *asked["messages"],
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(model=MODEL, max_tokens=10, tools=[TOOL], messages=messages).content is not None
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert any(block.type == "tool_use" for block in final.content)


def test_count_tokens(client) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    counted = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    usage = client.messages.create(model=MODEL, max_tokens=1, messages=messages).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_errors(client) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="no-such-model", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, max_tokens=0, messages=[{"role": "user", "content": "x"}])
