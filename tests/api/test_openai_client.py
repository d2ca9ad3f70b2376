"""The unmodified `openai` client against a real server with a tiny model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from settings.schema import SchedulerSettings
from tests.api.conftest import RunningServer, tiny_settings
from tests.waiting import wait_until

MESSAGES: Any = [{"role": "user", "content": "What is an eft?"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def metric(server: RunningServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.object == "model"
    assert client.models.retrieve(model.id) == model


def test_chat(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.model == name
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens_details is not None


def test_streamed_chat_is_the_same_text(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-2].choices[0].delta.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    answer = client.completions.create(model=name, prompt=["The newt", "An eft"], max_tokens=4, n=2, seed=3, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith("The newt") for choice in answer.choices[:2])
    assert all(choice.text.startswith("An eft") for choice in answer.choices[2:])
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=name, prompt="The newt", max_tokens=4, seed=3, stream=True)
    )
    assert "The newt" + text == answer.choices[0].text


def test_same_seed_same_text_whatever_the_form(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    first, second = (
        client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=10, seed=7) for _ in range(2)
    )
    other = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=10, seed=8)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_stop_string(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    asked: dict[str, Any] = {"model": name, "prompt": "The newt", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    stopped = client.completions.create(**asked, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(stop)]


def test_log_probabilities(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    chat = client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, logit_bias={"9": -100}, seed=1
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(one.top_logprobs) for one in logprobs.content] == [2] * len(logprobs.content)
    text = client.completions.create(model=name, prompt="word", max_tokens=2, logprobs=1, echo=True)
    found = text.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.text_offset == sorted(found.text_offset or [])


def test_typed_errors(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=name, messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=name, messages=MESSAGES, service_tier="flex")
    assert unsupported.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=name, prompt="word " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-7", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-7")
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="x")


def test_keys_and_a_full_queue(tiny_model: Path) -> None:
    settings = tiny_settings(tiny_model, api_key=("sesame",))
    settings = type(settings)(
        model=settings.model,
        cache=settings.cache,
        server=settings.server,
        scheduler=SchedulerSettings(max_running=1, max_waiting=1),
    )
    with RunningServer(settings) as server:
        url = f"{server.url}/v1"
        with pytest.raises(openai.AuthenticationError) as wrong:
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        assert wrong.value.code == "invalid_api_key"
        client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0)
        name = client.models.list().data[0].id
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model=name, prompt=["a", "b", "c", "d"], max_tokens=300)
        assert full.value.code == "queue_full"
        assert full.value.response.headers["retry-after"]
        # All or nothing: what was submitted before the refusal is gone again, and the next request runs.
        assert client.completions.create(model=name, prompt="a", max_tokens=2).choices[0].text


def test_leaving_gives_the_blocks_back(client: openai.OpenAI, server: RunningServer) -> None:
    name = client.models.list().data[0].id
    aborts = metric(server, 'eft:request_success_total{finished_reason="abort"')
    with client.completions.create(
        model=name, prompt="The newt", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    ended = 'eft:request_success_total{finished_reason="abort"'
    wait_until(lambda: metric(server, ended) == aborts + 1)
    wait_until(lambda: metric(server, "eft:num_requests_running") == 0)
    wait_until(lambda: metric(server, "eft:kv_cache_usage_perc") == 0)


def test_leaving_a_whole_answer_gives_the_blocks_back(client: openai.OpenAI, server: RunningServer) -> None:
    name = client.models.list().data[0].id
    ended = 'eft:request_success_total{finished_reason="abort"'
    before = metric(server, ended)
    prompts = ["The newt is a small amphibian", "An eft may wander"] * 8
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.15).completions.create(
            model=name, prompt=prompts, max_tokens=450, extra_body={"ignore_eos": True}
        )
    wait_until(lambda: metric(server, ended) > before)
    wait_until(lambda: metric(server, "eft:num_requests_running") == 0)
    wait_until(lambda: metric(server, "eft:kv_cache_usage_perc") == 0)


async def _many(server: RunningServer) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        name = (await client.models.list()).data[0].id

        async def one() -> str:
            answer = await client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=16, temperature=0)
            return answer.choices[0].message.content or ""

        return list(await asyncio.gather(*(one() for _ in range(16))))


def test_many_at_once_give_what_one_gives(server: RunningServer) -> None:
    import asyncio

    assert len(set(asyncio.run(_many(server)))) == 1
