"""The store of feedback: retention, pages, and exports beside changes."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime.errors import NotFound, PayloadTooLarge
from runtime.feedback import SCHEMA, Feedback, FeedbackStore
from runtime.support.database import Database
from settings.api import FeedbackSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path, [SCHEMA])
    yield database
    database.close()


def store_of(
    database: Database, *, rows: int = 99, total: int = 10_000, keep: float | None = None, now: float = 0.0
) -> FeedbackStore:
    settings = FeedbackSettings(keep_feedback=keep, max_feedback=rows, max_feedback_total=total)
    return FeedbackStore(database, settings, clock=lambda: now)


async def fill(store: FeedbackStore, count: int, owner: str = "", **fields: str) -> list[str]:
    return [(await store.add(Feedback(answer_id=str(n), score=1, **fields), owner)).id for n in range(count)]


async def answers(store: FeedbackStore, model: str | None = None, *, newest_first: bool = False) -> list[str]:
    found = await store.all(model=model, newest_first=newest_first, size=2)
    return [row.answer_id async for rows in found for row in rows]


async def test_the_oldest_go_first(database: Database) -> None:
    store = store_of(database, rows=2)
    await fill(store, 4)
    assert await answers(store) == ["2", "3"]
    assert await answers(store, newest_first=True) == ["3", "2"]


async def test_a_key_loses_only_its_own(database: Database) -> None:
    store = store_of(database, rows=2)
    await fill(store, 1, "one", model="one")
    await fill(store, 4, "two")
    assert await answers(store) == ["0", "2", "3"]
    assert (await store_of(database, rows=1).due(), await store_of(database, rows=1).prune()) == (1, 1)
    assert await answers(store) == ["0", "3"]


async def test_the_bytes_of_all_are_bounded(database: Database) -> None:
    """The key that has the most makes room, whichever key sends."""
    size = len(msgspec.json.encode(await store_of(database).add(Feedback(answer_id="0", score=1), "one")))
    store = store_of(database, total=int(4.5 * size))
    await fill(store, 5, "two")
    await fill(store, 1, "one", comment="")
    assert await answers(store) == ["0", "3", "4", "0"]
    fewer = store_of(database, total=int(2.5 * size))
    assert (await fewer.due(), await fewer.due(), await fewer.prune(), await fewer.due()) == (2, 2, 2, 0)
    with pytest.raises(PayloadTooLarge, match=r"feedback.max_feedback_total"):
        await fill(fewer, 1, "two", comment="x" * 3 * size)


async def test_rows_of_an_older_version_count(tmp_path: Path) -> None:
    database = Database(tmp_path, [SCHEMA])
    await fill(store_of(database), 3, "one")
    await database.call(lambda c: c.execute("DELETE FROM feedback_usage"))
    await database.call(lambda c: c.execute("PRAGMA user_version = 3"))
    database.close()
    database = Database(tmp_path, [SCHEMA])
    assert await store_of(database, rows=1).prune() == 2
    database.close()


async def test_those_that_are_too_old_go(database: Database) -> None:
    await fill(store_of(database, now=60.0), 1)
    later = store_of(database, keep=50, now=111.0)
    assert await later.due() == 1
    assert await later.prune() == 1
    assert (await later.due(), await answers(later)) == (0, [])


async def test_pages_and_models(database: Database) -> None:
    store = store_of(database)
    ids = await fill(store, 3)
    await fill(store, 1, model="newts@2")
    rows, more = await store.page(model=None, after=ids[0], limit=2, newest_first=False)
    assert ([row.id for row in rows], more) == (ids[1:3], True)
    rows, more = await store.page(model="newts@2", after=None, limit=2, newest_first=True)
    assert ([row.model for row in rows], more) == (["newts@2"], False)
    assert await answers(store, "newts@2") == ["0"]
    with pytest.raises(NotFound, match="`gone`"):
        await store.page(model=None, after="gone", limit=2, newest_first=True)


async def test_an_export_goes_on_when_its_last_row_is_deleted(database: Database) -> None:
    store = store_of(database)
    ids = await fill(store, 4)
    found = await store.all(model=None, newest_first=False, size=2)
    assert [row.id for row in await anext(found)] == ids[:2]
    await store.delete(ids[1])
    assert [row.id for row in await anext(found)] == ids[2:]
    await found.aclose()
    with pytest.raises(NotFound):
        await store.delete(ids[1])
