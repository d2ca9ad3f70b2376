"""Chats with `store: true`: what is kept of them, lists of them, and whose they are."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.errors import StorageUnavailable
from runtime.responses import ResponseStore
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService, events
from tests.api.responses.test_routes import KEYS, app_of

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
HI: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ASKED: dict[str, Any] = {"messages": HI, "max_tokens": 4, "store": True}


@pytest.fixture
async def stored(service: FakeService, store: ResponseStore) -> AsyncIterator[httpx.AsyncClient]:
    async with app_of(service, store) as client:
        yield client


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post(URL, json={**ASKED, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ids(client: httpx.AsyncClient, **query: Any) -> list[str]:
    answer = await client.get(URL, params=query)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


async def test_a_stored_chat_is_its_answer(stored: httpx.AsyncClient) -> None:
    body = await ask(stored, metadata={"a": "b"}, n=2, logprobs=True, top_logprobs=1)
    assert (await stored.get(f"{URL}/{body['id']}")).json() == {**body, "metadata": {"a": "b"}}
    messages = (await stored.get(f"{URL}/{body['id']}/messages")).json()
    assert [(one["role"], one["content"]) for one in messages["data"]] == [("system", "Be brief."), ("user", "Hi")]
    page = await stored.get(f"{URL}/{body['id']}/messages", params={"after": messages["first_id"], "limit": 1})
    assert (page.json()["data"], page.json()["has_more"]) == ([messages["data"][1]], False)


async def test_a_streamed_chat_is_stored_as_a_whole_one(stored: httpx.AsyncClient) -> None:
    sent = {**ASKED, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 1}
    chunks = events((await stored.post(URL, json=sent)).text)
    whole = await ask(stored, n=2, logprobs=True, top_logprobs=1)
    kept = (await stored.get(f"{URL}/{chunks[0]['id']}")).json()
    assert (kept["choices"], kept["usage"]) == (whole["choices"], whole["usage"])


async def test_parts_calls_and_their_results_are_kept(stored: httpx.AsyncClient) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "snow"},
    ]
    id = (await ask(stored, messages=messages))["id"]
    asked, called, result = (await stored.get(f"{URL}/{id}/messages")).json()["data"]
    assert (asked["content"], asked["content_parts"][0]["text"], asked["name"]) == (None, "Hi", "me")
    assert called["tool_calls"][0]["function"] == call["function"]
    assert (result["tool_call_id"], result["content"]) == ("c1", "snow")


async def test_lists_filter_and_turn_pages(stored: httpx.AsyncClient) -> None:
    made = [(await ask(stored, metadata={"turn": str(n % 2), "all": "x"}))["id"] for n in range(5)]
    await stored.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2})
    assert await ids(stored) == made
    assert await ids(stored, order="desc", limit=2) == made[:2:-1]
    assert await ids(stored, after=made[1], limit=2) == made[2:4]
    assert await ids(stored, order="desc", after=made[2]) == made[1::-1]
    assert await ids(stored, model="fake", **{"metadata[turn]": "0", "metadata[all]": "x"}) == made[::2]
    assert await ids(stored, model="other") == await ids(stored, **{"metadata[turn]": "2"}) == []
    assert (await stored.get(URL, params={"limit": 2})).json()["has_more"]
    for query in (
        {"after": "chatcmpl-x"},
        {"limit": 0},
        {"order": "x"},
        {"order": ""},
        {"colour": "x"},
        {"metadata": "x"},
    ):
        answer = await stored.get(URL, params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404 if "after" in query else 400, *query)


async def test_labels_are_changed_and_chats_deleted(stored: httpx.AsyncClient) -> None:
    body = await ask(stored, metadata={"a": "b"})
    url = f"{URL}/{body['id']}"
    for metadata in ({"c": "d"}, None):
        changed = await stored.post(url, json={"metadata": metadata})
        assert changed.json() == (await stored.get(url)).json() == {**body, "metadata": metadata or {}}
    assert (await stored.post(url, json={"metadata": {"a": "x" * 5000}})).status_code == 400
    assert (await stored.post(url, json={})).status_code == 400
    assert (await stored.delete(url)).json() == {
        "id": body["id"], "object": "chat.completion.deleted", "deleted": True
    }  # fmt: skip
    for answer in (
        await stored.get(url),
        await stored.get(f"{url}/messages"),
        await stored.post(url, json={"metadata": {}}),
        await stored.delete(url),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "completion_not_found")


async def test_a_chat_is_no_response_nor_a_response_a_chat(stored: httpx.AsyncClient) -> None:
    chat = (await ask(stored))["id"]
    response = (await stored.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2})).json()["id"]
    assert (await stored.get(f"/v1/responses/{chat}")).status_code == 404
    assert (await stored.delete(f"/v1/responses/{chat}")).status_code == 404
    assert (await stored.get(f"{URL}/{response}")).status_code == 404
    assert (await stored.delete(f"{URL}/{response}")).status_code == 404


async def test_only_what_is_asked_for_is_stored(stored: httpx.AsyncClient, service: FakeService) -> None:
    for more in ({"store": False}, {"store": None}):
        await ask(stored, **more)
    assert await ids(stored) == []
    async with app_of(service, None) as client:
        refused = await client.post(URL, json=ASKED)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert (await client.post(URL, json={**ASKED, "store": False})).status_code == 200
        assert (await client.get(URL)).status_code == 503


async def test_a_stream_that_cannot_be_stored_says_so(
    stored: httpx.AsyncClient, store: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(chat: object) -> None:
        raise StorageUnavailable("The disk is full.")

    monkeypatch.setattr(store, "add_chat", full)
    text = (await stored.post(URL, json={**ASKED, "stream": True})).text
    assert json.loads(text.split("data: ")[-2])["error"]["message"] == "The disk is full."
    assert text.endswith("data: [DONE]\n\n")
    assert (await stored.post(URL, json=ASKED)).status_code == 503


async def test_an_id_of_the_client_names_no_stored_answer(store: ResponseStore, tmp_path: Path) -> None:
    """The same label from two keys, and twice from one."""
    keys = {"server": ServerSettings(api_key=KEYS)}
    handle = ServiceHandle(FakeService())  # type: ignore[arg-type]
    handle.responses = store
    transport = httpx.ASGITransport(app=create_app(handle, Settings(**keys)), raise_app_exceptions=False)
    made: dict[str, str] = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for key in (*KEYS, *KEYS):
            headers = {"authorization": f"Bearer {key}", "x-request-id": "mine"}
            for url, body in ((URL, ASKED), ("/v1/responses", {"input": key, "max_output_tokens": 2})):
                answer = await client.post(url, json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                made[f"{url}/{answer.json()['id']}"] = key
        assert len(made) == 8
        for url, owner in made.items():
            for key in KEYS:
                answer = await client.get(url, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == (200 if key == owner else 404)


async def test_the_clients_methods(stored: httpx.AsyncClient) -> None:
    async with openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="k", http_client=stored) as client:
        chats = client.chat.completions
        made = await chats.create(model="fake", messages=HI, max_tokens=2, store=True, metadata={"a": "b"})  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert (await chats.retrieve(made.id)).choices == made.choices
        assert [one.id async for one in chats.list(metadata={"a": "b"}, model="fake")] == [made.id]
        assert [one.content async for one in chats.messages.list(made.id)] == ["Be brief.", "Hi"]
        assert (await chats.update(made.id, metadata={"a": "c"})).id == made.id
        assert (await chats.delete(made.id)).deleted
