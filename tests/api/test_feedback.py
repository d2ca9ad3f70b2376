"""/v1/feedback and /admin/feedback: what is stored, what is refused, and rows to train on."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.feedback import SCHEMA, FeedbackStore
from runtime.support.database import Database
from settings.api import FeedbackSettings, LimitSettings, ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio

CHAT = [{"role": "user", "content": "What is an eft?"}]
EXPORT = {"accept": "application/jsonl"}


def client_with(store: FeedbackStore | None, settings: Settings, **headers: str) -> httpx.AsyncClient:
    handle = ServiceHandle(FakeService())  # type: ignore[arg-type]
    handle.feedback = store
    transport = httpx.ASGITransport(create_app(handle, settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FeedbackStore]:
    database = Database(tmp_path, [SCHEMA])
    yield FeedbackStore(database, FeedbackSettings(keep_feedback=None))
    database.close()


@pytest.fixture
def client(store: FeedbackStore) -> httpx.AsyncClient:
    settings = Settings(feedback=FeedbackSettings(max_feedback_size=2000), limits=LimitSettings(max_messages=3))
    return client_with(store, settings)


async def exported(client: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    answer = await client.get("/admin/feedback", params=query, headers=EXPORT)
    assert answer.headers["content-type"].startswith("application/jsonl")
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_it_is_stored_listed_exported_and_deleted(client: httpx.AsyncClient) -> None:
    given = {"id": "chatcmpl-1", "model": "newts@2", "score": -1, "comment": "too long", "metadata": {"page": "1"}}
    made = (await client.post("/v1/feedback", json=given)).json()
    assert (made["object"], made["answer_id"]) == ("feedback", "chatcmpl-1")
    assert {name: made[name] for name in given if name != "id"} == {name: given[name] for name in given if name != "id"}
    assert made["messages"] is made["answer"] is made["correction"] is None
    await client.post("/v1/feedback", json={"id": "chatcmpl-2", "score": 1})
    listed = (await client.get("/admin/feedback")).json()
    assert [row["answer_id"] for row in listed["data"]] == ["chatcmpl-2", "chatcmpl-1"]
    assert (await client.get("/admin/feedback", params={"model": "newts@2"})).json()["data"] == [made]
    assert await exported(client, model="newts@2") == [made]
    assert (await client.delete(f"/admin/feedback/{made['id']}")).json()["deleted"] is True
    assert (await client.delete(f"/admin/feedback/{made['id']}")).json()["error"]["code"] == "feedback_not_found"
    assert [row["answer_id"] for row in await exported(client)] == ["chatcmpl-2"]


async def test_corrections_are_rows_to_train_on(client: httpx.AsyncClient) -> None:
    correction = {"id": "a", "messages": CHAT, "answer": "A bird.", "correction": "A young newt."}
    await client.post("/v1/feedback", json=correction)
    await client.post("/v1/feedback", json={"id": "b", "messages": CHAT, "correction": "A newt."})
    await client.post("/v1/feedback", json={"id": "c", "score": 1, "messages": CHAT, "answer": "A young newt."})
    rows = await exported(client, format="messages", order="asc")
    assert rows[0] == {"messages": [*CHAT, {"role": "assistant", "content": "A young newt."}]}
    assert [row["messages"][-1]["content"] for row in rows] == ["A young newt.", "A newt."]
    (row,) = await exported(client, format="preferences")
    assert (row["messages"], row["chosen"]["content"], row["rejected"]["content"]) == (CHAT, "A young newt.", "A bird.")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"score": 1}, "id", "id"),
        ({"id": "", "score": 1}, "id", "1 to 512"),
        ({"id": "x" * 513, "score": 1}, "id", "got 513"),
        ({"id": "a"}, "score", "says nothing"),
        ({"id": "a", "comment": ""}, "score", "says nothing"),
        ({"id": "a", "score": 2}, "score", "<= 1"),
        ({"id": "a", "score": "good"}, "score", "str"),
        ({"id": "a", "correction": 3}, "correction", "int"),
        ({"id": "a", "score": 1, "messages": [{"role": "cat", "content": ""}]}, "messages[0].role", "cat"),
        ({"id": "a", "score": 1, "messages": CHAT * 4}, "messages", "at most 3"),
        ({"id": "a", "score": 1, "metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
    ],
)
async def test_bad_feedback(client: httpx.AsyncClient, body: dict[str, Any], param: str, says: str) -> None:
    answer = await client.post("/v1/feedback", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


async def test_feedback_that_is_too_large(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/feedback", json={"id": "a", "comment": "x" * 2000})
    assert answer.status_code == 413
    assert "max_feedback_size" in answer.json()["error"]["message"]


async def test_forms_of_exports(client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin/feedback?format=csv", headers=EXPORT)).json()["error"]["param"] == "format"
    assert "jsonl" in (await client.get("/admin/feedback?format=messages")).json()["error"]["message"]
    assert (await client.get("/admin/feedback?after=nothing")).status_code == 404
    assert await exported(client) == []


async def test_pages_of_exports(client: httpx.AsyncClient) -> None:
    ids = [(await client.post("/v1/feedback", json={"id": f"{n}", "score": 1})).json()["id"] for n in range(5)]
    assert [row["id"] for row in await exported(client, after=ids[3], limit="2")] == [ids[2], ids[1]]
    assert [row["id"] for row in await exported(client, after=ids[2], order="asc")] == ids[3:]
    await client.post("/v1/feedback", json={"id": "b", "messages": CHAT, "correction": "A newt."})
    assert len(await exported(client, format="messages", limit="1", order="asc")) == 1
    answer = await client.get("/admin/feedback?after=gone", headers=EXPORT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "feedback_not_found")
    answer = await client.get("/admin/feedback?limit=0", headers=EXPORT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


async def test_where_none_is_taken(store: FeedbackStore) -> None:
    refused = client_with(store, Settings(feedback=FeedbackSettings(accept_feedback=False)))
    answer = await refused.post("/v1/feedback", json={"id": "a", "score": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "feedback_disabled")
    stateless = client_with(None, Settings())
    answer = await stateless.post("/v1/feedback", json={"id": "a", "score": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")


async def test_the_keys_name_goes_with_it_and_only_admins_read_it(store: FeedbackStore) -> None:
    settings = Settings(server=ServerSettings(api_key=("sk-user",), admin_key=("sk-admin",)))
    user = client_with(store, settings, authorization="Bearer sk-user")
    made = (await user.post("/v1/feedback", json={"id": "a", "score": 1})).json()
    assert made["key"].startswith("key-")
    assert (await user.get("/admin/feedback")).status_code == 403
    admin = client_with(store, settings, authorization="Bearer sk-admin")
    assert (await admin.get("/admin/feedback")).json()["data"] == [made]
