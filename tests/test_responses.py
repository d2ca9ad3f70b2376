"""The store of responses: retention, chains, and whose they are."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from runtime import responses as module
from runtime.errors import InvalidRequest, NotFound, PayloadTooLarge
from runtime.responses import SCHEMA, ResponseStore, StoredChat, StoredResponse
from runtime.support.database import FILE, Database
from settings.api import ResponseSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path, [SCHEMA])
    yield database
    database.close()


def response(id: str, *, at: float = 0.0, previous: str | None = None, tenant: str = "") -> StoredResponse:
    return StoredResponse(id=id, tenant=tenant, created_at=at, previous_id=previous, input=b"[]", response=b"{}")


async def test_the_oldest_go_first(database: Database) -> None:
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=2))
    for number in range(4):
        await store.put(response(str(number), at=number))
    for gone in "01":
        with pytest.raises(NotFound):
            await store.get(gone, "")
    assert (await store.get("3", "")).id == "3"


async def test_those_that_are_too_old_go(database: Database) -> None:
    now = 100.0
    store = ResponseStore(database, ResponseSettings(keep_responses=50, max_responses=9), clock=lambda: now)
    await store.put(response("old", at=60))
    now = 111.0
    await store.put(response("new", at=111))
    with pytest.raises(NotFound):
        await store.get("old", "")
    assert (await store.get("new", "")).created_at == 111


async def test_a_key_loses_only_its_own(database: Database) -> None:
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=2))
    await store.put(response("mine", at=0, tenant="one"))
    for number in range(4):
        await store.put(response(str(number), at=number, tenant="two"))
    assert (await store.get("mine", "one")).id == "mine"
    with pytest.raises(NotFound):
        await store.get("1", "two")
    assert (await store.get("2", "two")).id == "2"


async def test_the_bytes_of_all_are_bounded(database: Database) -> None:
    """A response's later state counts instead of its earlier one, and what is deleted does not count."""
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses_total=20))
    await store.put(response("mine", tenant="one"))
    for text in (b"{1}", b"{12}"):
        await store.put(replace(response("a", at=1, tenant="two"), response=text))
    await store.put(replace(response("b", at=2, tenant="two"), response=b"{45678}"))
    await store.delete("b", "two")
    await store.put(replace(response("c", at=3, tenant="two"), response=b"{4567}"))
    assert [(await store.get(id, "two")).id for id in ("a", "c")] == ["a", "c"]
    await store.put(replace(response("c", at=3, tenant="two"), response=b"{4567890}"))
    with pytest.raises(NotFound):
        await store.get("a", "two")
    assert (await store.get("mine", "one")).id == "mine"
    with pytest.raises(PayloadTooLarge, match=r"has 21 bytes.*responses.max_responses_total"):
        await store.put(replace(response("d", tenant="two"), response=b"x" * 19))


async def test_a_chain_is_read_from_its_beginning(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=99))
    for number in range(5):
        await store.put(response(str(number), previous=str(number - 1) if number else None))
    assert [one.id for one in await store.chain("4", "", param="p")] == list("01234")
    monkeypatch.setattr(module, "MAX_CHAIN", 4)
    with pytest.raises(InvalidRequest, match="at most 4"):
        await store.chain("4", "", param="p")
    await store.delete("0", "")
    with pytest.raises(NotFound, match="`0`"):
        await store.chain("3", "", param="p")


async def test_others_see_nothing(database: Database) -> None:
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=9))
    await store.put(response("a", tenant="one"))
    for call in (store.get("a", "two"), store.chain("a", "two", param="p"), store.delete("a", "two")):
        with pytest.raises(NotFound):
            await call
    await store.delete("a", "one")


async def test_what_is_due_goes_without_a_new_response(database: Database) -> None:
    now = 100.0
    store = ResponseStore(database, ResponseSettings(keep_responses=50, max_responses=2), clock=lambda: now)
    for number in range(2):
        await store.put(response(str(number), at=90 + number))
    assert (await store.due(), await store.prune()) == (0, 0)
    fewer = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=1))
    assert (await fewer.due(), await fewer.prune(), await fewer.due()) == (1, 1, 0)
    now = 200.0
    assert (await store.due(), await store.prune()) == (1, 1)
    with pytest.raises(NotFound):
        await store.get("1", "")


def chat(id: str, *, at: float = 0.0, tenant: str = "", **metadata: str) -> StoredChat:
    return StoredChat(id, tenant, at, "m", metadata, messages=b"[]", completion=b"{}")


async def chats_of(store: ResponseStore, tenant: str = "", **metadata: str) -> list[str]:
    found, _ = await store.chats(tenant, model=None, metadata=metadata, after=None, limit=9, newest_first=False)
    return [one.id for one in found]


async def test_chats_fit_into_the_table_of_an_older_version(tmp_path: Path) -> None:
    """Its responses stay, and are no chats."""
    older = SCHEMA.replace(",\n    model TEXT,\n    metadata TEXT", "")
    assert older != SCHEMA
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript(older)
    connection.execute("INSERT INTO responses VALUES ('r', '', 0, NULL, x'5B5D', x'7B7D')")
    connection.execute("PRAGMA user_version = 5")
    connection.commit()
    connection.close()
    for number in range(2):
        database = Database(tmp_path, [SCHEMA])
        store = ResponseStore(database, ResponseSettings(keep_responses=None))
        await store.add_chat(chat(f"c{number}"))
        assert (await store.get("r", "")).input == b"[]"
        assert await chats_of(store) == ["c0", "c1"][: number + 1]
        with pytest.raises(NotFound):
            await store.chat("r", "")
        database.close()


async def test_chats_are_a_keys_own_and_age_with_its_responses(database: Database) -> None:
    """An entry of metadata is found by its key, whatever characters that has."""
    store = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses=2))
    odd = {"a\"b'.c": "%"}
    await store.add_chat(chat("a", at=0, tenant="one"))
    await store.add_chat(chat("b", at=1, tenant="two", **odd))
    assert await chats_of(store, "two", **odd) == ["b"]
    assert await chats_of(store, "two", c="%") == []
    for call in (store.chat("a", "two"), store.delete_chat("a", "two"), store.change_chat("a", "two", {})):
        with pytest.raises(NotFound):
            await call
    for number in range(2):
        await store.put(response(str(number), at=2 + number, tenant="two"))
    assert (await chats_of(store, "one"), await chats_of(store, "two")) == (["a"], [])
    whole = ResponseStore(database, ResponseSettings(keep_responses=None, max_responses_total=3))
    with pytest.raises(PayloadTooLarge):
        await whole.add_chat(chat("c"))


async def test_long_answers_make_short_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAGE_BYTES", 3)
    store = ResponseStore(database, ResponseSettings(keep_responses=None))
    for number in range(3):
        await store.add_chat(chat(f"c{number}", at=number))
    pages, more, after = [], True, None
    while more:
        found, more = await store.chats("", model=None, metadata={}, after=after, limit=9, newest_first=False)
        pages.append([one.id for one in found])
        after = pages[-1][-1]
    assert pages == [["c0", "c1"], ["c2"]]
