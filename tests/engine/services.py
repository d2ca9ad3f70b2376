"""An engine service over a tiny model: a body is run beside it, and afterwards nothing may be left."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from runtime.engine.delivery import OutputStream
from runtime.engine.service import EngineService
from runtime.messages import Output, SamplingParams, Submission
from runtime.support import failpoints
from settings.load import load

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def run(model: Path, body: Callable[[EngineService], Awaitable[None]], **overrides: object) -> EngineService:
    """Load a service, run `body` beside it, stop it, and check that nothing is left."""

    async def main() -> EngineService:
        before = asyncio.all_tasks()
        service = EngineService.load(load(flags={"model": str(model), **overrides}, env={}).settings)
        service.start()
        try:
            await body(service)
        finally:
            await service.stop(5.0)
        assert asyncio.all_tasks() == before
        return service

    try:
        service = asyncio.run(asyncio.wait_for(main(), 120))
    finally:
        failpoints.configure("")
    assert not service._thread.is_alive()
    return service


def check_empty(service: EngineService) -> None:
    scheduler = service.engine.scheduler
    scheduler.check_integrity()
    assert len(scheduler) == 0
    assert scheduler.blocks.num_free == service.num_blocks
    assert len(service.engine.delivery) == 0
    assert service._streams == {}


def submission(name: str, params: SamplingParams = LONG, length: int = 5) -> Submission:
    return Submission(request_id=name, prompt_ids=[3 + i % 500 for i in range(length)], params=params)


async def gather(stream: OutputStream) -> list[Output]:
    return [output async for output in stream]
