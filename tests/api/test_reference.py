"""The table of request fields against the app: each field is sent, and does what the table says."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import msgspec
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from runtime.api import reference
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.openai.schema import CompletionRequest
from runtime.api.reference import ENDPOINTS, FieldRow, reference_page, rows
from runtime.responses import SCHEMA, ResponseStore
from runtime.support.database import Database
from settings.api import ResponseSettings
from settings.schema import ModelSettings, SchedulerSettings, Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "docs" / "api.md"
HI = [{"role": "user", "content": "Hi"}]
BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 4},
    "/v1/completions": {"prompt": "abc", "max_tokens": 4},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/score": {"text_1": "Hi", "text_2": "Ho"},
    "/v1/rerank": {"query": "Hi", "documents": ["Ho"]},
    "/tokenize": {"messages": HI},
    "/detokenize": {"tokens": [65, 66]},
}

FIRST = "the first response's id"

# Values of supported fields, with the fields that they need beside them.
EXAMPLES: dict[str, dict[str, Any]] = {
    "add_generation_prompt": {"add_generation_prompt": True},
    "add_special_tokens": {"add_special_tokens": False},
    "background": {"background": True},
    "best_of": {"best_of": 2},
    "cache_salt": {"cache_salt": "mine"},
    "chat_template": {"chat_template": "{{ messages }}"},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": True}},
    "continue_final_message": {"continue_final_message": False},
    "deadline_ms": {"deadline_ms": 60_000},
    "early_stopping": {"early_stopping": True, "use_beam_search": True},
    "echo": {"echo": True},
    "dimensions": {"dimensions": 1},
    "encoding_format": {"encoding_format": "base64"},
    "ignore_eos": {"ignore_eos": True},
    "include": {"include": ["reasoning.encrypted_content"]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True},
    "length_penalty": {"length_penalty": 2.0, "use_beam_search": True},
    "instructions": {"instructions": "Be brief"},
    "max_completion_tokens": {"max_completion_tokens": 3},
    "max_tool_calls": {"max_tool_calls": 3},
    "metadata": {"metadata": {"a": "b"}},
    "max_tokens": {"max_tokens": 3},
    "min_p": {"min_p": 0.1},
    "min_tokens": {"min_tokens": 2},
    "model": {"model": "fake"},
    "n": {"n": 2},
    "normalize": {"normalize": False},
    "pooling": {"pooling": "last"},
    "previous_response_id": {"previous_response_id": FIRST},
    "priority": {"priority": 5},
    "request_id": {"request_id": "mine"},
    "return_token_ids": {"return_token_ids": True},
    "return_token_strs": {"return_token_strs": True},
    "seed": {"seed": 7},
    "skip_special_tokens": {"skip_special_tokens": False},
    "stop": {"stop": ["x"]},
    "store": {"store": True},
    "stop_sequences": {"stop_sequences": ["x"]},
    "stop_token_ids": {"stop_token_ids": [3]},
    "stream": {"stream": True},
    "stream_options": {"stream_options": {"include_usage": True}, "stream": True},
    "suffix": {"suffix": "def"},
    "system": {"system": "Be brief"},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.5},
    "top_n": {"top_n": 1},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 2},
    "truncation_side": {"truncation_side": "left", "truncate_prompt_tokens": 2},
    "use_beam_search": {"use_beam_search": True},
}
LABELS: dict[str, Any] = {
    "cache_control": {"type": "ephemeral"},
    "metadata": {"user_id": "me"},
    "prompt_cache_key": "mine",
    "safety_identifier": "me",
    "session_id": "s-1",
    "spaces_between_special_tokens": False,
    "user": "me",
    "user_profile_id": "me",
    "workspace_id": "w-1",
}
ASKED: dict[str, Any] = {
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "any"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
}
"""Values of Anthropic's fields that a chat of ours may not take."""

OTHERS: tuple[Any, ...] = ({"a": {"b": [[1]]}}, [[[1]]], "eft7", 0.25, True, 3)
"""One of these is of a wrong type, or no neutral value, whatever the field."""

# Of vLLM's ChatCompletionRequest and CompletionRequest, written down from its protocol modules.
VLLM = [
    "use_beam_search", "top_k", "min_p", "repetition_penalty", "watermarking", "length_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens",
    "truncate_prompt_tokens", "truncation_side", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids",
    "bad_words", "echo", "add_special_tokens", "structured_outputs", "priority", "request_id", "session_id",
    "return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start", "return_token_offsets",
    "return_mm_kwargs", "cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "repetition_detection", "thinking_token_budget", "stream_interval", "include_metrics",
]  # fmt: skip
VLLM_CHATS = [
    "include_reasoning", "add_generation_prompt", "continue_final_message", "documents", "chat_template",
    "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text",
]  # fmt: skip
VLLM_TEXTS = ["prompt_embeds"]
ANTHROPIC = [
    "cache_control", "container", "context_management", "inference_geo", "max_tokens", "mcp_servers", "messages",
    "metadata", "model", "output_config", "service_tier", "stop_sequences", "stream", "system", "temperature",
    "thinking", "tool_choice", "tools", "top_k", "top_p",
]  # fmt: skip

ROWS = [(endpoint, row) for endpoint in ENDPOINTS for row in rows(endpoint)]
IDS = [f"{endpoint.path}-{row.name}" for endpoint, row in ROWS]


