"""Rows of stored responses and stored chats. Each belongs to the holder of the key that made it; others do not see it.

A conversation of responses is a chain: each names the one before it. Retention deletes the oldest of both kinds: by
age, by the number of a key's rows, and by the bytes of all.
"""

import sqlite3
import time
from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from runtime.errors import InvalidRequest, NotFound
from runtime.support.database import Database, RowRetention, usage_schema
from settings.api import ResponseSettings

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    created_at REAL NOT NULL,
    previous_id TEXT,
    input BLOB NOT NULL,
    response BLOB NOT NULL,
    model TEXT,
    metadata TEXT
);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
{usage_schema("responses", "tenant", ("input", "response"))}
"""

MAX_CHAIN = 1000
"""Most responses of a conversation."""

MAX_PAGE_BYTES = 8 * 1024 * 1024
"""Bytes of answers that end a page of chats."""

_PUT = """
INSERT INTO responses (id, tenant, created_at, previous_id, input, response) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET input = excluded.input, response = excluded.response
"""
_PUT_CHAT = """
INSERT INTO responses (id, tenant, created_at, input, response, model, metadata) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
# `model` and `metadata` are those of a chat, and NULL in the row of a response.
_COLUMNS = "id, tenant, created_at, previous_id, input, response"
_CHAT_COLUMNS = "id, tenant, created_at, model, metadata, input, response"


class StoredResponse(Struct, frozen=True):
    """One response. `input` and `response` are JSON: the items that the client sent, and the answer."""

    id: str
    tenant: str
    created_at: float
    previous_id: str | None
    input: bytes
    response: bytes


class StoredChat(Struct, frozen=True):
    """One chat. `messages` and `completion` are JSON: the messages that the client sent, as a list, and the answer."""

    id: str
    tenant: str
    created_at: float
    model: str
    metadata: dict[str, str]
    messages: bytes
    completion: bytes


