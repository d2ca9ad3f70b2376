"""A job's events: as a list, and as a stream that ends with the job and can be taken up again."""

import asyncio
import json
from typing import Any

import pytest

from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.admin.conftest import admin, app_of, start_job
from tests.api.fakes import Exchange
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream", "host": "127.0.0.1"}


def parse(text: str) -> list[tuple[int, Any]]:
    """(id, data) of each event; the end is (0, "[DONE]")."""
    found: list[tuple[int, Any]] = []
    for block in filter(None, text.split("\n\n")):
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        done = fields["data"] == "[DONE]"
        found.append((0, "[DONE]") if done else (int(fields["id"]), json.loads(fields["data"])))
    return found


async def test_as_a_list(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    page = (await client.get(f"/admin/jobs/{job_id}/events?limit=3")).json()
    assert ([event["id"] for event in page["data"]], page["has_more"]) == (["1", "2", "3"], True)
    assert page["data"][0]["object"] == "job.event"
    rest = (await client.get(f"/admin/jobs/{job_id}/events?after=3")).json()
    assert rest["has_more"] is False
    assert [event["id"] for event in rest["data"]] == [str(n) for n in range(4, 4 + len(rest["data"]))]
    steps = [event for event in rest["data"] if event["type"] == "metrics"]
    assert [(event["data"]["type"], event["data"]["step"]) for event in steps] == [
        ("step", 1), ("step", 2), ("step", 3), ("eval", 3),
    ]  # fmt: skip


async def test_the_stream_of_an_ended_job_is_all_of_it_and_an_end(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    answer = await client.get(f"/admin/jobs/{job_id}/events", headers=SSE)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = parse(answer.text)
    assert end == (0, "[DONE]")
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][1]["data"]["status"] == "succeeded"


async def test_it_goes_on_from_the_last_event_id(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    answer = await client.get(f"/admin/jobs/{job_id}/events", headers={**SSE, "last-event-id": "4"})
    assert parse(answer.text)[0][0] == 5
    answer = await client.get(f"/admin/jobs/{job_id}/events", headers={**SSE, "last-event-id": "999"})
    assert parse(answer.text) == [(0, "[DONE]")]


@pytest.mark.parametrize(
    "value", ["x", "-1", "1" * 30, "0" * 20 + "9" * 30, "0" * 5000, "0" * 30, "٣", "", "1.0", "9" * 16, "1,2"]
)
async def test_a_last_event_id_that_is_no_number(world: World, value: str) -> None:
    job_id = await start_job(admin(world))
    raw = [(b"last-event-id", value.encode())]
    answer = await admin(world).get(f"/admin/jobs/{job_id}/events", headers=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"


def text_of(exchange: Exchange) -> str:
    return b"".join(message.get("body", b"") for message in exchange.sent[1:]).decode()


async def test_events_come_as_they_happen(by_hand: World) -> None:
    app = app_of(by_hand)
    job_id = await start_job(admin(by_hand))
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    exchange = Exchange(app, f"/admin/jobs/{job_id}/events", b"", method="GET", headers=SSE)
    for step in (1, 2, 3):
        await by_hand.step()
        assert f"Step {step}: loss" in text_of(exchange)
    await by_hand.until(job_id, "succeeded")
    await asyncio.wait_for(exchange.task, 5)
    assert parse(text_of(exchange))[-1] == (0, "[DONE]")


async def test_silence_is_broken_by_comments(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.api.admin.jobs.BEAT", 0.005)
    job_id = await start_job(admin(by_hand))
    exchange = Exchange(app_of(by_hand), f"/admin/jobs/{job_id}/events", b"", method="GET", headers=SSE)
    for _ in range(3):
        exchange.arrived.clear()
        await asyncio.wait_for(exchange.arrived.wait(), 5)
    assert ": still here\n\n" in text_of(exchange)
    exchange.leave()
    await asyncio.wait_for(exchange.task, 5)


async def test_a_reader_that_leaves_leaves_nothing_behind(by_hand: World) -> None:
    job_id = await start_job(admin(by_hand))
    exchanges = [
        Exchange(app_of(by_hand), f"/admin/jobs/{job_id}/events", b"", method="GET", headers=SSE) for _ in range(5)
    ]
    await by_hand.settle()
    for exchange in exchanges:
        exchange.leave()
        await asyncio.wait_for(exchange.task, 5)
    assert by_hand.manager.feed._waiting == {}


async def test_the_stream_ends_with_the_server_but_without_an_end(by_hand: World) -> None:
    job_id = await start_job(admin(by_hand))
    exchange = Exchange(app_of(by_hand), f"/admin/jobs/{job_id}/events", b"", method="GET", headers=SSE)
    await by_hand.settle()
    await by_hand.manager.stop(0.0)
    await asyncio.wait_for(exchange.task, 5)
    assert parse(text_of(exchange))[-1][1] != "[DONE]"


async def test_so_many_may_follow_and_no_more(by_hand: World) -> None:
    app = app_of(by_hand)
    app.state.api.settings = Settings(server=ServerSettings(max_event_streams=3))
    job_id = await start_job(admin(by_hand))
    path = f"/admin/jobs/{job_id}/events"

    async def follow() -> Exchange:
        exchange = Exchange(app, path, b"", method="GET", headers=SSE)
        await by_hand.settle()
        return exchange

    held = [await follow() for _ in range(3)]
    refused = await follow()
    await asyncio.wait_for(refused.task, 5)
    assert refused.status == 429
    assert (b"retry-after", b"5") in refused.sent[0]["headers"]
    as_a_list = Exchange(app, path, b"", method="GET", headers={"host": "127.0.0.1"})
    await asyncio.wait_for(as_a_list.task, 5)
    assert as_a_list.status == 200
    for exchange in held:
        exchange.leave()
        await asyncio.wait_for(exchange.task, 5)
    again = await follow()
    assert again.status == 200
    again.leave()
    await asyncio.wait_for(again.task, 5)
    assert app.state.api.event_streams == 0


async def test_many_events_are_few_queries(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.api.admin.jobs.LOOKS", 5)
    asked = 0
    events = by_hand.manager.store.events

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        return await events(*arguments, **options)

    monkeypatch.setattr(by_hand.manager.store, "events", counted)
    job_id = await start_job(admin(by_hand))
    exchange = Exchange(app_of(by_hand), f"/admin/jobs/{job_id}/events", b"", method="GET", headers=SSE)
    await by_hand.settle()
    for _ in range(50):
        by_hand.manager.feed.touch(job_id)
        await by_hand.settle()
    assert asked <= 6
    exchange.leave()
    await asyncio.wait_for(exchange.task, 5)
