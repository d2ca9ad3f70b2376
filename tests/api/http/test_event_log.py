import asyncio

import pytest

from runtime.api.http.event_log import EventLog, EventLogs

pytestmark = pytest.mark.anyio


async def followed(log: EventLog, start: int = 0) -> list[bytes]:
    return [event async for event in log.follow(start, lambda number: b"lost at %d" % number)]


async def test_followers_get_what_was_and_what_comes() -> None:
    logs = EventLogs(1000)
    log = logs.begin("a")
    logs.append("a", b"0")
    early, late = asyncio.create_task(followed(log)), asyncio.create_task(followed(log, 2))
    for event in (b"1", b"2", b"3"):
        await asyncio.sleep(0)
        logs.append("a", event)
    logs.end("a")
    assert (await early, await late) == ([b"0", b"1", b"2", b"3"], [b"2", b"3"])
    assert await followed(log, 3) == [b"3"]
    assert await followed(log, 9) == []


async def test_the_oldest_that_have_ended_make_room() -> None:
    logs = EventLogs(30)
    running = logs.begin("running")
    logs.append("running", b"x" * 10)
    for id in ("old", "new"):
        logs.begin(id)
        logs.append(id, b"x" * 10)
        logs.end(id)
    logs.append("running", b"x")
    assert [logs.get(id) is not None for id in ("running", "old", "new")] == [True, False, True]
    logs.append("running", b"x" * 20)
    assert logs.get("new") is None
    assert logs.get("running") is None, "it is too large alone"
    assert await followed(running, 1) == [b"lost at 1"]
    logs.append("running", b"x")  # of a stream that goes on
    logs.end("running")
    assert logs.get("running") is None
    logs.begin("next")
    logs.append("next", b"x" * 30)
    assert logs.get("next") is not None


async def test_a_follower_of_a_whole_log_that_goes_has_lost_nothing() -> None:
    logs = EventLogs(1000)
    log = logs.begin("a")
    logs.append("a", b"0")
    behind, done = (log.follow(0, lambda number: b"lost at %d" % number) for _ in range(2))
    assert (await anext(behind), await anext(done)) == (b"0", b"0")
    logs.append("a", b"1")
    assert await anext(done) == b"1"
    logs.end("a")
    logs.drop("a")
    assert [event async for event in done] == []
    assert [event async for event in behind] == [b"lost at 1"]
