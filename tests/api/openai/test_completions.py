"""Text completions over a fake engine that echoes the prompt, a byte a token."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import client_of
from tests.api.fakes import FakeService, events, settings_with

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["ab"]),
        (["abc", "xyz"], ["ab", "xy"]),
        ([97, 98, 99], ["ab"]),
        ([[97, 98], [120, 121]], ["ab", "xy"]),
    ],
)
async def test_every_form_of_prompt(client: httpx.AsyncClient, prompt: Any, texts: list[str]) -> None:
    body = (await client.post(URL, json={"prompt": prompt, "max_tokens": 2})).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["completion_tokens"] == 2 * len(texts)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt"),
        (["a", ""], "prompt[1]"),
        (["a", 1], "prompt"),
        ([1, "a"], "prompt"),
        (["a", [1]], "prompt"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt"),
        ([257], "prompt"),
        ([[1], [2**70]], "prompt[1]"),
        (None, "prompt"),
        ({"a": 1}, "prompt"),
    ],
)
async def test_bad_prompts(client: httpx.AsyncClient, prompt: Any, param: str) -> None:
    answer = await client.post(URL, json={"prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_missing_prompt(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json={})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_default_is_sixteen_tokens_or_what_fits(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json={"prompt": "abc"})
    await client.post(URL, json={"prompt": "x" * 195})
    assert [submission.params.max_tokens for submission in service.submitted] == [16, 5]


async def test_a_given_limit_must_fit(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json={"prompt": "x" * 195, "max_tokens": 6})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] == "max_tokens"


async def test_several_prompts_and_choices_count_prompt_by_prompt(client: httpx.AsyncClient) -> None:
    body = (await client.post(URL, json={"prompt": ["ab", "xyz"], "n": 2, "max_tokens": 1})).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "a", "x", "x"]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_a_suffix_stands_behind_what_is_asked_for(client: httpx.AsyncClient, service: FakeService) -> None:
    asked = {"prompt": ["ab", "c"], "suffix": "yz", "max_tokens": 2}
    answer = await client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert [one.prompt_ids for one in service.submitted] == [[1, *b"ab", 2, *b"yz", 3], [1, *b"c", 2, *b"yz", 3]]
    for field in ({"echo": True}, {"truncate_prompt_tokens": 2}):
        refused = await client.post("/v1/completions", json={**asked, **field})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(field)))


async def test_a_suffix_needs_tokens_for_it(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.tokenizer, "infill", None)
    refused = await client.post("/v1/completions", json={"prompt": "ab", "suffix": "yz"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")
    assert (await client.post("/v1/completions", json={"prompt": "ab", "suffix": ""})).status_code == 200


async def test_echo(client: httpx.AsyncClient) -> None:
    whole = (await client.post(URL, json={"prompt": ["abc", "xyz"], "echo": True, "max_tokens": 2})).json()
    assert [choice["text"] for choice in whole["choices"]] == ["abcab", "xyzxy"]
    streamed = await client.post(URL, json={"prompt": [97, 98], "echo": True, "max_tokens": 3, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(streamed.text)) == "ababa"


async def test_echo_of_a_truncated_prompt_is_what_the_model_saw(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "abcdef", "echo": True, "max_tokens": 1, "truncate_prompt_tokens": 2}
    assert (await client.post(URL, json=asked)).json()["choices"][0]["text"] == "efe"


async def test_echo_of_the_end_that_is_cut_off(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "abcdef", "echo": True, "max_tokens": 1, "truncate_prompt_tokens": 2}
    cut = await client.post(URL, json={**asked, "truncation_side": "right"})
    assert cut.json()["choices"][0]["text"] == "aba"
    assert (await client.post(URL, json={**asked, "truncation_side": "left"})).json()["choices"][0]["text"] == "efe"
    for wrong in ({"truncation_side": "middle"}, {"truncation_side": "right", "truncate_prompt_tokens": None}):
        answer = await client.post(URL, json={**asked, **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncation_side")


@pytest.mark.parametrize(("skip", "text"), [(None, "aba"), (True, "aba"), (False, "a<s>ba")])
async def test_echo_of_special_tokens(client: httpx.AsyncClient, skip: bool | None, text: str) -> None:
    asked = {"prompt": [97, 256, 98], "echo": True, "max_tokens": 1, "skip_special_tokens": skip}
    assert (await client.post(URL, json=asked)).json()["choices"][0]["text"] == text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_between_the_start_and_the_answer_leaves_nothing_behind(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no answer today")

    for renderer, url, body in (
        ("completions.CompletionAnswer", URL, {"prompt": "abc", "n": 3}),
        ("chat.ChatAnswer", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "n": 3}),
    ):
        monkeypatch.setattr(f"runtime.api.openai.{renderer}", fail)
        service.submitted.clear()
        answer = await client.post(url, json={**body, "stream": stream})
        assert answer.status_code == 500
        assert len(service.submitted) == 3
        assert not service.running


async def test_stream_ends_with_a_finish_chunk_and_usage(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "abc", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *parts, usage = events((await client.post(URL, json=asked)).text)
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == "abc"
    assert parts[-1]["choices"][0]["text"] == ""
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6


async def test_token_ids(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "ab", "max_tokens": 3, "return_token_ids": True}
    choice = (await client.post(URL, json=asked)).json()["choices"][0]
    assert choice["token_ids"] == [97, 98, 97]
    assert choice["prompt_token_ids"] == [97, 98]
    chunks = events((await client.post(URL, json={**asked, "stream": True})).text)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [97, 98]
    assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in chunks[1:])


async def test_too_many_prompts(service: FakeService) -> None:
    client = client_of(service, settings_with("limits", max_prompts=2))
    assert (await client.post(URL, json={"prompt": ["a", "b"]})).status_code == 200
    answer = await client.post(URL, json={"prompt": ["a", "b", "c"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert (await client.post(URL, json={"prompt": [97, 98, 99]})).status_code == 200  # one prompt of 3 tokens


async def test_a_text_that_cannot_fit_is_refused_untokenised(service: FakeService) -> None:
    client = client_of(service, settings_with("limits"))
    answer = await client.post(URL, json={"prompt": "x" * 60_000})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "60000 characters" in answer.json()["error"]["message"]
