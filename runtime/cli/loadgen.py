"""A load generator for any OpenAI-compatible server.

    report = asyncio.run(run_load(LoadSpec(url="http://127.0.0.1:8000", requests=64, concurrency=32)))
    rich.print(render(report))

Closed loop (so many requests at once) or open loop (Poisson arrivals). Needs no model, no tokenizer
and no torch on this side; knows nothing of the command line.
"""

import asyncio
import time
from collections.abc import Callable

import httpx

from runtime.cli.client import remote, served_model
from runtime.cli.load.exchange import exchange
from runtime.cli.load.prompts import Prompt, make_prompts
from runtime.cli.load.report import LoadReport, Stats, make_report, render
from runtime.cli.load.sample import Sample
from runtime.cli.load.spec import LoadSpec

__all__ = ["LoadReport", "LoadSpec", "Sample", "Stats", "render", "run_load"]

OnProgress = Callable[[Sample], None]


async def run_load(spec: LoadSpec, on_progress: OnProgress | None = None) -> LoadReport:
    """Run the load; `on_progress` is called as each request ends, `Sample.error` set when it failed.

    Raises `UsageError` for a spec that makes no sense and `CommandError` when the server cannot be
    reached at all or its tokens not counted. Requests that fail later are counted in the report.
    """
    spec.verify()
    async with remote(spec.url, spec.api_key) as client:
        model = spec.model or await served_model(client)
        prompts = await make_prompts(client, model, spec)
        return make_report(spec, model, await _send_all(client, model, spec, prompts, on_progress))


async def _send_all(
    client: httpx.AsyncClient,
    model: str,
    spec: LoadSpec,
    prompts: list[Prompt],
    on_progress: OnProgress | None,
) -> list[Sample]:
    begin = time.perf_counter()
    slots = asyncio.Semaphore(spec.in_flight)

    async def one(number: int, due: float) -> Sample:
        await asyncio.sleep(begin + due - time.perf_counter())
        async with slots:
            sample = await exchange(client, model, spec, number, prompts[number])
        if on_progress is not None:
            on_progress(sample)
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, due)) for number, due in enumerate(spec.due_times())]
    return [task.result() for task in tasks]
