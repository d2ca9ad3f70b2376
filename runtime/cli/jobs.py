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
from msgspec import Struct
from rich.console import Group
from rich.table import Table

from runtime.cli.client import DEFAULT_URL, AdminKey, Url, admin_client, ask, send
from runtime.cli.flags import Json
from runtime.cli.output import CommandError, UsageError, console
from runtime.cli.train import events as stream_events
from runtime.cli.train import exit_code, follow_to_end
from runtime.support.durable import reason
from runtime.trainer.recipe.change import flat_keys
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


# -- comparison ------------------------------------------------------------------------------------
#
# Differences of two jobs: their recipes, results and evaluations.

MAX_POINTS = 12
"""Steps of the curves that the table shows."""


class JobDifference(Struct, frozen=True, kw_only=True):
    """A value of each of the two jobs."""

    key: str
    first: Any
    second: Any


class CurvePoint(Struct, frozen=True, kw_only=True):
    """A metric of both jobs at a step; None where a job has no value there."""

    metric: str
    step: int
    first: float | None
    second: float | None


class JobComparison(Struct, frozen=True, kw_only=True):
    """Two jobs side by side."""

    jobs: tuple[str, str]
    recipe: list[JobDifference]
    """Keys whose values differ; None: the key is not there."""
    results: list[JobDifference]
    curves: list[CurvePoint]


def compare_jobs(
    jobs: tuple[dict[str, Any], dict[str, Any]],
    recipes: tuple[bytes, bytes],
    metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> JobComparison:
    """The comparison of two jobs, each with its recipe and the rows of its metrics."""
    first, second = (flat_keys(read_document(recipe).values) for recipe in recipes)
    keys = dict.fromkeys([*first, *second])
    return JobComparison(
        jobs=(jobs[0]["id"], jobs[1]["id"]),
        recipe=[
            JobDifference(key=key, first=first.get(key), second=second.get(key))
            for key in keys
            if first.get(key) != second.get(key)
        ],
        results=_results(jobs, metrics),
        curves=_curves(metrics),
    )


def _results(
    jobs: tuple[dict[str, Any], dict[str, Any]], metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> list[JobDifference]:
    found = [
        JobDifference(key=key, first=jobs[0].get(key), second=jobs[1].get(key))
        for key in ("status", "adapter", "step", "trained_tokens")
    ]
    seconds = [_seconds(job) for job in jobs]
    found.append(JobDifference(key="seconds", first=seconds[0], second=seconds[1]))
    last = [_last(rows) for rows in metrics]
    names = dict.fromkeys([*last[0], *last[1]])
    return [*found, *(JobDifference(key=name, first=last[0].get(name), second=last[1].get(name)) for name in names)]


def _seconds(job: dict[str, Any]) -> int | None:
    started, finished = job.get("started_at"), job.get("finished_at")
    return None if started is None or finished is None else finished - started


def _last(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the last step and the last evaluation, as `train_loss`, `eval_loss` and so on."""
    found: dict[str, Any] = {}
    for kind, prefix in (("step", "train"), ("eval", "eval")):
        row = next((row for row in reversed(rows) if row["type"] == kind), None)
        found |= {f"{prefix}_{name}": value for name, value in _named(row or {}).items()}
    return found


def _named(row: dict[str, Any]) -> dict[str, Any]:
    plain = {name: row[name] for name in ("loss", "accuracy") if name in row}
    return {**plain, **row.get("metrics", {})}


def _curves(metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> list[CurvePoint]:
    """Metrics of the evaluations of either job, or, where there are none, of training's steps."""
    kind = "eval" if any(row["type"] == "eval" for rows in metrics for row in rows) else "step"
    values: list[dict[tuple[str, int], Any]] = [
        {(name, row["step"]): value for row in rows if row["type"] == kind for name, value in _named(row).items()}
        for rows in metrics
    ]
    names = dict.fromkeys(name for one in values for name, _ in one)
    steps = sorted({step for one in values for _, step in one})
    prefix = "eval" if kind == "eval" else "train"
    return [
        CurvePoint(
            metric=f"{prefix}_{name}", step=step, first=values[0].get((name, step)), second=values[1].get((name, step))
        )
        for name in names
        for step in steps
        if (name, step) in values[0] or (name, step) in values[1]
    ]


# -- tables ----------------------------------------------------------------------------------------


def tables(comparison: JobComparison) -> Group:
    """The comparison for people."""
    first, second = comparison.jobs
    recipe = Table("recipe", first, second, box=None)
    for one in comparison.recipe or [JobDifference(key="no difference", first="", second="")]:
        recipe.add_row(one.key, _shown(one.first), _shown(one.second))
    results = Table("result", first, second, box=None)
    for one in comparison.results:
        results.add_row(one.key, _shown(one.first), _shown(one.second))
    curves = Table("metric", "step", first, second, box=None)
    for point in _thinned(comparison.curves):
        curves.add_row(point.metric, str(point.step), _shown(point.first), _shown(point.second))
    return Group(recipe, "", results, "", curves)


def _thinned(points: list[CurvePoint]) -> list[CurvePoint]:
    """Some steps of each metric, the first and the last among them."""
    steps = sorted({point.step for point in points})
    size = max(1, -(-(len(steps) - 1) // (MAX_POINTS - 1)))
    kept = {*steps[::size], *steps[-1:]}
    return [point for point in points if point.step in kept]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