class ResponseStore:
    """Stored responses and chats. Its methods are awaited on the event loop; the database has a thread of its own."""

    def __init__(
        self,
        database: Database,
        settings: ResponseSettings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._retention = RowRetention(
            "responses",
            "tenant",
            keep_seconds=settings.keep_responses,
            max_rows=settings.max_responses,
            max_bytes=settings.max_responses_total,
            clock=clock,
        )

    async def put(self, stored: StoredResponse) -> None:
        """Store a response, or its newer state, and delete what retention says. Raises `StorageUnavailable`, and
        `PayloadTooLarge` for one that is larger than all may be together."""
        self._retention.check(len(stored.input) + len(stored.response))

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                _PUT,
                (stored.id, stored.tenant, stored.created_at, stored.previous_id, stored.input, stored.response),
            )
            self._retention.delete(connection)

        await self._database.call(work)

    async def due(self) -> int:
        """Number of the responses that retention deletes. Raises `StorageUnavailable`."""
        return await self._database.call(self._retention.count)

    async def prune(self) -> int:
        """Delete what retention says; the number of responses. Raises `StorageUnavailable`."""
        return await self._database.call(self._retention.delete)

    async def get(self, id: str, tenant: str) -> StoredResponse:
        """Raises `NotFound`."""
        return await self._database.call(lambda connection: _get(connection, id, tenant))

    async def chain(self, id: str, tenant: str, *, param: str) -> list[StoredResponse]:
        """The conversation that ends with a response, oldest first. Raises `NotFound` for a response that is missing,
        and `InvalidRequest` for a conversation that is too long. `param` is the field that has the id."""

        def work(connection: sqlite3.Connection) -> list[StoredResponse]:
            found = [_get(connection, id, tenant, param)]
            while (before := found[-1].previous_id) is not None:
                if len(found) == MAX_CHAIN:
                    raise InvalidRequest(f"A conversation has at most {MAX_CHAIN} responses.", param=param)
                found.append(_get(connection, before, tenant, param))
            return found[::-1]

        return await self._database.call(work)

    async def delete(self, id: str, tenant: str) -> None:
        """Raises `NotFound`."""

        def work(connection: sqlite3.Connection) -> None:
            _get(connection, id, tenant)
            connection.execute("DELETE FROM responses WHERE id = ?", (id,))

        await self._database.call(work)

    # -- chats -----------------------------------------------------------------------------------------

    async def add_chat(self, chat: StoredChat) -> None:
        """Store a chat, and delete what retention says. Raises as `put`."""
        self._retention.check(len(chat.messages) + len(chat.completion))

        def work(connection: sqlite3.Connection) -> None:
            row = (chat.id, chat.tenant, chat.created_at, chat.messages, chat.completion, chat.model)
            connection.execute(_PUT_CHAT, (*row, _encoded(chat.metadata)))
            self._retention.delete(connection)

        await self._database.call(work)

    async def chat(self, id: str, tenant: str) -> StoredChat:
        """Raises `NotFound`."""
        return await self._database.call(lambda connection: _chat(connection, id, tenant))

    async def chats(
        self,
        tenant: str,
        *,
        model: str | None,
        metadata: Mapping[str, str],
        after: str | None,
        limit: int,
        newest_first: bool,
    ) -> tuple[list[StoredChat], bool]:
        """At most `limit` chats, and whether there are more: chats of `model`, if it is given, that have all entries of
        `metadata`. A page ends with the chat that fills `MAX_PAGE_BYTES`. Raises `NotFound` if there is no chat
        `after`."""

        def work(connection: sqlite3.Connection) -> tuple[list[StoredChat], bool]:
            conditions, values = ["tenant = ?", "metadata IS NOT NULL"], [tenant]
            if model is not None:
                conditions.append("model = ?")
                values.append(model)
            for entry in metadata.items():
                conditions.append("EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?)")
                values += entry
            if after is not None:
                _chat(connection, after, tenant, param="after")
                sign = "<" if newest_first else ">"
                place = "SELECT created_at, rowid FROM responses WHERE id = ?"
                conditions.append(f"(created_at, rowid) {sign} ({place})")
                values.append(after)
            order = "DESC" if newest_first else "ASC"
            ids = f"SELECT rowid FROM responses WHERE {' AND '.join(conditions)}"
            ids += f" ORDER BY created_at {order}, rowid {order} LIMIT ?"
            found = [row[0] for row in connection.execute(ids, (*values, limit + 1)).fetchall()]
            query = f"SELECT {_CHAT_COLUMNS} FROM responses WHERE rowid = ?"
            chats: list[StoredChat] = []
            for number in found[:limit]:
                if sum(len(chat.completion) for chat in chats) >= MAX_PAGE_BYTES:
                    break
                chats.append(_chat_of(connection.execute(query, (number,)).fetchone()))
            return chats, len(found) > len(chats)

        return await self._database.call(work)

    async def change_chat(self, id: str, tenant: str, metadata: dict[str, str]) -> StoredChat:
        """The chat with other metadata. Raises `NotFound`, `StorageUnavailable`."""

        def work(connection: sqlite3.Connection) -> StoredChat:
            changed = replace(_chat(connection, id, tenant), metadata=metadata)
            connection.execute("UPDATE responses SET metadata = ? WHERE id = ?", (_encoded(metadata), id))
            return changed

        return await self._database.call(work)

    async def delete_chat(self, id: str, tenant: str) -> None:
        """Raises `NotFound`."""

        def work(connection: sqlite3.Connection) -> None:
            _chat(connection, id, tenant)
            connection.execute("DELETE FROM responses WHERE id = ?", (id,))

        await self._database.call(work)


def _get(connection: sqlite3.Connection, id: str, tenant: str, param: str = "response_id") -> StoredResponse:
    query = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND tenant = ? AND metadata IS NULL"
    row = connection.execute(query, (id, tenant)).fetchone()
    if row is None:
        raise missing_response(id, param=param)
    return StoredResponse(*row)


def missing_response(id: str, *, param: str) -> NotFound:
    """The error for a response that is not there. `param` is the field that has the id."""
    code = "response_not_found"
    if param == "previous_response_id":
        code = "previous_response_not_found"
    return NotFound(f"There is no response `{id[:100]}`.", param=param, code=code)


def _chat(connection: sqlite3.Connection, id: str, tenant: str, param: str = "completion_id") -> StoredChat:
    query = f"SELECT {_CHAT_COLUMNS} FROM responses WHERE id = ? AND tenant = ? AND metadata IS NOT NULL"
    row = connection.execute(query, (id, tenant)).fetchone()
    if row is None:
        raise NotFound(f"There is no stored chat `{id[:100]}`.", param=param, code="completion_not_found")
    return _chat_of(row)


def _chat_of(row: sqlite3.Row) -> StoredChat:
    id, tenant, created_at, model, metadata, messages, completion = row
    return StoredChat(id, tenant, created_at, model, msgspec.json.decode(metadata), messages, completion)


def _encoded(metadata: dict[str, str]) -> str:
    return msgspec.json.encode(metadata).decode()
