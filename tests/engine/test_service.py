"""The engine thread beside an event loop: a storm of requests and aborts, refusals, draining, death."""

import asyncio
import atexit
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engine.delivery import CAPACITY, OutputStream
from runtime.engine.service import EngineService
from runtime.errors import Conflict, ContextLengthExceeded, EngineUnavailable, TooManyRequests
from runtime.messages import Output, SamplingParams, Submission
from runtime.support import failpoints
from settings.load import load
from tests.engine.services import LONG, check_empty, gather, run, submission


@pytest.mark.parametrize("asynchronous", ["off", "on"])
def test_a_thousand_requests_with_random_aborts(tiny_model: Path, asynchronous: str) -> None:
    """Aborted while queued, in the middle of a prompt, and while decoding; the rest is complete. Half of them come at
    once, so that the pool is short however fast the machine is."""
    rng = random.Random(0)
    finished: list[int] = []

    async def client(service: EngineService, index: int) -> None:
        await asyncio.sleep(rng.random() * 3 if index % 2 else 0)
        length, wanted = rng.randrange(1, 120), rng.randrange(1, 24)
        prompt = [rng.randrange(3, 6)] * length if rng.random() < 0.3 else rng.choices(range(3, 500), k=length)
        params = SamplingParams(max_tokens=wanted, ignore_eos=True, seed=index)
        leave_after = rng.choice([None, None, 0, 1, 5])
        async with service.submit(Submission(request_id=str(index), prompt_ids=prompt, params=params)) as stream:
            if leave_after == 0:
                return
            count = 0
            async for output in stream:
                count += len(output.token_ids)
                if leave_after is not None and count >= leave_after:
                    return
            assert count == wanted
            finished.append(index)

    async def body(service: EngineService) -> None:
        await asyncio.gather(*(client(service, index) for index in range(1000)))

    pool = {"num_blocks": 32, "max_running": 16, "max_batched_tokens": 64, "max_waiting": 1000}
    service = run(tiny_model, body, asynchronous=asynchronous, **pool)
    assert 250 < len(finished) < 750
    assert service.engine.scheduler.num_preemptions > 0
    check_empty(service)
    text = service.metrics.render("")[0].decode()
    assert "eft:num_requests_running{" in text
    for line in text.splitlines():
        if line.startswith(("eft:num_requests_running{", "eft:num_requests_waiting{", "eft:kv_cache_usage_perc{")):
            assert float(line.rsplit(" ", 1)[1]) == 0.0


def test_refusals(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        streams = [service.submit(submission("a"))]
        with pytest.raises(Conflict, match="'a'"):
            service.submit(submission("a"))
        with pytest.raises(ContextLengthExceeded):
            service.submit(submission("big", length=512))
        streams += [service.submit(submission(f"w{i}")) for i in range(3)]
        with pytest.raises(TooManyRequests, match="2 requests are waiting"):
            service.submit(submission("late"))
        for stream in streams:
            stream.cancel()
        done = await gather(service.submit(submission("a", SamplingParams(max_tokens=2, ignore_eos=True))))
        assert done[-1].finish_reason == "length"

    check_empty(run(tiny_model, body, max_running=2, max_waiting=2))


def test_draining_lets_the_running_finish_and_refuses_the_rest(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        stream = service.submit(submission("a", SamplingParams(max_tokens=50, ignore_eos=True)))
        await anext(stream)
        stopping = asyncio.create_task(service.stop(30.0))
        await asyncio.sleep(0)
        assert not service.ready
        with pytest.raises(EngineUnavailable, match="shutting down"):
            service.submit(submission("b"))
        outputs = await gather(stream)
        assert outputs[-1].finish_reason == "length"
        await stopping

    check_empty(run(tiny_model, body))


def test_draining_ends_unless_the_server_leaves(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        service.drain()
        assert not service.ready
        with pytest.raises(EngineUnavailable, match="takes no new requests"):
            service.submit(submission("a"))
        service.end_drain()
        assert service.ready
        await gather(service.submit(submission("a", SamplingParams(max_tokens=2, ignore_eos=True))))
        service.drain(leaving=True)
        service.end_drain()
        assert not service.ready

    check_empty(run(tiny_model, body))


def test_what_outlasts_the_drain_time_ends_with_an_error(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        failpoints.configure("worker.row=sleep:0.02")
        stream = service.submit(submission("a"))
        await anext(stream)
        await service.stop(0.05)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await gather(stream)

    run(tiny_model, body)


def test_a_dead_engine_fails_its_streams_and_says_so(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        failpoints.configure("worker.row=raise")
        streams = [service.submit(submission(str(i))) for i in range(8)]
        results = await asyncio.gather(*(gather(stream) for stream in streams), return_exceptions=True)
        assert all(isinstance(result, Exception) for result in results)
        await asyncio.wait_for(service.died.wait(), 10)
        service._thread.join(10)
        assert not service.healthy
        with pytest.raises(EngineUnavailable):
            service.submit(submission("late"))

    run(tiny_model, body, max_running=2)


def test_a_step_that_hangs_is_unhealthy(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        failpoints.configure("worker.row=sleep:1.0")
        stream = service.submit(submission("a", SamplingParams(max_tokens=1)))
        await asyncio.sleep(0.6)
        assert not service.healthy
        failpoints.configure("")
        await gather(stream)
        assert service.healthy

    run(tiny_model, body, step_timeout=0.3)


def test_a_slow_reader_loses_nothing_and_holds_little() -> None:
    async def main() -> None:
        aborted: list[int] = []
        stream = OutputStream(1, aborted.append)
        for i in range(100):
            last = i == 99
            stream.put(Output(request_id="r", text=f"{i},", token_ids=[i], finish_reason="length" if last else None))
        assert len(stream._queue) <= CAPACITY
        outputs = await gather(stream)
        assert "".join(o.text for o in outputs) == "".join(f"{i}," for i in range(100))
        assert [t for o in outputs for t in o.token_ids] == list(range(100))
        assert [o.finish_reason for o in outputs].count("length") == 1
        stream.cancel()
        assert aborted == []

    asyncio.run(main())


def test_a_service_that_was_not_stopped_ends_its_thread_at_exit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Python would end it inside a C++ call, and the process would be aborted."""
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)

    async def leave() -> EngineService:
        service = EngineService.load(load(flags={"model": str(tiny_model)}, env={}).settings)
        service.start()
        stream = service.submit(Submission(request_id="one", prompt_ids=[3], params=LONG))
        await anext(aiter(stream))
        return service

    service = asyncio.run(leave())
    assert service._thread.is_alive()
    for function in at_exit:
        function()
    assert not service._thread.is_alive()
