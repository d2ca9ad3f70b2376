"""Caps on every list and text of a request: a 400 names the field, the limit and the value given, before any work."""

import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from settings.api import LimitSettings
from tests.api.conftest import client_of
from tests.api.fakes import FakeService, settings_with

pytestmark = pytest.mark.anyio
CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
EMBED = "/v1/embeddings"


def chat(count: int = 1, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}] * count, "max_tokens": 1, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 1, **fields}


def beams(width: int, stops: int) -> dict[str, Any]:
    return text(use_beam_search=True, n=width, stop_token_ids=list(range(stops)))


def parts(count: int) -> dict[str, Any]:
    half = [{"type": "text", "text": "x"}] * (count // 2)
    messages = [{"role": "user", "content": half}, {"role": "user", "content": [*half, *half[: count % 2]]}]
    return chat(messages=messages)


def tools(count: int, text: str = "") -> dict[str, Any]:
    """Checked, though none may be called."""
    each = [{"name": f"f{number}", "parameters": {"description": text}} for number in range(count)]
    return chat(tools=[{"type": "function", "function": one} for one in each], tool_choice="none")


TOOL = {"role": "tool", "content": "x"}

# Setting → its value in the test, the endpoint, a body at the limit, one beyond it, the field, the value given.
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any], str, str]] = {
    "max_stop": (3, TEXT, text(stop=["x"] * 3), text(stop=["x"] * 4), "stop", "4"),
    "max_stop_chars": (5, CHAT, chat(stop=["a", "x" * 5]), chat(stop=["a", "x" * 6]), "stop", "6"),
    "max_stop_token_ids": (3, TEXT, text(stop_token_ids=[1] * 3), text(stop_token_ids=[1] * 4), "stop_token_ids", "4"),
    "max_inputs": (2, EMBED, {"input": ["a"] * 2}, {"input": [[97]] * 3}, "input", "3"),
    "max_n": (4, CHAT, chat(n=4), chat(n=5), "n", "5"),
    # One more is the end of sequence.
    "max_beam_candidates": (12, TEXT, beams(3, 2), beams(3, 3), "stop_token_ids", "15"),
    "max_prompts": (2, TEXT, text(prompt=["a"] * 2), text(prompt=["a"] * 3), "prompt", "3"),
    "max_sequences": (6, TEXT, text(prompt=["a"] * 3, n=2), text(prompt=["a"] * 3, n=3), "n", "9"),
    "max_messages": (3, CHAT, chat(3), chat(4), "messages", "4"),
    "max_content_parts": (3, CHAT, parts(3), parts(4), "messages", "4"),
    "max_template_kwargs": (
        30,
        CHAT,
        chat(chat_template_kwargs={"date_string": "x" * 12}),
        chat(chat_template_kwargs={"date_string": "x" * 30}),
        "chat_template_kwargs",
        "48",
    ),
    "max_label": (8, TEXT, text(user="u" * 8), text(user="u" * 9), "user", "9"),
    "max_metadata": (
        2,
        TEXT,
        text(metadata={"a": "b", "c": "d"}),
        text(metadata=dict.fromkeys("abc", "")),
        "metadata",
        "3",
    ),
    "max_bad_words": (2, TEXT, text(bad_words=["a", "b"]), text(bad_words=["a", "b", "c"]), "bad_words", "3"),
    "max_logit_bias": (
        2,
        TEXT,
        text(logit_bias={"1": 1, "2": 1}),
        text(logit_bias={"1": 1, "2": 1, "3": 1}),
        "logit_bias",
        "3",
    ),
    "max_logprobs": (4, TEXT, text(logprobs=4), text(logprobs=5), "logprobs", "5"),
    "max_tokenize_chars": (9, TOKENIZE, {"prompt": "x" * 9}, {"prompt": "x" * 10}, "prompt", "10"),
    "max_tools": (2, CHAT, tools(2), tools(3), "tools", "3"),
    "max_grammar": (300, CHAT, tools(1, "d" * 200), tools(1, "d" * 300), "tools", "322"),
    "max_detokenize_tokens": (4, DETOKENIZE, {"tokens": [97] * 4}, {"tokens": [97] * 5}, "tokens", "5"),
}


def test_every_cap_is_tried() -> None:
    no_caps = {"unknown_fields", "grammar_timeout"}
    assert set(CASES) == set(LimitSettings.__struct_fields__) - no_caps


