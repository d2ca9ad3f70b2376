"""`eft top`: what a server does now: requests, tokens, latencies, training's share, and its jobs."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runtime.cli.client import DEFAULT_URL, AdminKey, ServerRefusal, Url, admin_client, ask, no_server
from runtime.cli.flags import Json
from runtime.cli.output import CommandError, UsageError, console

JOBS = 5
"""Jobs that are shown: the newest that have not ended, else the newest."""
JOBS_SECONDS = 4.0
"""Seconds between two looks at the jobs."""
RATES = {
    "generated_tokens": "generated",
    "prompt_tokens": "prompt",
    "trained_tokens": "trained",
    "riding_tokens": "riding",
}
"""The last: tokens of training in steps of requests."""
TIMES = {
    "first token": ("first_token_p50", "first_token_p95"),
    "next token": ("token_p50", "token_p95"),
}


def top(
    *,
    samples: Annotated[int | None, Parameter(help="Leave after this many samples; default: run until Ctrl-C.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """A live view on a terminal; elsewhere a line, or with --json an object, for each sample (one every 2 seconds)."""
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, got {samples}")
    show = _JsonLines() if json else _Screen() if sys.stdout.isatty() else _Lines()
    try:
        asyncio.run(_follow(url, admin_key, show, samples))
    finally:
        show.close()
    return 0


class _Lines:
    """A line for each sample."""

    def show(self, server: dict[str, Any], sample: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
        running = [job for job in jobs if job["status"] == "running"]
        parts = [
            datetime.fromtimestamp(sample["time"]).strftime("%H:%M:%S"),
            f"running {sample['running']}",
            f"waiting {sample['waiting']}",
            f"kv {sample['kv_cache_usage']:.0%}",
            *[f"{name} {sample[field]:.0f} tok/s" for field, name in RATES.items()],
            *[f"{name} {_ms(sample[p50])}/{_ms(sample[p95])}" for name, (p50, p95) in TIMES.items()],
            f"training {sample['training_share']:.0%}",
            *[f"{job['name'] or job['id']} {_steps(job)}" for job in running],
        ]
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        """End the view."""


class _JsonLines(_Lines):
    """An object for each sample."""

    def show(self, server: dict[str, Any], sample: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
        print(msgspec.json.encode({**sample, "model": server["model"], "jobs": jobs}).decode(), flush=True)


class _Screen(_Lines):
    """A view that is drawn again for each sample."""

    def __init__(self) -> None:
        self._live = Live(console=console(), screen=False, auto_refresh=False, transient=False)
        self._live.start()

    def show(self, server: dict[str, Any], sample: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
        self._live.update(view(server, sample, jobs), refresh=True)

    def close(self) -> None:
        self._live.stop()


def view(server: dict[str, Any], sample: dict[str, Any], jobs: list[dict[str, Any]]) -> Group:
    """The live view: the server, its numbers, its jobs."""
    moment = datetime.fromtimestamp(sample["time"]).strftime("%H:%M:%S")
    head = Text.assemble((server["model"], "bold"), f"  Eft {server['version']}  {moment}  (Ctrl-C leaves)")
    numbers = Table(box=None, show_header=False, pad_edge=False)
    numbers.add_row("requests", f"{sample['running']} running, {sample['waiting']} waiting")
    numbers.add_row("tokens/s", ", ".join(f"{sample[field]:,.0f} {name}" for field, name in RATES.items()))
    for name, (p50, p95) in TIMES.items():
        numbers.add_row(name, f"{_ms(sample[p50])} median, {_ms(sample[p95])} for 95 %")
    for name, field in (("KV cache", "kv_cache_usage"), ("training", "training_share")):
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=sample[field], width=30), f"{sample[field]:.0%}")
        numbers.add_row(name, bar)
    return Group(head, numbers, *([_jobs_table(jobs)] if jobs else []))


def _jobs_table(jobs: list[dict[str, Any]]) -> Table:
    table = Table("job", "state", "step", "", "loss", "left", box=None, pad_edge=False, header_style="bold")
    for job in jobs:
        total = job["total_steps"] or 0
        bar = ProgressBar(total=float(total), completed=float(job["step"]), width=20) if total else ""
        left = "" if job["estimated_finish"] is None else f"{max(0, job['estimated_finish'] - time.time()):.0f} s"
        loss = "" if job["loss"] is None else f"{job['loss']:.4f}"
        table.add_row(job["name"] or job["id"], job["status"], _steps(job), bar, loss, left)
    return table


def _steps(job: dict[str, Any]) -> str:
    return f"{job['step']}/{job['total_steps']}" if job["total_steps"] else str(job["step"])


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


async def _follow(url: str, admin_key: str | None, show: _Lines, samples: int | None) -> None:
    """Show the server's last sample, then each new one. Raises `CommandError` where no server answers or it ends."""
    left = samples
    async with admin_client(url, admin_key) as http, aclosing(_overview(http)) as events:
        server: dict[str, Any] = {}
        jobs: list[dict[str, Any]] = []
        looked = 0.0
        async for event, data in events:
            if event == "overview":
                server = data
                if not data["samples"]:
                    continue
                sample = data["samples"][-1]
            else:
                sample = data
            if time.monotonic() - looked > JOBS_SECONDS:
                jobs, looked = await _jobs(http), time.monotonic()
            show.show(server, sample, jobs)
            if left is not None and (left := left - 1) == 0:
                return
    raise CommandError(f"the server at {url} has stopped")


async def _overview(http: httpx.AsyncClient) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
    """Events of /admin/overview: (name, data)."""
    headers = {"accept": "text/event-stream"}
    try:
        async with http.stream("GET", "/admin/overview", params={"limit": 1}, headers=headers) as response:
            if response.is_error:
                await response.aread()
                raise ServerRefusal(response)
            name = ""
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, msgspec.json.decode(line.removeprefix("data: "))
    except httpx.TransportError as error:
        raise no_server(http, error) from error


async def _jobs(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The jobs to show. None where the server runs none."""
    try:
        active = await ask(
            http, "GET", "/admin/jobs", params={"limit": JOBS, "status": ["running", "queued", "paused", "validating"]}
        )
        found = active["data"] or (await ask(http, "GET", "/admin/jobs", params={"limit": JOBS}))["data"]
    except ServerRefusal as error:
        if error.status == httpx.codes.SERVICE_UNAVAILABLE:
            return []
        raise
    return list(found)
