"""Batches over a fake server: retries, bounds, stops and starts, all of which leave every line answered once."""

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.batches import recovery, run
from runtime.batches import store as batch_store
from runtime.batches.manager import BatchManager
from runtime.batches.records import RECORD, STATES, TRANSITIONS, Answer, Batch, window_seconds
from runtime.errors import Conflict, NotFound, TooManyRequests
from runtime.files import recovery as file_recovery
from runtime.files import store as file_store
from runtime.files.library import FileLibrary
from runtime.support import failpoints
from runtime.support.database import Database
from settings.api import FileSettings

pytestmark = pytest.mark.anyio

ENDPOINT = "/v1/completions"


class FakeServer:
    """Answers each request with its prompt, and counts."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.refuse: Callable[[str], Answer | None] = lambda prompt: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, path: str, body: bytes, *, owner: str) -> Answer:
        assert (path, owner) == (ENDPOINT, "ann")
        prompt = json.loads(body)["prompt"]
        self.asked[prompt] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
            if (refusal := self.refuse(prompt)) is not None:
                return refusal
            self.answered[prompt] += 1
            return Answer(status=200, body=msgspec.json.encode({"text": prompt}), request_id="r")
        finally:
            self.under_way -= 1


class State:
    """A state directory, over which managers come and go."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.settings = FileSettings(batch_concurrency=4, **settings)
        self.database = Database(path, [file_store.SCHEMA, batch_store.SCHEMA])
        self.server = FakeServer()

    async def start(self) -> None:
        self.files = FileLibrary(self.database, self.path, self.settings)
        await self.files.start()
        self.manager = BatchManager(self.database, self.path, self.files, self.settings, max_line=100_000)
        await self.manager.start(self.server)

    async def stop(self) -> None:
        await self.manager.stop()

    async def create(self, count: int, *, seconds: int = 3600) -> Batch:
        lines = [
            {"custom_id": f"id-{n}", "method": "POST", "url": ENDPOINT, "body": {"prompt": str(n)}}
            for n in range(count)
        ]
        async with self.files.receiving() as upload:
            await upload.write(b"".join(msgspec.json.encode(one) + b"\n" for one in lines))
            file = await self.files.keep(upload, owner="ann", purpose="batch", filename="x", lifetime=None)
        return await self.manager.create(
            owner="ann",
            endpoint=ENDPOINT,
            input_file_id=file.id,
            completion_window="1h",
            window_seconds=seconds,
            metadata=None,
            output_lifetime=None,
        )

    async def now(self, batch: Batch) -> Batch:
        return self.manager.current(await self.manager.store.get(batch.id, "ann"))

    async def until(self, batch: Batch, done: Callable[[Batch], bool]) -> Batch:
        async with asyncio.timeout(60):
            while not done(found := await self.now(batch)):  # noqa: ASYNC110  # what others change
                await asyncio.sleep(0.001)
        return found

    async def ended(self, batch: Batch) -> Batch:
        return await self.until(batch, lambda found: found.ended)

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = await self.files.store.get(file_id, "ann")
        text = self.files.path(file).read_bytes()
        assert len(text) == file.bytes
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(tmp_path, max_batches=3)
    await state.start()
    yield state
    failpoints.configure("")
    state.server.gate.set()
    await state.stop()
    state.database.close()


async def check_complete(state: State, batch: Batch, count: int) -> None:
    done = await state.ended(batch)
    assert done.status == "completed"
    found = [line["custom_id"] for line in await state.lines(done.output_file_id)]
    assert sorted(found) == sorted(f"id-{n}" for n in range(count))
    assert (done.total, done.completed, done.failed) == (count, count, 0)


async def test_concurrency_is_bounded_over_all_batches(state: State) -> None:
    batches = [await state.create(30) for _ in range(3)]
    for batch in batches:
        await check_complete(state, batch, 30)
    assert state.server.most == 4


async def test_a_new_process_answers_what_is_left(state: State) -> None:
    batch = await state.create(50)
    await state.until(batch, lambda now: now.completed >= 10)
    for _ in range(3):
        before = (await state.now(batch)).completed
        await state.stop()
        await state.start()
        await state.until(batch, lambda now, before=before: now.completed > before or now.ended)  # type: ignore[misc]
    await check_complete(state, batch, 50)


