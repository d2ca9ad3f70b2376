"""`eft train`: send a recipe to a server, or to a model loaded here, and follow the job."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
from cyclopts import Parameter

from runtime.cli import client
from runtime.cli.client import DEFAULT_URL, AdminKey, ServerRefusal, admin_client, ask, describe, error_text
from runtime.cli.flags import MODEL_SECTIONS, ConfigFile, Json, read_settings, refuse_settings, with_settings
from runtime.cli.output import CommandError, Meter, UsageError
from runtime.cli.recipe_files import RecipeFiles, read_recipe

UNPUBLISHED = 3
"""Exit code if the job is done and its adapter did not pass the recipe's gate."""


@with_settings(*MODEL_SECTIONS, "adapters", "trainer")
def train(
    recipe: Annotated[Path, Parameter(help="The recipe, a YAML file.")],
    /,
    *,
    model: Annotated[
        str | None, Parameter(help="Train here, without a server: what to load, such as `demo`. Implies --follow.")
    ] = None,
    url: Annotated[str | None, Parameter(help=f"The server; default: {DEFAULT_URL}.")] = None,
    admin_key: AdminKey = None,
    name: Annotated[str | None, Parameter(help="Name of the adapter, instead of the recipe's.")] = None,
    follow: Annotated[bool, Parameter(help="Show how it goes, until its end.", negative="")] = False,
    dry_run: Annotated[bool, Parameter(help="Only say what the recipe would do.", negative="")] = False,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Returns 1 where the job failed or was cancelled, 3 where it was not good enough to publish."""
    files = read_recipe(recipe, name=name)
    for notice in files.notices:
        print(f"eft: {notice}", file=sys.stderr)
    if model is not None:
        if url is not None or admin_key is not None:
            raise UsageError("--url and --admin-key are for a server; with --model, training is done here")
        opened = client.in_process(read_settings(flags, config, model=model), training=True)
    else:
        refuse_settings(flags, config)
        opened = admin_client(url or DEFAULT_URL, admin_key)
    job = asyncio.run(_train(opened, files, dry_run=dry_run, follow=follow or model is not None))
    if dry_run:
        from runtime.cli.recipe_plan import print_job_plan  # imported here: only this path needs it

        print_job_plan(job, json=json)
    elif json:
        print(msgspec.json.encode(job).decode())
    else:
        print("\n".join(_report(job, url, model)))
    return exit_code(job)


def exit_code(job: dict[str, Any]) -> int:
    """Exit code for the state of a job, or for a plan."""
    if job.get("status") in ("failed", "cancelled"):
        return 1
    return UNPUBLISHED if job.get("status") == "succeeded" and not job["adapter"] else 0


async def _train(
    opened: AbstractAsyncContextManager[httpx.AsyncClient], files: RecipeFiles, *, dry_run: bool, follow: bool
) -> dict[str, Any]:
    async with opened as http:
        try:
            job = await submit(http, files, dry_run=dry_run, wait=FIRST_WAIT if follow else None)
        except ServerRefusal as error:
            raise CommandError(f"{error.status}: {files.explain(error.message)}") from error
        if not follow or dry_run:
            return job
        job = await follow_to_end(http, job)
        if job["error"]:
            job["error"]["message"] = files.explain(job["error"]["message"])
        return job | {"path": await _path_of(http, job)}


async def _path_of(http: httpx.AsyncClient, job: dict[str, Any]) -> str | None:
    """Path of the adapter that a job published, if the server reports it."""
    if not job["adapter"]:
        return None
    name, _, number = job["adapter"].rpartition("@")
    try:
        versions = (await ask(http, "GET", f"/admin/adapters/{quote(name, safe='')}"))["versions"]
    except CommandError:
        return None
    return next((version["path"] for version in versions if str(version["number"]) == number), None)


async def submit(
    http: httpx.AsyncClient, files: RecipeFiles, *, dry_run: bool = False, wait: int | None = None
) -> dict[str, Any]:
    """Post a recipe with its files, each read as it is sent: the job, or with `dry_run` the plan. `wait`: seconds after
    which the job is given while its data is still being read."""
    with ExitStack() as stack:
        form = [("recipe", ("recipe.yaml", files.recipe))]
        form += [("file", (name, stack.enter_context(open(path, "rb")))) for name, path in files.data.items()]  # type: ignore[misc]  # noqa: ASYNC230
        params = {"dry_run": "1"} if dry_run else {}
        headers = {} if wait is None else {"Prefer": f"wait={wait}"}
        answer: dict[str, Any] = await ask(http, "POST", "/admin/train", files=form, params=params, headers=headers)
        return answer


def _report(job: dict[str, Any], url: str | None, model: str | None) -> Iterator[str]:
    """Lines of a report on a job, for a person."""
    match job["status"]:
        case "succeeded" if job["adapter"]:
            yield f"Published as {job['adapter']}. Try it:"
            if model:
                yield f"  eft serve {model}"
            yield f"  eft chat {job['name']} --url {url or DEFAULT_URL}"
            if asking := job["summary"].get("how_to_ask"):
                yield f"Ask it {asking}"
            if job.get("path"):
                copy = (
                    ""
                    if model
                    else f"; to copy it: eft adapters download {job['name']}" + (f" --url {url}" if url else "")
                )
                yield f"It lies in {job['path']}, as PEFT loads it{copy}"
        case "succeeded":
            yield f"{job['name']} is trained, and was not published; see: eft jobs events {job['id']}"
        case "failed":
            yield f"{job['id']} failed: {job['error']['message']}"
        case "cancelled":
            yield f"{job['id']} was cancelled."
        case status:
            yield f"{job['id']} is {status}. Follow it:"
            yield f"  eft jobs events {job['id']} --follow" + (f" --url {url}" if url else "")


# -- follow ----------------------------------------------------------------------------------------
#
# Follow a job to its end: step, loss, tokens per second, and remaining time.

PATIENCE = 60.0
"""Seconds without a connection after which the server counts as gone."""

FIRST_WAIT = 3
"""Seconds that a recipe is waited for as a whole: if its data takes longer to read, what is read so far is shown."""

RECENT_STEPS = 20
"""Steps over which the mean time of a step is taken, with the evaluations and checkpoints between them."""

_PAUSE = 1.0
_GATEWAY_ERRORS = (502, 503, 504)


async def follow_to_end(http: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    """Show a job's events on stderr until its end; returns the finished job. Raises `CommandError`."""
    pace = _Pace()
    with Meter(job["name"] or job["id"], job["total_steps"] or 0, done=job["step"], remaining=False) as meter:
        async for event in events(http, job["id"]):
            data = event["data"]
            if data.get("type") == "reading":
                meter.note(f"{data['rows']:,} rows read")
            elif data.get("type") == "progress":
                total = job["total_steps"] = data["total_steps"]
                meter.total(total)
                meter.reach(
                    data["step"], pace.under_way(data), part=data["fraction"] if data["activity"] == "train" else 0
                )
            elif data.get("type") == "step":
                total = job["total_steps"] = job["total_steps"] or (await _job(http, job["id"]))["total_steps"]
                meter.total(total)
                meter.reach(data["step"], pace.after(data, total))
            else:
                level = "" if event["level"] == "info" else f"{event['level']}: "
                meter.say(level + event["message"])
    return await _job(http, job["id"])


async def events(http: httpx.AsyncClient, job_id: str, *, after: int = 0) -> AsyncIterator[dict[str, Any]]:
    """A job's events until its end, reconnecting as needed. Raises `CommandError`."""
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


class _Pace:
    """Notes for the meter, from step and progress events of one job."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self._loss = ""

    def after(self, step: dict[str, Any], total: int) -> str:
        """Note at the end of a step: its loss, and the mean pace. One step alone is no measure: the time of the first
        after an evaluation has the evaluation in it."""
        self._loss = "loss nan" if step["loss"] is None else f"loss {step['loss']:.4f}"
        self._recent.append((step["seconds"], step["tokens"]))
        seconds = max(sum(time for time, _ in self._recent), 1e-9)
        tokens = sum(tokens for _, tokens in self._recent)
        left = _clock((total - step["step"]) * seconds / len(self._recent))
        return f"{self._loss}, {tokens / seconds:.0f} tok/s, {left} left"

    def under_way(self, progress: dict[str, Any]) -> str:
        """Note within a step or an evaluation that takes long. The last loss stays in it: where steps take as long as
        the meter waits between two lines, no note of a step's end would be shown."""
        what = f"step {progress['step'] + 1}" if progress["activity"] == "train" else "evaluation"
        left = progress["seconds_left"]
        parts = (f"{what} {progress['fraction']:.0%} done", self._loss, "" if left is None else f"{_clock(left)} left")
        return ", ".join(filter(None, parts))


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