@pytest.fixture
async def client(service: FakeService, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Of an app whose operator allows what can be allowed. It has a response, whose id takes the place of `FIRST`."""
    settings = Settings(
        model=ModelSettings(trust_request_chat_template=True), scheduler=SchedulerSettings(policy="priority")
    )
    database = await asyncio.to_thread(Database, tmp_path, [SCHEMA])
    handle = ServiceHandle(service)  # type: ignore[arg-type]
    handle.responses = ResponseStore(database, ResponseSettings())
    transport = httpx.ASGITransport(app=create_app(handle, settings), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        first = (await client.post("/v1/responses", json=BASE["/v1/responses"])).json()["id"]
        service.submitted.clear()
        post = client.post
        client.post = lambda url, json: post(url, json=known(json, first))  # type: ignore[method-assign]
        yield client
    await asyncio.to_thread(database.close)


def known(body: dict[str, Any], first: str) -> dict[str, Any]:
    return {name: first if value == FIRST else value for name, value in body.items()}


def refused(answer: httpx.Response, name: str) -> bool:
    """A 400 that names the field, or a place in it."""
    if answer.status_code != 400:
        return False
    error = answer.json()["error"]
    if "param" not in error:  # Anthropic's have none
        return re.search(rf"\b{name}\b", error["message"]) is not None
    at = error["param"] or ""
    return bool(at == name or at.startswith((f"{name}.", f"{name}[")))


async def answer_of(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    return await client.post(path, json={**BASE[path], **fields})


def wrong(body: type[msgspec.Struct], name: str) -> list[Any]:
    """Values that the field's type does not take; none for JSON of any kind, such as a schema."""
    kind = get_type_hints(body, include_extras=True)[name]
    if msgspec.Raw in (kind, *get_args(kind)):
        return []
    found = []
    for value in OTHERS:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            found.append(value)
    return found


@pytest.mark.parametrize(("endpoint", "row"), ROWS, ids=IDS)
async def test_a_field_does_what_the_table_says(
    client: httpx.AsyncClient, service: FakeService, endpoint: reference.BodyEndpoint, row: FieldRow
) -> None:
    path, name = endpoint.path, row.name
    declared = name in endpoint.body.__struct_fields__
    if declared:  # it is read: what is of another type is refused by its name
        for value in wrong(endpoint.body, name)[:1]:
            assert refused(await answer_of(client, path, **{name: value}), name)
    if row.effect == "supported":
        fields = {"prompt": "Hi"} if name == "prompt" else EXAMPLES.get(name, {})
        if path == "/v1/responses" and name == "stream_options":
            fields = {"stream": True, "stream_options": {"include_obfuscation": False}}
        body = {**({} if name == "prompt" and path == "/tokenize" else BASE[path]), **fields}
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert "x-eft-warning" not in answer.headers
    elif row.effect == "no effect":
        with_it = await answer_of(client, path, **{name: LABELS[name]})
        without = await answer_of(client, path)
        assert with_it.status_code == without.status_code == 200, with_it.text
        assert "x-eft-warning" not in with_it.headers
        for field in ("choices", "content"):
            assert with_it.json().get(field) == without.json().get(field)
    else:
        before = len(service.submitted)
        neutral = endpoint.neutral.get(name, ())
        value = ASKED[name] if declared else next(one for one in OTHERS if one not in neutral)
        extra = {"tools": ASKED["tools"]} if name == "tool_choice" and path == "/v1/messages" else {}
        denied = await answer_of(client, path, **{name: value}, **extra)
        assert denied.status_code == 400, denied.text
        if not declared:
            assert refused(denied, name)
        assert len(service.submitted) == before
        for one in neutral:
            passed = await answer_of(client, path, **{name: one})
            assert passed.status_code == 200, (one, passed.text)
            assert "x-eft-warning" not in passed.headers


def test_the_page_is_current() -> None:
    """Its end is what `eft config api` prints."""
    assert PAGE.read_text(encoding="utf-8").endswith("\n\n" + reference_page())


def names(path: str) -> set[str]:
    return {row.name for endpoint in ENDPOINTS if endpoint.path == path for row in rows(endpoint)}


def test_every_field_of_the_other_apis_is_in_the_table() -> None:
    parts = ("CompletionCreateParamsBase", "CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming")
    for path, module, more in (
        ("/v1/chat/completions", chat_create_params, VLLM_CHATS),
        ("/v1/completions", completion_create_params, VLLM_TEXTS),
    ):
        theirs = {name for part in parts for name in getattr(module, part).__annotations__}
        assert not theirs - names(path)
        assert not theirs - reference.OPENAI, "the table gives these another origin"
        assert not {*VLLM, *more} - names(path)
    assert not set(ANTHROPIC) - names("/v1/messages")
    theirs = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert not theirs - names("/v1/responses")
    assert set(embedding_create_params.EmbeddingCreateParams.__annotations__) == reference.EMBEDDINGS
    assert not reference.EMBEDDINGS - names("/v1/embeddings")


def test_origins() -> None:
    found = {row.name: row.origin for endpoint in ENDPOINTS[:1] + ENDPOINTS[-3:-2] for row in rows(endpoint)}
    assert (found["top_k"], found["deadline_ms"], found["seed"]) == ("Anthropic", "Eft", "OpenAI")
    of_texts = {
        row.name: row.origin for row in rows(reference.BodyEndpoint("x", CompletionRequest, openai=reference.OPENAI))
    }
    assert (of_texts["top_k"], of_texts["prompt"], of_texts["suffix" if "suffix" in of_texts else "echo"]) == (
        "vLLM",
        "OpenAI",
        "OpenAI",
    )
