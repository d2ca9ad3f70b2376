"""/admin/status: the whole state, its changes as a stream, and how many may follow it."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from runtime.adapters.store import AdapterRecord
from runtime.api.admin import status
from runtime.api.admin.overview import OverviewHistory
from runtime.api.app import create_app
from runtime.api.handle import Api, ServiceHandle
from runtime.api.swap import ModelSwap, SwapFailure
from runtime.errors import StorageUnavailable
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.admin.conftest import RECIPE, admin, start_job, with_keys
from tests.api.fakes import FakeService
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


class FakeLibrary:
    """Adapters by name, none of them with a version to show."""

    shared_problem = None

    def __init__(self) -> None:
        self.changes = 0
        self.records: list[AdapterRecord] = []

    def list(self) -> list[AdapterRecord]:
        return self.records

    def revision(self, name: str) -> None:
        return None

    def add(self, name: str) -> None:
        record = SimpleNamespace(name=name, served=True, current=1, created=1.0, aliases=(), canary=None, versions={})
        self.records.append(record)  # type: ignore[arg-type]
        self.changes += 1


class Following:
    """A stream of changes, and the clock that drives it."""

    def __init__(self, world: World | None, owner: str | None = None) -> None:
        self.service = FakeService()
        self.library = FakeLibrary()
        self.service.adapters = self.library  # type: ignore[assignment]
        handle = ServiceHandle(self.service, world.manager if world else None)  # type: ignore[arg-type]
        self.handle = handle
        self.history = OverviewHistory(handle)
        self._changes = status._Changes(Api(handle, Settings(), None), owner)  # type: ignore[arg-type]
        self._seen: list[tuple[str, Any]] = []
        self._time = 0.0
        self.task: asyncio.Task[None] | None = None

    async def begin(self) -> dict[str, Any]:
        """The data of the first event."""
        found = await self._changes.status(self.history)

        async def follow() -> None:
            async for event in status._events(self.history, self._changes, found):
                name, data = event.decode().strip().split("\n")
                self._seen.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))

        self.task = asyncio.create_task(follow())
        return (await self._until_quiet())["status"]

    async def tick(self) -> dict[str, Any]:
        """Events of the next two seconds, by name."""
        self._time += 2
        self.history.take(self._time)
        return await self._until_quiet()

    async def _until_quiet(self) -> dict[str, Any]:
        assert self.task is not None
        while self.history._next is None and not self.task.done():  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.002)
        seen, self._seen = dict(self._seen), []
        return seen


async def test_changes_come_and_nothing_comes_twice(by_hand: World) -> None:
    following = Following(by_hand)
    following.library.add("old")
    first = await following.begin()
    assert (first["model"], first["ready"], first["sample"]) == ("fake", True, None)
    assert first["jobs"] == {"data": []}
    assert [one["name"] for one in first["adapters"]["adapters"]] == ["old"]
    assert (await following.tick()).keys() == {"sample"}
    job = await by_hand.submit("name: shop", "steps: 3")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    found = await following.tick()
    assert found.keys() == {"sample", "jobs"}
    assert [(one["id"], one["status"]) for one in found["jobs"]["data"]] == [(job.id, "running")]
    await by_hand.step()
    following.library.add("new")
    found = await following.tick()
    assert found.keys() == {"sample", "jobs", "adapters"}
    assert found["jobs"]["data"][0]["step"] == 1
    assert [one["name"] for one in found["adapters"]["adapters"]] == ["old", "new"]
    assert (await following.tick()).keys() == {"sample"}
    following.service.ready = False  # the server drains
    await following.tick()
    assert following.task is not None
    assert following.task.done()


async def test_moves_to_other_models_are_followed_though_no_model_is_there() -> None:
    following = Following(None)
    swapper = following.handle.swapper = SimpleNamespace(last=None)
    assert (await following.begin())["swap"] is None
    await following.tick()
    swap = swapper.last = ModelSwap(model="words@1", previous="fake", mode="drain", status="draining", started_at=1.0)
    found = await following.tick()
    assert (found["swap"]["status"], found["swap"]["model"]) == ("draining", "words@1")
    assert (await following.tick()).keys() == {"sample"}
    service, following.handle.service = following.handle.service, None
    swap.status = "loading"
    found = await following.tick()
    assert (found["swap"]["status"], found["sample"]["running"]) == ("loading", 0)
    following.handle.service = service
    swap.status, swap.error = "failed", SwapFailure(code="model_not_loaded", message="No such model.")
    assert (await following.tick())["swap"]["error"]["message"] == "No such model."


async def test_jobs_that_cannot_be_read_now_come_later(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    following = Following(by_hand)
    await following.begin()
    job = await by_hand.submit("name: shop", "steps: 3")
    page = by_hand.manager.store.page

    async def fail(**query: Any) -> Any:
        raise StorageUnavailable("The database is locked.")

    monkeypatch.setattr(by_hand.manager.store, "page", fail)
    assert (await following.tick()).keys() == {"sample"}
    monkeypatch.setattr(by_hand.manager.store, "page", page)
    assert [one["id"] for one in (await following.tick())["jobs"]["data"]] == [job.id]


async def test_a_server_without_state_has_neither_jobs_nor_adapters() -> None:
    following = Following(None)
    following.service.adapters = None
    first = await following.begin()
    assert (first["jobs"], first["adapters"]) == (None, None)
    assert (await following.tick()).keys() == {"sample"}


async def test_each_key_sees_its_own_jobs(by_hand: World, tmp_path: Path) -> None:
    client = with_keys(by_hand, tmp_path)
    job = await start_job(client, RECIPE, authorization="Bearer ann")
    for name, seen in (("ann", [job]), ("bob", []), ("root", [job])):
        found = (await client.get("/admin/status", headers={"authorization": f"Bearer {name}"})).json()
        assert [one["id"] for one in found["jobs"]["data"]] == seen, name


async def test_followers_are_bounded_and_queries_are_refused() -> None:
    client = admin(None)
    answer = await client.get("/admin/status?limit=3")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
    app = create_app(FakeService(), Settings(server=ServerSettings(max_event_streams=2)))  # type: ignore[arg-type]
    app.state.api.event_streams = 2
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as full:
        answer = await full.get("/admin/status", headers={"accept": "text/event-stream"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        assert (await full.get("/admin/status")).status_code == 200
