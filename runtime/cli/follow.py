"""Following a job to its end: step, loss, tokens a second, and how long it will still take."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec

from runtime.cli.admin import ask
from runtime.cli.client import describe, error_text
from runtime.cli.errors import CommandError
from runtime.cli.progress import Meter

PATIENCE = 60.0
"""Seconds without a connection after which the server is taken for gone."""

_PAUSE = 1.0
_GATEWAY_ERRORS = (502, 503, 504)


async def follow(http: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    """Show a job's events on stderr until its end; returns the job as it is then. Raises `CommandError`."""
    with Meter(job["name"] or job["id"], job["total_steps"] or 0, done=job["step"]) as meter:
        async for event in events(http, job["id"]):
            data = event["data"]
            if data.get("type") == "step":
                total = job["total_steps"] = job["total_steps"] or (await _job(http, job["id"]))["total_steps"]
                meter.total(total)
                meter.reach(data["step"], _note(data, total))
            else:
                meter.say(event["message"])
    return await _job(http, job["id"])


async def events(http: httpx.AsyncClient, job_id: str, *, after: int = 0) -> AsyncIterator[dict[str, Any]]:
    """A job's events till its end, over as many connections as it takes. Raises `CommandError`."""
    lost: float | None = None
    while True:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        problem = "the connection ended"
        try:
            async with http.stream("GET", f"/admin/jobs/{job_id}/events", headers=headers) as response:
                if response.is_error:
                    await response.aread()
                    problem = error_text(response)
                    if response.status_code not in _GATEWAY_ERRORS:
                        raise CommandError(problem)
                else:
                    async for line in response.aiter_lines():
                        if line == "data: [DONE]":
                            return
                        if line.startswith("data: "):
                            event = msgspec.json.decode(line.removeprefix("data: "))
                            after, lost = int(event["id"]), None
                            yield event
        except httpx.TransportError as error:
            problem = describe(error)
        lost = time.monotonic() if lost is None else lost
        if time.monotonic() - lost > PATIENCE:
            raise CommandError(f"the server is gone: {problem}. The job goes on when it is back")
        await asyncio.sleep(_PAUSE)


async def _job(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = await ask(http, "GET", f"/admin/jobs/{job_id}")
    return job


def _note(step: dict[str, Any], total: int) -> str:
    seconds = max(step["seconds"], 1e-9)
    loss = "nan" if step["loss"] is None else f"{step['loss']:.4f}"
    left = time.strftime("%H:%M:%S", time.gmtime((total - step["step"]) * seconds))
    return f"loss {loss}, {step['tokens'] / seconds:.0f} tok/s, {left} left"
