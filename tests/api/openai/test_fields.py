"""Fields that are known and not acted on, and fields that nobody knows."""

from typing import Any

import httpx
import pytest

from runtime.api.openai.neutral import COMPLETION_NEUTRAL, INSTEAD, NEUTRAL
from runtime.api.openai.schema import ChatRequest, CompletionRequest
from tests.api.conftest import RunningServer, client_of
from tests.api.fakes import FakeService, events, settings_with

pytestmark = pytest.mark.anyio
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}

ASKS: dict[str, Any] = {
    "add_special_tokens": True,
    "echo": True,
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "priority": 1,
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "store": True,
    "suffix": "end",
    "verbosity": "high",
}
"""A value that asks for something, where a bare 3 would not do."""


@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - set(ChatRequest.__struct_fields__)))
async def test_neutral_values_pass_and_others_are_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, field: str
) -> None:
    for value in NEUTRAL[field]:
        answer = await client.post("/v1/chat/completions", json={**CHAT, field: value})
        assert answer.status_code == 200, (field, value)
        assert "x-eft-warning" not in answer.headers
    before = len(service.submitted)
    answer = await client.post("/v1/chat/completions", json={**CHAT, field: ASKS.get(field, 3)})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == field
    assert "not supported yet" in error["message"]
    assert INSTEAD.get(field, "") in error["message"]
    assert len(service.submitted) == before


@pytest.mark.parametrize(
    ("field", "value"), [("presence_penalty", 0.0), ("repetition_penalty", 1.0), ("length_penalty", 1)]
)
async def test_integers_and_floats_are_the_same_number(client: httpx.AsyncClient, field: str, value: float) -> None:
    assert (await client.post("/v1/chat/completions", json={**CHAT, field: value})).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("logprobs", 0), ("presence_penalty", False), ("store", 0)])
async def test_zero_is_not_false(client: httpx.AsyncClient, field: str, value: Any) -> None:
    answer = await client.post("/v1/chat/completions", json={**CHAT, field: value})
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(("field", "value"), [("top_logprobs", 5), ("documents", [{"text": "a"}])])
async def test_a_completion_refuses_the_fields_of_a_chat(client: httpx.AsyncClient, field: str, value: Any) -> None:
    error = (await client.post("/v1/completions", json={"prompt": "a", field: value})).json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert INSTEAD[field] in error["message"]


async def test_documents_reach_a_template_that_prints_them(client: httpx.AsyncClient, service: FakeService) -> None:
    documents = [{"title": "t", "text": "a"}]
    refused = await client.post("/v1/chat/completions", json={**CHAT, "documents": documents})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "documents"
    service.tokenizer.chat_template = "{% for one in documents %}{{ one.text }}{% endfor %}"
    assert (await client.post("/v1/chat/completions", json={**CHAT, "documents": documents})).status_code == 200
    assert service.tokenizer.last_chat[1]["template_kwargs"] == {"documents": documents}


def test_no_field_is_both_acted_on_and_refused() -> None:
    assert INSTEAD.keys() <= NEUTRAL.keys()
    acted_on = set(ChatRequest.__struct_fields__) & set(CompletionRequest.__struct_fields__)
    assert acted_on.isdisjoint(NEUTRAL)


async def test_a_huge_value_is_refused_unread(client: httpx.AsyncClient) -> None:
    schema = {"type": "json_schema", "schema": "x" * 500_000}
    answer = await client.post("/v1/chat/completions", json={**CHAT, "response_format": schema})
    assert answer.json()["error"]["param"] == "response_format"
    assert len(answer.content) < 1000


async def test_every_answer_names_the_version(client: httpx.AsyncClient) -> None:
    """Refusals too, so that a result can be traced; and the fingerprint is in every whole answer and chunk."""
    for path, prompt in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a", "max_tokens": 1})):
        for fields, status in (
            ({}, 200),
            ({"stream": True}, 200),
            ({"temperature": -1}, 400),
            ({"max_tokens": 999}, 400),
        ):
            answer = await client.post(path, json={**prompt, **fields})
            assert (answer.status_code, answer.headers["x-eft-adapter-version"]) == (status, "base")
            if status == 200:
                parts = events(answer.text) if fields else [answer.json()]
                assert all(part["system_fingerprint"].startswith("fp_") for part in parts)


UNKNOWN = {
    **CHAT,
    "colour": "red",
    "messages": [{"role": "user", "content": "Hi", "mood": 1}],
    "stream": True,
    "stream_options": {"sparkle": True},
}


async def test_unknown_fields_are_named_in_a_header(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=UNKNOWN)
    assert answer.status_code == 200
    warning = answer.headers["x-eft-warning"]
    assert warning == "unknown fields: colour, stream_options.sparkle, messages[0].mood"


async def test_unknown_fields_can_be_refused_or_ignored(service: FakeService) -> None:
    rejecting = client_of(service, settings_with("limits", unknown_fields="reject"))
    answer = await rejecting.post("/v1/chat/completions", json=UNKNOWN)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "colour"
    ignoring = client_of(service, settings_with("limits", unknown_fields="ignore"))
    answer = await ignoring.post("/v1/chat/completions", json=UNKNOWN)
    assert answer.status_code == 200
    assert "x-eft-warning" not in answer.headers


@pytest.mark.parametrize("name", ["", " ", "\t", " a ", "\u00a0", "\x00"])
async def test_names_of_nothing_are_a_valid_header_all_the_same(server: RunningServer, name: str) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, name: 1})
    assert answer.status_code == 200
    assert answer.headers["x-eft-warning"].startswith("unknown fields: ")


async def test_hostile_names_cannot_split_the_header(client: httpx.AsyncClient) -> None:
    names = {f"a\r\nX-Evil-{index}: 1\u2028é": 1 for index in range(20)}
    answer = await client.post("/v1/chat/completions", json={**CHAT, **names})
    assert answer.status_code == 200
    assert "and 12 more" in answer.headers["x-eft-warning"]
    assert not [name for name in answer.headers if name.startswith("x-evil")]


ASKS_OF_CHATS: dict[str, Any] = {
    "include_reasoning": "yes",
    "parallel_tool_calls": "yes",
    "reasoning_effort": "high",
    "thinking_token_budget": 3,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize("field", sorted(COMPLETION_NEUTRAL.keys() - NEUTRAL.keys()))
async def test_fields_of_chats_are_refused_in_completions(client: httpx.AsyncClient, field: str) -> None:
    for value in COMPLETION_NEUTRAL[field]:
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, field: value})
        assert answer.status_code == 200, (field, value)
    answer = await client.post("/v1/completions", json={"prompt": "a", field: ASKS_OF_CHATS[field]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert answer.json()["error"]["param"] == field
