"""Tasks beside other work: they end with it, and what they raise ends only themselves."""

import asyncio
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from runtime.support import event_loop
from runtime.support.event_loop import BackgroundTasks, LagSampler, cancel, is_set_within, running

pytestmark = pytest.mark.anyio


async def test_work_runs_as_long_as_the_block() -> None:
    events: list[str] = []

    async def work() -> None:
        events.append("began")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # the block waits for what the work does about its end
            events.append("ended")

    async with running(work()):
        await asyncio.sleep(0)
        assert events == ["began"]
    assert events == ["began", "ended"]


async def test_an_error_of_the_work_is_logged_and_does_not_reach_the_block() -> None:
    async def work() -> None:
        raise ValueError("no")

    with capture_logs() as logs:
        async with running(work()):
            await asyncio.sleep(0.01)
    (entry,) = logs
    assert entry["event"] == "background_task_failed"
    assert "work" in entry["task"]


async def test_cancelling_waits_for_the_end_however_it_comes() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("while it cleared up") from None

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(asyncio.sleep(60)), None]
    await asyncio.sleep(0)
    await cancel(*tasks)
    assert all(task.done() for task in tasks if task is not None)


async def test_an_event_is_waited_for_no_longer_than_said() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.001)
    asyncio.get_running_loop().call_soon(event.set)
    assert await is_set_within(event, 60.0)


async def test_tasks_are_cancelled_by_id_and_forgotten_at_their_end() -> None:
    tasks, ended = BackgroundTasks(), []

    async def work(id: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(id)

    for id in ("a", "b", "c"):
        tasks.start(id, work(id))
    await asyncio.sleep(0)
    await tasks.cancel("b")
    await tasks.cancel("b")
    assert ended == ["b"]
    await tasks.cancel_all()
    assert sorted(ended) == ["a", "b", "c"]


async def test_the_longest_delay_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(event_loop, "LAG_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(event_loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lag = LagSampler()
    async with running(lag.run()):
        for delay in (0.5, 2.0, 1.0):
            await asyncio.sleep(0)
            now[0] += delay
        for _ in range(3):
            await asyncio.sleep(0)
        assert await lag.take() == 2.0
        assert await lag.take() == 0.0