@pytest.mark.parametrize("setting", CASES)
async def test_a_cap(service: FakeService, setting: str) -> None:
    limit, path, within, beyond, field, given = CASES[setting]
    client = client_of(service, settings_with("limits", **{setting: limit}))
    answer = await client.post(path, json=within)
    assert answer.status_code == 200, answer.text
    submitted = len(service.submitted)
    answer = await client.post(path, json=beyond)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]
    assert str(limit) in error["message"]
    assert given in error["message"]
    assert len(service.submitted) == submitted


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, chat(safety_identifier="x" * 513), "safety_identifier"),
        (CHAT, chat(prompt_cache_key="x" * 513), "prompt_cache_key"),
        (CHAT, chat(metadata={"k" * 513: "v"}), "metadata"),
        (TEXT, text(metadata={"k": "v" * 513}), "metadata"),
        (TEXT, text(request_id="x" * 129), "request_id"),
        (TEXT, text(cache_salt="é" * 65), "cache_salt"),
        (TEXT, text(stop="x" * 900_000), "stop"),
        (TEXT, text(stop_token_ids=[1] * 200_000), "stop_token_ids"),
        (TEXT, text(prompt=["a"] * 256, best_of=5, n=1), "best_of"),
        (TEXT, text(prompt=["a"] * 256, use_beam_search=True, n=5), "n"),
        (
            TEXT,
            {"prompt": "a", "use_beam_search": True, "best_of": 64, "stop_token_ids": list(range(8))},
            "stop_token_ids",
        ),
        (TOKENIZE, {"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": "x", "name": "n" * 513}]), "messages[0].name"),
        (TOKENIZE, {"messages": [TOOL | {"tool_call_id": "i" * 513}]}, "messages[0].tool_call_id"),
        (TOKENIZE, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 8193}]}, "messages"),
        (TOKENIZE, {**chat(), "chat_template_kwargs": {"date_string": "x" * 1024}}, "chat_template_kwargs"),
    ],
)
async def test_the_defaults(client: httpx.AsyncClient, service: FakeService, path: str, body: Any, field: str) -> None:
    body = {name: value for name, value in body.items() if path != TOKENIZE or name != "max_tokens"}
    answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert len(answer.json()["error"]["message"]) < 400
    assert not service.submitted


async def test_a_beam_search_without_stop_ids_is_refused_for_its_width(service: FakeService) -> None:
    client = client_of(service, settings_with("limits", max_beam_candidates=20))
    answer = await client.post(TEXT, json=text(use_beam_search=True, n=11))
    assert answer.json()["error"]["param"] == "n"
    answer = await client.post(TEXT, json=text(use_beam_search=True, n=2, best_of=11))
    assert answer.json()["error"]["param"] == "best_of"
    assert (await client.post(TEXT, json=text(use_beam_search=True, n=11, ignore_eos=True))).status_code == 200


async def test_a_prompt_to_be_truncated_is_not_held_to_the_context(service: FakeService) -> None:
    client = client_of(service, settings_with("limits", max_tokenize_chars=2000))
    body = text(prompt="x" * 1990 + "end", truncate_prompt_tokens=3)
    assert (await client.post(TEXT, json=body)).status_code == 200
    assert bytes(service.submitted[-1].prompt_ids) == b"end"
    answer = await client.post(TEXT, json=text(prompt="x" * 2001, truncate_prompt_tokens=3))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    answer = await client.post(
        CHAT, json=chat(messages=[{"role": "user", "content": "x" * 2001}], truncate_prompt_tokens=3)
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


async def test_what_is_long_is_refused_by_its_length(client: httpx.AsyncClient) -> None:
    for path, body, field in (
        (TEXT, text(prompt="x" * 60_000), "prompt"),
        (TEXT, text(prompt=["a", "x" * 60_000]), "prompt[1]"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 60_000}]), "messages"),
    ):
        error = (await client.post(path, json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
        assert "60000 characters" in error["message"] or (path == CHAT and "60004 characters" in error["message"])


async def test_a_grammar_that_takes_too_long_to_compile_is_refused(service: FakeService) -> None:
    done = threading.Event()
    grammars = SimpleNamespace(special_id=lambda text: None, compile=lambda *_, **__: done.wait(60))
    service.engine = SimpleNamespace(grammars=grammars)  # type: ignore[attr-defined]
    client = client_of(service, settings_with("limits", grammar_timeout=0.05))
    try:
        answer = await client.post(CHAT, json=chat(guided_regex="a"))
    finally:
        done.set()
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "guided_regex"
    assert "0.05 seconds" in answer.json()["error"]["message"]
    assert not service.submitted