async def test_a_full_server_is_waited_for(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MIN_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(run, "MAX_PAUSE_SECONDS", 0.002)
    full = Answer(status=429, body=b"{}", request_id="r", retry_after=1.0)
    state.server.refuse = lambda prompt: full if state.server.asked[prompt] < 50 else None
    await check_complete(state, await state.create(3), 3)


async def test_a_server_that_stays_unavailable_is_an_error(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MIN_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(run, "MAX_PAUSE_SECONDS", 0.002)
    down = Answer(status=503, body=b"{}", request_id="r")
    state.server.refuse = lambda prompt: down if prompt == "1" else None
    done = await state.ended(await state.create(3))
    assert (done.completed, done.failed) == (2, 1)
    [line] = await state.lines(done.error_file_id)
    assert (line["custom_id"], line["response"]["status_code"]) == ("id-1", 503)


async def test_cancelling_stops_what_is_under_way(state: State) -> None:
    state.server.gate.clear()
    batch = await state.create(20)
    await state.until(batch, lambda now: state.server.under_way == 4)
    await state.manager.cancel(batch.id, "ann")
    done = await state.ended(batch)
    assert (done.status, done.completed) == ("cancelled", 0)
    assert state.server.under_way == 0
    assert done.output_file_id is None
    with pytest.raises(Conflict):
        await state.manager.cancel(batch.id, "ann")


async def test_a_cancellation_outlives_the_process(state: State) -> None:
    state.server.gate.clear()
    batch = await state.create(20)
    await state.until(batch, lambda now: state.server.under_way == 4)
    await state.manager.stop()
    await state.manager.store.cancel(batch.id, "ann")
    await state.stop()
    await state.start()
    assert (await state.ended(batch)).status == "cancelled"


async def test_time_that_runs_out_while_there_is_no_process(state: State) -> None:
    batch = await state.create(20, seconds=1)
    state.server.gate.clear()
    await state.stop()
    while time.time() <= batch.expires_at:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await state.start()
    done = await state.ended(batch)
    assert done.status == "expired"
    written = await state.lines(done.output_file_id) + await state.lines(done.error_file_id)
    assert sorted(line["custom_id"] for line in written) == sorted(f"id-{n}" for n in range(20))


async def test_too_many_batches(state: State) -> None:
    state.server.gate.clear()
    for _ in range(3):
        await state.create(1)
    with pytest.raises(TooManyRequests):
        await state.create(1)


async def test_an_error_inside_fails_the_batch_and_keeps_its_answers(state: State) -> None:
    failpoints.configure("batches.before_answer=raise:10")
    done = await state.ended(await state.create(20))
    assert done.status == "failed"
    assert done.errors[0].code == "internal_error"
    assert done.completed == len(await state.lines(done.output_file_id)) >= 1


async def test_folders_without_a_row_are_moved_aside(state: State) -> None:
    batch = await state.create(3)
    await state.ended(batch)
    await state.stop()
    (state.path / "batches" / "batch_unknown").mkdir()
    await state.start()
    assert [path.name for path in (state.path / "batches").iterdir()] == [batch.id]
    assert list((state.path / "lost+found").rglob("batch_unknown"))


async def test_a_batch_s_folder_goes_with_its_row(state: State) -> None:
    """Deleted outputs leave the record; retention deletes the rest, but not while an output is used."""
    old, used, young = [await state.ended(await state.create(3)) for _ in range(3)]
    assert old.output_file_id is not None
    await state.files.delete(old.output_file_id, "ann")
    assert [path.name for path in (state.path / "batches" / old.id).iterdir()] == [RECORD]
    long_ago = "UPDATE batches SET completed_at = completed_at - 100 WHERE id != ?"
    await state.database.call(lambda c: c.execute(long_ago, (young.id,)))
    assert used.output_file_id is not None
    await state.database.call(lambda c: file_store.hold(c, str(used.output_file_id), "batch_other"))
    assert await state.manager.prune() == []
    state.manager._settings = FileSettings(keep_batches=50.0)
    assert await state.manager.due() == [old.id]
    assert await state.manager.prune() == [old.id]
    assert {path.name for path in (state.path / "batches").iterdir()} == {used.id, young.id}
    await state.database.call(lambda c: file_store.release(c, "batch_other"))
    stored = state.files.used_bytes
    output = await state.files.store.get(used.output_file_id, "ann")
    assert await state.manager.prune() == [used.id]
    assert state.files.used_bytes == stored - output.bytes
    with pytest.raises(NotFound):
        await state.files.store.get(used.output_file_id, "ann")
    assert [path.name for path in (state.path / "batches").iterdir()] == [young.id]
    await state.stop()
    await state.start()
    assert not list((state.path / "lost+found").rglob("batch_*"))


async def test_batches_of_a_lost_database_are_made_again(state: State) -> None:
    """One that has ended, and one at work, which goes on with what is not answered; a third lacks its input."""
    done = await state.ended(await state.create(5))
    half, without = await state.create(40), await state.create(7)
    await state.until(half, lambda now: now.completed >= 9)
    state.server.gate.clear()
    await state.stop()
    state.server.gate.set()
    assert done.output_file_id is not None
    before = await state.lines(done.output_file_id)
    for table in ("batches", "file_uses", "files"):
        await state.database.call(lambda c, table=table: c.execute(f"DELETE FROM {table}"))  # type: ignore[misc]
    shutil.rmtree(state.path / "files" / without.input_file_id)
    await state.database.call(lambda c: file_recovery.adopt(c, state.path))
    made, problems = await state.database.call(lambda c: recovery.adopt(c, state.path))
    assert set(made) == {done.id, half.id}
    assert [problem.partition(": ")[0] for problem in problems] == [f"batches/{without.id}"]
    assert await state.database.call(lambda c: recovery.adopt(c, state.path)) == ([], problems)
    answered = set(state.server.answered)
    await state.start()
    assert await state.now(done) == done
    assert await state.lines(done.output_file_id) == before
    await check_complete(state, half, 40)
    assert sum(state.server.answered.values()) <= len(answered) + 40
    assert [path.name for path in (state.path / "lost+found").glob("*/batches/*")] == [without.id]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("90s", 90), ("5m", 300), ("30d", 30 * 86400), ("31d", None), ("0h", None), ("h", None),
     ("24", None), ("24h ", None), ("-1h", None), ("1.5h", None), ("9999999999h", None)],
)  # fmt: skip
def test_windows(text: str, seconds: int | None) -> None:
    assert window_seconds(text) == seconds


def test_every_state_leads_to_an_end() -> None:
    assert TRANSITIONS.keys() == set(STATES)
    reached = {state for state, following in TRANSITIONS.items() if not following}
    assert reached == {"completed", "failed", "expired", "cancelled"}
    for _ in STATES:
        reached |= {state for state, following in TRANSITIONS.items() if following & reached}
    assert reached == set(STATES)
