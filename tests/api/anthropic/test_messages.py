"""Anthropic's messages over a fake engine that echoes the prompt, a byte a token."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import client_of
from tests.api.fakes import FakeService, settings_with
from tests.api.named_events import events_of

pytestmark = pytest.mark.anyio
URL = "/v1/messages"


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "max_tokens": 6, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def test_a_whole_message(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=message(), headers={"X-Request-Id": "mine"})
    assert answer.status_code == 200
    assert answer.headers["request-id"] == "mine"
    assert answer.json() == {
        "type": "message",
        "id": "msg_mine",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "user: "}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,  # the bytes of "user: Hi", but for the cached one
            "output_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
        },
    }


async def test_events_of_a_stream_join_to_the_whole_message(client: httpx.AsyncClient) -> None:
    whole = (await client.post(URL, json=message())).json()
    answer = await client.post(URL, json=message(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    start, opened, *deltas, closed, end, stop = events_of(answer.text)
    assert (start["type"], opened["type"]) == ("message_start", "content_block_start")
    assert start["message"]["content"] == []
    assert start["message"]["usage"]["input_tokens"] == 7
    assert "".join(delta["delta"]["text"] for delta in deltas) == whole["content"][0]["text"]
    assert {delta["index"] for delta in deltas} == {0}
    assert closed == {"type": "content_block_stop", "index": 0}
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"] == whole["usage"]
    assert stop == {"type": "message_stop"}


async def test_system_and_blocks_reach_the_template(client: httpx.AsyncClient, service: FakeService) -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    asked = message(system=[{"type": "text", "text": "Be brief."}], messages=[{"role": "user", "content": blocks}])
    await client.post(URL, json=asked)
    prompt = bytes(service.submitted[-1].prompt_ids).decode()
    assert "system: Be brief." in prompt
    assert "user: a\nb" in prompt


async def test_sampling_fields_are_those_of_a_chat(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json=message(temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["x", "y"]))
    params = service.submitted[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (6, 0.5, 0.25, 7)
    assert params.stop == ("x", "y")


async def test_count_tokens(client: httpx.AsyncClient) -> None:
    counted = await client.post(f"{URL}/count_tokens", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert counted.json() == {"input_tokens": 8}
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": {"type": "any"}}
    assert (await client.post(f"{URL}/count_tokens", json=asked)).status_code == 400


@pytest.mark.parametrize(
    ("fields", "status", "kind", "said"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages must have between 1"),
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"stop_sequences": ["x"] * 1000}, 400, "invalid_request_error", "stop_sequences"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, 400, "invalid_request_error", "tool_choice needs tools"),
        ({"output_config": {"effort": "low"}}, 400, "invalid_request_error", "output_config.effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error", "budget_tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0]",
        ),
    ],
)
async def test_errors_have_the_shape_of_this_api(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, kind: str, said: str
) -> None:
    answer = await client.post(URL, json=message(**fields), headers={"X-Request-Id": "mine"})
    body = answer.json()
    assert answer.status_code == status, body
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "mine")
    assert said in body["error"]["message"]


async def test_keys_in_x_api_key() -> None:
    settings = settings_with("server", api_key=("secret",))
    async with client_of(FakeService(), settings) as client:
        good = await client.post(URL, json=message(), headers={"x-api-key": "secret"})
        bad = await client.post(URL, json=message(), headers={"x-api-key": "wrong"})
        none = await client.post(URL, json=message())
    assert good.status_code == 200
    assert (bad.status_code, bad.json()["error"]["type"]) == (401, "authentication_error")
    assert "not valid" in bad.json()["error"]["message"]
    assert "No API key" in none.json()["error"]["message"]
