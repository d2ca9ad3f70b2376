"""Chat completions over a fake engine that echoes the prompt, a byte a token."""

from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from runtime.errors import TooManyRequests
from runtime.messages import new_sequence_id
from tests.api.conftest import client_of
from tests.api.fakes import FakeService, events, settings_with

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}


async def test_whole_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=chat(), headers={"X-Request-Id": "mine"})
    body = answer.json()
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine"
    assert body["id"] == "chatcmpl-mine"
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user", "refusal": None},
            "finish_reason": "length",
            "stop_reason": None,
            "logprobs": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 8,  # the bytes of "user: Hi"
        "completion_tokens": 4,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_stream_is_role_then_text_then_finish_then_usage(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    *parts, usage = chunks
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "user"
    assert deltas[-1] == {}
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert all(part["usage"] is None for part in parts)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


async def test_stream_without_options_has_no_usage(client: httpx.AsyncClient) -> None:
    chunks = events((await client.post(URL, json=chat(stream=True))).text)
    assert all("usage" not in chunk for chunk in chunks)


async def test_continuous_usage_counts_up(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await client.post(URL, json=chat(stream=True, stream_options=options))).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 2, 3, 4, 4, 4]  # role, four tokens, finish, usage: a role is no token
    assert [chunk["usage"]["total_tokens"] for chunk in chunks] == [8 + count for count in counts]


async def test_the_role_of_one_choice_counts_the_tokens_of_the_others(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await client.post(URL, json=chat(n=2, stream=True, stream_options=options))).text)
    shown = 0
    for chunk in chunks[:-1]:
        shown += bool(chunk["choices"][0]["delta"].get("content"))
        assert chunk["usage"]["completion_tokens"] == shown
    assert shown == chunks[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("options", "at_the_end", "in_each"),
    [
        ({"include_usage": False}, False, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"include_usage": True, "continuous_usage_stats": False}, True, False),
        ({"include_usage": None, "continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": None}, False, False),
        ({}, False, False),
    ],
)
@pytest.mark.parametrize("url", [URL, "/v1/completions"])
async def test_usage_is_sent_as_it_was_asked_for(
    client: httpx.AsyncClient, url: str, options: dict[str, Any], at_the_end: bool, in_each: bool
) -> None:
    body = chat() if url == URL else {"prompt": "abc", "max_tokens": 4}
    chunks = events((await client.post(url, json={**body, "stream": True, "stream_options": options})).text)
    assert bool(chunks[-1]["choices"] == []) == at_the_end
    assert all(bool(chunk.get("usage")) == in_each for chunk in chunks if chunk["choices"])
    if not at_the_end:
        assert all("usage" not in chunk for chunk in chunks)


async def test_choices_have_seeds_of_their_own(client: httpx.AsyncClient, service: FakeService) -> None:
    body = (await client.post(URL, json=chat(n=3, seed=2**63 - 1))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [submission.params.seed for submission in service.submitted] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert body["usage"]["prompt_tokens"] == 8
    assert body["usage"]["completion_tokens"] == 12


async def test_streamed_choices_each_have_a_role_and_a_finish(client: httpx.AsyncClient) -> None:
    chunks = events((await client.post(URL, json=chat(n=2, stream=True))).text)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "user"
        assert mine[-1]["finish_reason"] == "length"


async def test_all_or_none_of_the_choices_are_submitted(client: httpx.AsyncClient, service: FakeService) -> None:
    verdicts = iter([None, None, TooManyRequests("Full.", retry_after=3)])
    service.reject = lambda submission: next(verdicts)
    answer = await client.post(URL, json=chat(n=3))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert service.submitted == []
    assert not service.running


async def test_max_tokens_default_is_the_rest_of_the_context(client: httpx.AsyncClient, service: FakeService) -> None:
    service.stall_after = 0
    service.reject = lambda submission: TooManyRequests("Only looking.")
    seen: list[Any] = []
    service.reject = lambda submission: seen.append(submission) or TooManyRequests("Only looking.")
    await client.post(URL, json={"messages": [{"role": "user", "content": "Hi"}]})
    assert seen[0].params.max_tokens is None


async def test_max_completion_tokens_wins(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json=chat(max_tokens=9, max_completion_tokens=2))
    assert service.submitted[0].params.max_tokens == 2


async def test_max_completion_tokens_is_named_when_it_does_not_fit(client: httpx.AsyncClient) -> None:
    error = (await client.post(URL, json=chat(max_completion_tokens=1000))).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_completion_tokens"
    assert "200" in error["message"]
    assert "1008" in error["message"]


async def test_prompt_as_long_as_the_context(client: httpx.AsyncClient, service: FakeService) -> None:
    messages = [{"role": "user", "content": "x" * 300}]
    answer = await client.post(URL, json={"messages": messages})
    rejections = b'eft:admission_rejections_total{model_name="fake",reason="context_length_exceeded"} 1.0'
    assert rejections in service.metrics.render()[0]
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] == "messages"


