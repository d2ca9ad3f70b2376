"""`eft jobs`: the training jobs of a server."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.client import DEFAULT_URL, AdminKey, Url, admin_client, ask, send
from runtime.cli.compare import JobComparison, compare_jobs, tables
from runtime.cli.flags import Json
from runtime.cli.output import CommandError, UsageError, console
from runtime.cli.train import events as stream_events
from runtime.cli.train import exit_code, follow_to_end
from runtime.support.durable import reason
from runtime.trainer.recipe.document import RecipeError, read_document

T = TypeVar("T")
JobId = Annotated[str, Parameter(help="The job's id, ftjob-….")]


def list_jobs(
    *,
    status: Annotated[list[str] | None, Parameter(help="Only jobs in this state; several times for several.")] = None,
    limit: Annotated[int, Parameter(help="Most jobs.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """The newest first."""
    params = {"limit": limit, "status": status or []}
    page = _with(url, admin_key, lambda http: ask(http, "GET", "/admin/jobs", params=params))
    if json:
        return _print(page)
    table = Table("id", "status", "name", "step", "loss", "created", "adapter", box=None)
    for job in page["data"]:
        table.add_row(
            job["id"],
            job["status"],
            job["name"] or "",
            f"{job['step']}/{job['total_steps']}" if job["total_steps"] else "",
            "" if job["loss"] is None else f"{job['loss']:.4f}",
            _time(job["created_at"]),
            job["adapter"] or "",
        )
    console().print(table)
    return 0


def show(job_id: JobId, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> int:
    """Returns 1 for a job that failed or was cancelled."""
    job = _with(url, admin_key, lambda http: ask(http, "GET", f"/admin/jobs/{job_id}"))
    if json:
        _print(job)
    else:
        print(msgspec.json.format(msgspec.json.encode(job), indent=2).decode())
    return exit_code(job)


def events(
    job_id: JobId,
    /,
    *,
    follow: Annotated[bool, Parameter(help="Wait for more, until the job's end.", negative="")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """With --follow, returns 1 where the job failed or was cancelled."""

    async def stored(http: httpx.AsyncClient) -> None:
        after, more = 0, True
        while more:
            page = await ask(http, "GET", f"/admin/jobs/{job_id}/events", params={"after": after, "limit": 1000})
            for event in page["data"]:
                _print_event(event, json=json)
                after = int(event["id"])
            more = page["has_more"]

    async def live(http: httpx.AsyncClient) -> int:
        job = await ask(http, "GET", f"/admin/jobs/{job_id}")
        if not json:
            return exit_code(await follow_to_end(http, job))
        async for event in stream_events(http, job_id):
            _print_event(event, json=True)
        return exit_code(await ask(http, "GET", f"/admin/jobs/{job_id}"))

    if follow:
        return _with(url, admin_key, live)
    _with(url, admin_key, stored)
    return 0


def logs(
    job_id: JobId,
    /,
    *,
    lines: Annotated[int, Parameter(help="Most lines.")] = 1000,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> int:
    """JSON, an object a line."""
    params = {"lines": lines}
    print(
        _with(url, admin_key, lambda http: send(http, "GET", f"/admin/jobs/{job_id}/logs", params=params)).text, end=""
    )
    return 0


def cancel(job_id: JobId, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> int:
    """Asks for it, and does not wait."""
    return _act(job_id, "cancel", url, admin_key, json=json)


def pause(job_id: JobId, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> int:
    """Asks for it, and does not wait."""
    return _act(job_id, "pause", url, admin_key, json=json)


def resume(job_id: JobId, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> int:
    """Asks for it, and does not wait."""
    return _act(job_id, "resume", url, admin_key, json=json)


def remove(
    *job_ids: Annotated[str, Parameter(help="Ids of jobs, ftjob-….")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """Returns 1 where one could not be deleted; the others are."""
    if not job_ids:
        raise UsageError("which jobs? Give their ids; `eft jobs list` has them")

    async def delete(http: httpx.AsyncClient) -> int:
        code = 0
        for job_id in job_ids:
            try:
                done = await ask(http, "DELETE", f"/admin/jobs/{job_id}")
            except CommandError as error:
                print(f"eft: {job_id}: {error}", file=sys.stderr)
                code = 1
            else:
                _print(done) if json else print(f"Deleted {done['id']}.")
        return code

    return _with(url, admin_key, delete)


def rerun(
    job_id: JobId,
    /,
    *,
    set: Annotated[
        list[str] | None, Parameter(help="A key of the recipe and its new value, KEY=VALUE; KEY= takes it out.")
    ] = None,
    dry_run: Annotated[bool, Parameter(help="Show the plan, and start nothing.", negative="")] = False,
    follow: Annotated[bool, Parameter(help="Wait for the new job's end.", negative="")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> int:
    """With --follow, returns 1 where the new job failed or was cancelled."""
    body = {"set": _changes(set or [])}
    params = {"dry_run": "1"} if dry_run else {}

    async def start(http: httpx.AsyncClient) -> int:
        job = await ask(http, "POST", f"/admin/jobs/{job_id}/rerun", json=body, params=params)
        if json or dry_run:
            _print(job)
        if follow and not dry_run:
            return exit_code(await follow_to_end(http, job))
        if not json and not dry_run:
            print(f"{job['id']} is {job['status']}.")
        return 0

    return _with(url, admin_key, start)


def _changes(given: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for one in given:
        key, sign, value = one.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"--set takes KEY=VALUE, got {one!r}")
        try:
            changes[key.strip()] = read_document(f"value: {value}".encode()).values["value"]
        except RecipeError as error:
            raise UsageError(f"--set {one}: {error.problems[0].message}") from error
    return changes


def report(
    job_id: JobId,
    /,
    *,
    to: Annotated[Path | None, Parameter(help="The file to write. Default: the job's id and .html.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> int:
    """HTML that needs no network. An existing file is replaced."""
    path = to or Path(f"{job_id}.html")
    page = _with(url, admin_key, lambda http: send(http, "GET", f"/admin/jobs/{job_id}/report"))
    try:
        path.write_bytes(page.content)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error
    print(f"Wrote {path}.")
    return 0


def compare(
    first: JobId, second: JobId, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False
) -> int:
    """Keys that differ, results, and the metrics of evaluations side by side."""

    async def fetch(http: httpx.AsyncClient, job_id: str) -> tuple[Any, bytes, list[Any]]:
        job = await ask(http, "GET", f"/admin/jobs/{job_id}")
        recipe = (await send(http, "GET", f"/admin/jobs/{job_id}/recipe")).content
        return job, recipe, (await ask(http, "GET", f"/admin/jobs/{job_id}/metrics"))["data"]

    async def both(http: httpx.AsyncClient) -> JobComparison:
        one, other = await fetch(http, first), await fetch(http, second)
        return compare_jobs((one[0], other[0]), (one[1], other[1]), (one[2], other[2]))

    comparison = _with(url, admin_key, both)
    if json:
        return _print(comparison)
    console().print(tables(comparison))
    return 0


def _act(job_id: str, action: str, url: str, admin_key: str | None, *, json: bool) -> int:
    job = _with(url, admin_key, lambda http: ask(http, "POST", f"/admin/jobs/{job_id}/{action}"))
    if json:
        return _print(job)
    soon = f", and will {job['wanted']} after this step" if job["wanted"] else ""
    print(f"{job['id']} is {job['status']}{soon}.")
    return 0


def _with(url: str, admin_key: str | None, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with admin_client(url, admin_key) as http:
            return await work(http)

    return asyncio.run(run())


def _print(data: Any) -> int:
    print(msgspec.json.encode(data).decode())
    return 0


def _print_event(event: dict[str, Any], *, json: bool) -> None:
    if json:
        _print(event)
    else:
        level = "" if event["level"] == "info" else f"{event['level']}: "
        print(f"{_time(event['created_at'])} {level}{event['message']}", flush=True)


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
