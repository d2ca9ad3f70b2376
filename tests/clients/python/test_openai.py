"""The `openai` package: what applications call every day."""

import asyncio
import base64
import json
import math
import struct
from typing import Any

import openai
import pytest
from conftest import KEY, MODEL, URL
from openai.types.chat import ChatCompletionMessageParam
from openai.types.responses import Response
from pydantic import BaseModel

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a colour."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Colour(BaseModel):
    name: str
    red: int


def test_chat_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content
    assert whole.system_fingerprint
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    streamed, counted = chunks[-1].usage, whole.usage
    assert streamed is not None
    assert counted is not None
    cached = {"prompt_tokens_details"}  # of the first request's prefix
    assert streamed.model_dump(exclude=cached) == counted.model_dump(exclude=cached)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, stop=["e"], temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds[-1] in ("content.done", "chunk")
    assert final.choices[0].message.content


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == answer.usage.completion_tokens
    for token in found.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6


def test_completions_score_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The sky is blue", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "The sky is blue"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == choice.text


def test_penalties_and_bias_change_the_answer(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    plain = client.chat.completions.create(**asked, logprobs=True)
    first = plain.choices[0].logprobs.content[0].token
    token = client.post(
        f"{URL}/tokenize", body={"model": MODEL, "prompt": first, "add_special_tokens": False}, cast_to=object
    )
    banned = client.chat.completions.create(**asked, logit_bias={str(token["tokens"][0]): -100}, logprobs=True)
    assert banned.choices[0].logprobs.content[0].token != first
    assert (
        client.chat.completions.create(**asked, frequency_penalty=1.5, presence_penalty=0.5).choices[0].message.content
    )


def test_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe red."}],
        response_format=Colour,
        max_tokens=100,
        temperature=0,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(answer.choices[0].message.parsed, Colour)


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Answer in JSON."}],
        response_format={"type": "json_object"},
        max_tokens=100,
        temperature=0,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(client: openai.OpenAI, choice: object, stream: bool) -> None:
    messages = [{"role": "user", "content": "What is the weather in Oslo for 3 days?"}]
    asked = {
        "model": MODEL,
        "messages": messages,
        "tools": [WEATHER],
        "tool_choice": choice,
        "max_tokens": 200,
        "temperature": 0,
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.until_done().get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    call = answer.choices[0].message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 9
    again = client.chat.completions.create(
        model=MODEL,
        messages=[*messages, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Snow."}],
        tools=[WEATHER],
        max_tokens=10,
        temperature=0,
    )
    assert again.choices[0].message is not None


def test_embeddings(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(
        model=MODEL, input=["a cat", "a kitten", "the stock market"], encoding_format="float"
    )
    packed = client.post(
        "/embeddings",
        body={"model": MODEL, "input": "a cat", "encoding_format": "base64", "dimensions": 64},
        cast_to=object,
    )
    assert [one.index for one in floats.data] == [0, 1, 2]
    cat, kitten, market = (one.embedding for one in floats.data)
    assert math.isclose(sum(x * x for x in cat), 1, rel_tol=1e-3)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    assert dot(cat, kitten) > dot(cat, market)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(raw) // 4}f", raw)) == 64


def test_files(client: openai.OpenAI) -> None:
    made = client.files.create(file=("a.jsonl", b'{"a": 1}\n'), purpose="fine-tune")
    assert client.files.retrieve(made.id).bytes == 9
    assert made.id in [one.id for one in client.files.list()]
    assert client.files.content(made.id).content == b'{"a": 1}\n'
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_batch(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": f"{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": HELLO, "max_tokens": 3},
        }
        for n in range(4)
    ]
    file = client.files.create(file=("b.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    asyncio.run(_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "expired")))
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 4)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {one["custom_id"] for one in answers} == {"0", "1", "2", "3"}
    assert all(one["response"]["status_code"] == 200 for one in answers)


async def _until(done) -> None:
    for _ in range(600):
        if done():
            return
        await asyncio.sleep(0.2)
    raise AssertionError("it never ended")


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_errors_are_those_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=HELLO)


async def test_the_asynchronous_client() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
        answers = await asyncio.gather(
            *[client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, seed=1) for _ in range(4)]
        )
        assert len({answer.choices[0].message.content for answer in answers}) == 1
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50, stream=True)
        async for _ in stream:
            break
        await stream.close()


def test_responses(client: openai.OpenAI) -> None:
    short = {"model": MODEL, "max_output_tokens": 16, "temperature": 0}
    first = client.responses.create(**short, input="Say hello.", instructions="Be brief.")
    assert first.status in ("completed", "incomplete")
    assert first.output_text
    second = client.responses.create(**short, input="Again.", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(first.id).data[0].role == "user"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_stream_of_a_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Say hello.", temperature=0, extra_body={"stop": ["e"]}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == sorted({event.sequence_number for event in events})
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text


def test_a_response_parsed(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model=MODEL, input="Describe red.", text_format=Colour, max_output_tokens=100, temperature=0
    )
    if answer.status == "completed":
        assert isinstance(answer.output_parsed, Colour)


def test_responses_over_a_websocket(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "max_output_tokens": 8, "temperature": 0, "store": False}
    with client.responses.connect() as connection:
        connection.response.create(**asked, input="Say hello.")
        first = _last_of(connection)
        connection.response.create(**asked, input="Again.", previous_response_id=first.id)
        second = _last_of(connection)
        connection.response.create(**asked, input="Again.", previous_response_id="resp_missing")
        error: Any = connection.recv().error  # the client reads it into no type of its own
        assert error["code"] == "previous_response_not_found"
    assert first.output_text == client.responses.create(**asked, input="Say hello.").output_text
    assert (second.previous_response_id, second.usage.input_tokens > first.usage.input_tokens) == (first.id, True)


def _last_of(connection) -> Response:
    for event in connection:
        if event.type in ("response.completed", "response.incomplete"):
            return event.response
        assert event.type not in ("error", "response.failed"), event
    raise AssertionError("the connection ended")
