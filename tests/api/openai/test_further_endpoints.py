"""vLLM's smaller additions: batches of chats, /invocations, load and times in answers, roles, templates of requests."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.conftest import RunningServer, client_of, tiny_settings
from tests.api.fakes import FakeService, events

pytestmark = pytest.mark.anyio
CHAT, BATCH, TEXT = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TWO = [[{"role": "user", "content": "Hi"}], [{"role": "system", "content": "S"}, {"role": "user", "content": "Yo"}]]


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


async def test_a_batch_of_chats(client: httpx.AsyncClient, service: FakeService) -> None:
    body = (await client.post(BATCH, json={"messages": TWO, "max_tokens": 6, "return_token_ids": True})).json()
    assert body["object"] == "chat.completion"
    choices = [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in body["choices"]]
    assert choices == [(0, "user: ", "length"), (1, "system", "length")]
    assert body["choices"][1]["token_ids"] == list(b"system")
    prompts = [bytes(one.prompt_ids).decode() for one in service.submitted]
    assert prompts == ["user: Hi", "system: S\nuser: Yo"]
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": 8 + 18, "completion_tokens": 12, "total_tokens": 38}


async def test_a_batch_of_chats_is_checked(client: httpx.AsyncClient, service: FakeService) -> None:
    part = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for fields, param in (
        ({"messages": []}, "messages"),
        ({"messages": [TWO[0]] * 257}, "messages"),
        ({"messages": [TWO[0], []]}, "messages[1]"),
        ({"messages": [TWO[0], part]}, "messages[1][0].content[0]"),
        ({"messages": [TWO[0], [{"role": "user"}]]}, "messages[1][0].content"),
        ({"messages": TWO[0]}, "messages[0]"),
        ({"messages": [TWO[0], [{"role": "user", "content": "x" * 60_000}]]}, "messages[1]"),
        ({"messages": TWO, "stream": True}, "stream"),
        ({"messages": TWO, "n": 2}, "n"),
        ({"messages": TWO, "max_tokens": -1}, "max_tokens"),
        ({"messages": TWO, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": TWO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": TWO, "include_metrics": True}, "include_metrics"),
        ({"messages": TWO, "store": True}, "store"),
    ):
        assert refusal(await client.post(BATCH, json={"max_tokens": 4, **fields})) == (400, param), fields
    assert not service.submitted
    odd = await client.post(BATCH, json={"messages": [TWO[0], [{**TWO[0][0], "colour": 1}]], "max_tokens": 1})
    assert odd.headers["x-eft-warning"] == "unknown fields: messages[1][0].colour"


async def test_invocations_go_where_their_fields_say(client: httpx.AsyncClient, service: FakeService) -> None:
    chat = (await client.post("/invocations", json=HI)).json()
    assert (chat["object"], chat["choices"][0]["message"]["content"]) == ("chat.completion", "user")
    text = (await client.post("/invocations", json={"prompt": "abc", "max_tokens": 3})).json()
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "abc")
    stream = await client.post("/invocations", json={**HI, "stream": True})
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events(stream.text)) == "user"
    assert refusal(await client.post("/invocations", json={"max_tokens": 3})) == (400, "messages")
    assert refusal(await client.post("/invocations", json={**HI, "max_tokens": -1})) == (400, "max_tokens")
    assert refusal(await client.post("/invocations", json={"messages": "Hi"})) == (400, "messages")
    assert (await client.post("/invocations", content=b"x", headers={"content-type": "text/plain"})).status_code == 415


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
async def test_load_on_demand(client: httpx.AsyncClient, service: FakeService, path: str, stream: bool) -> None:
    service.kv_usage, service.num_waiting = 0.25, 3
    body = {**(HI if path == CHAT else {"prompt": "abc", "max_tokens": 2}), "stream": stream}
    asked = {form: (await client.post(path, json=body, headers={ORCA: form})).headers for form in ("text", "JSON")}
    expected = "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
    assert asked["text"]["endpoint-load-metrics"] == expected
    form, _, report = asked["JSON"]["endpoint-load-metrics"].partition(" ")
    named = {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}
    assert (form, msgspec.json.decode(report)) == ("JSON", {"named_metrics": named})
    assert "endpoint-load-metrics" not in (await client.post(path, json=body)).headers
    binary = (await client.post(path, json=body, headers={ORCA: "BIN"})).headers
    assert "endpoint-load-metrics" not in binary
    assert binary["x-eft-warning"] == f"{ORCA}: expected one of TEXT, JSON"


ORCA = "endpoint-load-metrics-format"


async def test_the_role_of_answers(service: FakeService) -> None:
    async with client_of(service, Settings(server=ServerSettings(response_role="model"))) as client:
        whole = (await client.post(CHAT, json={**HI, "n": 2})).json()
        assert [choice["message"]["role"] for choice in whole["choices"]] == ["model", "model"]
        first = events((await client.post(CHAT, json={**HI, "stream": True})).text)[0]
        assert first["choices"][0]["delta"]["role"] == "model"
        goes_on = {**HI, "messages": [*HI["messages"], {"role": "assistant", "content": "Well"}]}
        fields = {"continue_final_message": True, "add_generation_prompt": False}
        continued = (await client.post(CHAT, json={**goes_on, **fields})).json()
        assert continued["choices"][0]["message"]["role"] == "assistant"  # that of the message that goes on
        batch = (await client.post(BATCH, json={"messages": TWO, "max_tokens": 1})).json()
        assert [choice["message"]["role"] for choice in batch["choices"]] == ["model", "model"]


async def test_a_template_of_a_request_is_refused(client: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, HI), (BATCH, {"messages": TWO}), ("/tokenize", {"messages": HI["messages"]})):
        answer = await client.post(path, json={**body, "chat_template": "{{ messages }}"})
        assert refusal(answer) == (400, "chat_template"), path
        assert "model.trust_request_chat_template" in answer.json()["error"]["message"]
    text = await client.post(TEXT, json={"prompt": "x", "chat_template": "{{ messages }}"})
    assert refusal(text) == (400, "chat_template")


# -- a real model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusting(tiny_model: Path) -> Iterator[httpx.Client]:
    settings = tiny_settings(tiny_model)
    model = msgspec.structs.replace(settings.model, trust_request_chat_template=True)
    with (
        RunningServer(msgspec.structs.replace(settings, model=model)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_a_trusted_template_is_used(trusting: httpx.Client) -> None:
    def tokens(**fields: Any) -> list[int]:
        answer = trusting.post("/tokenize", json={"messages": HI["messages"], **fields})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["tokens"])

    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ enable_thinking }}"
    expected = trusting.post("/tokenize", json={"prompt": "<user>HiTrue", "add_special_tokens": False}).json()["tokens"]
    assert tokens(chat_template=template, chat_template_kwargs={"enable_thinking": True}) == expected
    assert tokens() != expected
    walked = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert tokens(chat_template=walked) == trusting.post("/tokenize", json={"prompt": "Hi"}).json()["tokens"]
    chat = trusting.post(CHAT, json={**HI, "chat_template": walked, "return_token_ids": True}).json()
    assert chat["prompt_token_ids"] == tokens(chat_template=walked)
    for bad, message in (("{% for %}", "line 1"), ("{{ raise_exception('never') }}", "never"), ("{{ 1 / 0 }}", "zero")):
        answer = trusting.post(CHAT, json={**HI, "chat_template": bad})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_times_on_demand(trusting: httpx.Client, path: str) -> None:
    body = {**HI, "ignore_eos": True} if path == CHAT else {"prompt": [5, 77, 9], "max_tokens": 4, "ignore_eos": True}
    whole = trusting.post(path, json={**body, "include_metrics": True}).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(trusting.post(path, json={**body, **options, "include_metrics": True}).text)
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    alone = events(trusting.post(path, json={**body, "stream": True, "include_metrics": True}).text)[-1]
    assert (alone["choices"], "usage" in alone) == ([], False)
    for metrics in (whole["metrics"], chunks[-1]["metrics"], alone["metrics"]):
        assert metrics["queue_time_ms"] <= metrics["time_to_first_token_ms"]
        assert metrics["mean_itl_ms"] == pytest.approx(metrics["generation_time_ms"] / 3, abs=0.01)
        rate = 4000 / metrics["generation_time_ms"]
        assert metrics["tokens_per_second"] == pytest.approx(rate, rel=0.05)
    assert all("metrics" not in chunk for chunk in chunks[:-1])
    assert "metrics" not in trusting.post(path, json=body).json()
    one = trusting.post(path, json={**body, "max_tokens": 1, "include_metrics": True}).json()["metrics"]
    assert (one["mean_itl_ms"], one["tokens_per_second"]) == (None, None)
    for fields in ({"n": 2}, {"best_of": 2}, {"use_beam_search": True}):
        assert refusal(trusting.post(path, json={**body, **fields, "include_metrics": True})) == (
            400,
            "include_metrics",
        )


def test_invocations_reach_embeddings_and_scores(trusting: httpx.Client) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/score", {"queries": "a", "documents": ["b", "c"]}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    ):
        direct, through = trusting.post(path, json=body).json(), trusting.post("/invocations", json=body).json()
        for field in ("data", "results"):
            assert direct.get(field) == through.get(field), path
        assert "error" not in through


def test_a_batch_has_the_form_that_is_asked_for(trusting: httpx.Client) -> None:
    body = {"messages": TWO, "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 8}
    choices = trusting.post(BATCH, json=body).json()["choices"]
    assert all(choice["message"]["content"] in ("yes", "no") for choice in choices)


def test_a_batch_answers_as_its_chats_do(trusting: httpx.Client) -> None:
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    batch = trusting.post(BATCH, json={"messages": TWO, **options}).json()
    each = [trusting.post(CHAT, json={"messages": chat, **options}).json() for chat in TWO]
    texts = [choice["message"]["content"] for choice in batch["choices"]]
    assert texts == [one["choices"][0]["message"]["content"] for one in each]
    assert batch["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in each)
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", batch["id"])


@pytest.mark.parametrize(
    "path", ["/conversations", "/images/generations", "/fine_tuning/alpha/graders/run", "/uploads"]
)
async def test_what_is_not_served_of_openais_api_says_so(client: httpx.AsyncClient, path: str) -> None:
    for ask in (client.get, client.post):
        answer = await ask(f"/v1{path}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (404, "unknown_url", "invalid_request_error")
        assert f"/v1/{path.split('/')[1]} here: " in error["message"]
    for other in ("/v1/nothing", path, f"/v2{path}"):
        assert (await client.get(other)).json()["error"]["message"] == "There is no such endpoint."
