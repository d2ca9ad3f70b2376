"""Followers of a job: all get every event, in order, and there is one query for all of them."""

import asyncio

import pytest

from runtime.trainer.jobs import followers as module
from runtime.trainer.jobs.records import Note
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


async def follow(world: World, job_id: str, count: int, *, after: int = 0, limit: int = 500) -> list[int]:
    """The numbers of the events up to `count`, as the event stream reads them."""
    found: list[int] = []
    while not found or found[-1] < count:
        ticket = world.manager.feed.ticket(job_id)
        _, events = await world.manager.tail.events(job_id, after=after, limit=limit)
        found += [event.number for event in events]
        after = found[-1] if found else after
        if not events:
            await world.manager.feed.until(ticket, 5.0)
        ticket.cancel()
    return found


def count_queries(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    queries: list[int] = []
    read = world.manager.store.events

    async def counted(job_id: str, *, after: int, limit: int):  # type: ignore[no-untyped-def]
        queries.append(after)
        return await read(job_id, after=after, limit=limit)

    monkeypatch.setattr(world.manager.store, "events", counted)
    return queries


async def test_followers_share_their_queries(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await by_hand.submit("name: a")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    queries = count_queries(by_hand, monkeypatch)
    begun, notes, readers = 3, 50, 20
    tasks = [asyncio.create_task(follow(by_hand, job.id, begun + notes)) for _ in range(readers)]
    await asyncio.sleep(0.05)
    for number in range(notes):
        await by_hand.manager.store.note(job.id, Note(f"note {number}"))
        await asyncio.sleep(0.002)
    for found in await asyncio.gather(*tasks):
        assert found == list(range(1, begun + notes + 1))
    assert len(queries) <= readers + notes + 2, "and not one of each reader for each event"


async def test_those_who_come_late_or_are_far_behind(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 10)
    job = await by_hand.submit("name: a")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    assert await follow(by_hand, job.id, 3) == [1, 2, 3]
    await asyncio.gather(*(by_hand.manager.store.note(job.id, Note(str(n))) for n in range(60)))
    for after in (0, 3, 20, 55, 62):
        assert await follow(by_hand, job.id, 63, after=after, limit=7) == list(range(after + 1, 64))


async def test_the_job_is_as_new_as_its_events(by_hand: World) -> None:
    job = await by_hand.submit("name: a", "steps: 1")
    await by_hand.until(job.id, "running")
    await by_hand.settle()
    tail = by_hand.manager.tail
    assert (await tail.events(job.id, after=0, limit=500))[0].state == "running"
    await by_hand.step()
    await by_hand.until(job.id, "succeeded")
    found, events = await tail.events(job.id, after=0, limit=500)
    assert found.ended
    assert events[-1].data["status"] == "succeeded"


async def test_only_so_many_jobs_are_kept(by_hand: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JOBS", 2)
    jobs = [await by_hand.submit(f"name: a{n}") for n in range(4)]
    for job in jobs:
        await by_hand.manager.tail.events(job.id, after=0, limit=500)
    assert len(by_hand.manager.tail._windows) == 2
    assert [event.number for event in (await by_hand.manager.tail.events(jobs[0].id, after=0, limit=500))[1]][:2] == [
        1,
        2,
    ]
