"""Rows of feedback: what people said of answers. Retention deletes the oldest: by age, by the number of a key's rows,
and by the bytes of all.

A row holds the texts that its sender put into it, and no others: nothing of a request or an answer is looked up.
"""

import sqlite3
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Literal

import msgspec
from msgspec import Struct

from runtime.errors import NotFound
from runtime.support.database import Database, RowRetention, select_page, usage_schema
from settings.api import FeedbackSettings

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    created_at REAL NOT NULL,
    model TEXT,
    data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS feedback_by_age ON feedback (created_at);
{usage_schema("feedback", "owner", ("data",))}
"""

MAX_NUMBER = 2**62
"""Above the number of every row."""


class FeedbackMessage(Struct, frozen=True, kw_only=True):
    """One message of the chat that an answer belongs to."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class Feedback(Struct, kw_only=True, omit_defaults=True):
    """One feedback. The texts are those of its sender."""

    id: str = ""
    created_at: float = 0.0
    """Seconds since the epoch."""
    key: str = ""
    """Name of the key that it came with; "" without keys."""
    answer_id: str
    """Id of the answer: that of its body, or its X-Request-Id."""
    model: str | None = None
    score: float | None = None
    """From -1, useless, to 1, as wanted."""
    comment: str | None = None
    messages: list[FeedbackMessage] | None = None
    """The chat before the answer."""
    answer: str | None = None
    correction: str | None = None
    """The answer as it should have been."""
    metadata: dict[str, str] | None = None


class FeedbackStore:
    """Stored feedback. Its methods are awaited on the event loop; the database has a thread of its own."""

    def __init__(
        self,
        database: Database,
        settings: FeedbackSettings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._clock = clock
        self._retention = RowRetention(
            "feedback",
            "owner",
            keep_seconds=settings.keep_feedback,
            max_rows=settings.max_feedback,
            max_bytes=settings.max_feedback_total,
            clock=clock,
        )

    async def add(self, feedback: Feedback, owner: str) -> Feedback:
        """Store it, with an id and the time, and delete what retention says. `owner`: label of its sender's key. Raises
        `StorageUnavailable`, and `PayloadTooLarge` for one that is larger than all may be together."""
        stored = msgspec.structs.replace(feedback, id=f"feedback-{uuid.uuid4().hex}", created_at=self._clock())
        data = msgspec.json.encode(stored)
        self._retention.check(len(data))

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO feedback (id, owner, created_at, model, data) VALUES (?, ?, ?, ?, ?)",
                (stored.id, owner, stored.created_at, stored.model, data),
            )
            self._retention.delete(connection)

        await self._database.call(work)
        return stored

    async def page(
        self, *, model: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Feedback], bool]:
        """At most `limit` rows after the one with the id `after`, and whether there are more. `model`: those about this
        model. Raises `NotFound`, `StorageUnavailable`."""

        def work(connection: sqlite3.Connection) -> tuple[list[Feedback], bool]:
            if after is not None:
                _require(connection, after)
            where = {} if model is None else {"model = ?": (model,)}
            rows, more = select_page(
                connection, "feedback", where, owner=None, after=after, limit=limit, newest_first=newest_first
            )
            return [_decode(row) for row in rows], more

        return await self._database.call(work)

    async def all(
        self, *, model: str | None, after: str | None = None, newest_first: bool, size: int
    ) -> AsyncGenerator[list[Feedback], None]:
        """All rows, or those after the one with the id `after`, up to `size` at once; rows that are added or deleted
        meanwhile do no harm. Raises `NotFound`, the generator `StorageUnavailable`."""
        last = MAX_NUMBER if newest_first else 0
        if after is not None:
            last = await self._database.call(partial(_require, id=after))
        return self._from(last, model=model, newest_first=newest_first, size=size)

    async def _from(
        self, last: int, *, model: str | None, newest_first: bool, size: int
    ) -> AsyncGenerator[list[Feedback], None]:
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where = f"number {sign} ? AND (? IS NULL OR model = ?)"
        query = f"SELECT * FROM feedback WHERE {where} ORDER BY number {order} LIMIT ?"
        while rows := await self._database.call(partial(_select, query, (last, model, model, size))):
            yield [_decode(row) for row in rows]
            last = rows[-1]["number"]

    async def delete(self, id: str) -> None:
        """Raises `NotFound`, `StorageUnavailable`."""

        def work(connection: sqlite3.Connection) -> None:
            _require(connection, id)
            connection.execute("DELETE FROM feedback WHERE id = ?", (id,))

        await self._database.call(work)

    async def due(self) -> int:
        """Number of rows that retention deletes. Raises `StorageUnavailable`."""
        return await self._database.call(self._retention.count)

    async def prune(self) -> int:
        """Delete what retention says; the number of rows. Raises `StorageUnavailable`."""
        return await self._database.call(self._retention.delete)


def _decode(row: sqlite3.Row) -> Feedback:
    return msgspec.json.decode(row["data"], type=Feedback)


def _select(query: str, values: tuple[object, ...], connection: sqlite3.Connection) -> list[sqlite3.Row]:
    return connection.execute(query, values).fetchall()


def _require(connection: sqlite3.Connection, id: str) -> int:
    """The number of a row."""
    row = connection.execute("SELECT number FROM feedback WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise NotFound(f"There is no feedback `{id[:100]}`.", code="feedback_not_found")
    return int(row["number"])
