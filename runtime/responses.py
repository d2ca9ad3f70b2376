"""Rows of stored responses. Each belongs to the holder of the key that made it; others do not see it.

A conversation is a chain: each response names the one before it. Retention deletes the oldest: by age,
by the number of a key's rows, and by the bytes of all.
"""

import sqlite3
import time
from collections.abc import Callable

from msgspec import Struct

from runtime.errors import InvalidRequest, NotFound
from runtime.support.database import Database, RowRetention, usage_schema
from settings.schema import ResponseSettings

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    created_at REAL NOT NULL,
    previous_id TEXT,
    input BLOB NOT NULL,
    response BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
{usage_schema("responses", "tenant", ("input", "response"))}
"""

MAX_CHAIN = 1000
"""Most responses of a conversation."""

_PUT = """
INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET input = excluded.input, response = excluded.response
"""
_COLUMNS = "id, tenant, created_at, previous_id, input, response"


class StoredResponse(Struct, frozen=True):
    """One response. `input` and `response` are JSON: the items that the client sent, and the answer."""

    id: str
    tenant: str
    created_at: float
    previous_id: str | None
    input: bytes
    response: bytes


class ResponseStore:
    """Stored responses. Its methods are awaited on the event loop; the database has a thread of its own."""

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


def _get(connection: sqlite3.Connection, id: str, tenant: str, param: str = "response_id") -> StoredResponse:
    query = f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND tenant = ?"
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