async def test_truncation_keeps_the_end_of_the_prompt(client: httpx.AsyncClient, service: FakeService) -> None:
    messages = [{"role": "user", "content": "x" * 300 + "end"}]
    assert (await client.post(URL, json=chat(messages=messages, truncate_prompt_tokens=3))).status_code == 200
    assert bytes(service.submitted[0].prompt_ids) == b"end"
    assert (await client.post(URL, json=chat(messages=messages, truncate_prompt_tokens=-1))).status_code == 200
    assert len(service.submitted[1].prompt_ids) == 196  # leaves room for max_tokens
    refused = await client.post(URL, json=chat(messages=messages, truncate_prompt_tokens=0))
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_token_ids_are_returned_when_asked_for(client: httpx.AsyncClient) -> None:
    body = (await client.post(URL, json=chat(return_token_ids=True))).json()
    assert body["prompt_token_ids"] == list(b"user: Hi")
    assert body["choices"][0]["token_ids"] == list(b"user")
    chunks = events((await client.post(URL, json=chat(return_token_ids=True, stream=True))).text)
    assert chunks[0]["prompt_token_ids"] == list(b"user: Hi")
    ids = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])]
    assert ids == list(b"user")


async def test_request_id_in_the_body_wins_and_must_not_run_twice(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    answer = await client.post(URL, json=chat(request_id="a\r\nb"), headers={"X-Request-Id": "other"})
    assert answer.headers["x-request-id"] == "ab"
    service.stall_after = 1
    running = service.submit(replace(service.submitted[0], id=new_sequence_id(), request_id="taken"))
    conflict = await client.post(URL, json=chat(request_id="taken", n=2))
    assert conflict.status_code == 409
    assert conflict.json()["error"]["code"] == "conflict"
    running.cancel()
    service.stall_after = None
    again = await client.post(URL, json=chat(request_id="taken", n=2))
    assert again.status_code == 200


async def test_cache_salt_reaches_the_engine_and_is_bounded(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json=chat(cache_salt="pepper"))
    assert service.submitted[0].cache_salt == "pepper"
    refused = await client.post(URL, json=chat(cache_salt="é" * 65))  # 130 bytes
    assert refused.json()["error"]["param"] == "cache_salt"


async def test_flags_and_variables_reach_the_template(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json=chat(chat_template_kwargs={"enable_thinking": False}))
    assert service.tokenizer.last_chat[1] == {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "template_kwargs": {"enable_thinking": False},
        "chat_template": None,
    }
    await client.post(URL, json=chat(continue_final_message=True))
    assert service.tokenizer.last_chat[1]["add_generation_prompt"] is False
    assert service.tokenizer.last_chat[1]["continue_final_message"] is True


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"messages": 1}, "chat_template_kwargs.messages"),
        ({"enable_thinking": ["a"]}, "chat_template_kwargs.enable_thinking"),
        ({"enable_thinking": 1}, "chat_template_kwargs.enable_thinking"),
    ],
)
async def test_template_variables_are_whitelisted_scalars(
    client: httpx.AsyncClient, kwargs: dict[str, Any], param: str
) -> None:
    answer = await client.post(URL, json=chat(chat_template_kwargs=kwargs))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": None, "tool_calls": None, "audio": None}])
async def test_an_assistant_that_said_nothing(client: httpx.AsyncClient, service: FakeService, message: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **message}, {"role": "user", "content": "b"}]
    assert (await client.post(URL, json=chat(messages=messages))).status_code == 200
    assert service.tokenizer.last_chat[0][1]["content"] == ""


async def test_roles_and_parts(client: httpx.AsyncClient, service: FakeService) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "tool", "content": "d", "tool_call_id": "x"},
    ]
    assert (await client.post(URL, json=chat(messages=messages))).status_code == 200
    seen = [(message["role"], message["content"]) for message in service.tokenizer.last_chat[0]]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert seen == [("system", "Be brief."), ("user", parts), ("assistant", "c"), ("tool", "d")]


async def test_developer_stays_where_the_template_knows_it(client: httpx.AsyncClient, service: FakeService) -> None:
    service.tokenizer.chat_template = "{% if message.role == 'developer' %}"
    await client.post(URL, json=chat(messages=[{"role": "developer", "content": "x"}]))
    assert service.tokenizer.last_chat[0][0]["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role", None),
        ({"content": "x"}, "messages[0].role", None),
        ({"role": "user"}, "messages[0].content", None),
        ({"role": "user", "content": None}, "messages[0].content", None),
        ({"role": "system", "content": None}, "messages[0].content", None),
        ({"role": "tool", "content": None}, "messages[0].content", None),
        ({"role": "user", "content": []}, "messages[0].content", None),
        ({"role": "user", "content": 3}, "messages[0].content", None),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", None),
        ({"role": "user", "content": [{"type": "colour", "text": "x"}]}, "messages[0].content[0].type", None),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls[0].function",
            None,
        ),
    ],
)
async def test_bad_messages(client: httpx.AsyncClient, message: dict[str, Any], param: str, code: str | None) -> None:
    answer = await client.post(URL, json=chat(messages=[message]))
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


async def test_too_many_messages_and_none(service: FakeService) -> None:
    client = client_of(service, settings_with("limits", max_messages=3))
    for count in (0, 4, 100_000):
        answer = await client.post(URL, json=chat(messages=[{"role": "user", "content": "x"}] * count))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages"


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=chat(model="gpt-7"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert (await client.post(URL, json=chat(model=None))).status_code == 200
    assert (await client.post(URL, json=chat(model="fake"))).status_code == 200
