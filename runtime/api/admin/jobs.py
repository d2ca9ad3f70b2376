"""/admin/jobs: list, inspect, follow, pause, resume, cancel and delete jobs."""

import asyncio
import csv
import io
import time
from typing import Any

import msgspec
from litestar import Response, delete, get, post
from litestar.response import Stream

from runtime.access.limits import Bucket
from runtime.api.admin.train import SUBMITTED, detail_of, job_id_of
from runtime.api.admin.views import (
    DryRun,
    EventItem,
    JobDeleted,
    JobDetail,
    JobItem,
    event_item,
    job_item,
)
from runtime.api.docs import ALSO, ANSWERS, BODY, FLAG, QUERY, YAML, page_query, whole
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import TRAIN
from runtime.api.http.query import (
    MAX_PAGE,
    ObjectPage,
    Page,
    check_names,
    choices,
    flag,
    integer,
    number,
    object_page,
    page_request,
)
from runtime.api.http.record import record_of, visible_to
from runtime.api.http.sse import DONE, Events, EventStream
from runtime.api.openai.files import file_pieces
from runtime.api.openai.schema import Intake
from runtime.errors import NotFound, TooManyRequests
from runtime.support.durable import storage_unavailable
from runtime.trainer.jobs.followers import tail
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.records import STATES, Note
from runtime.trainer.jobs.report import POLICY, JobReport, render_report
from runtime.trainer.recipe.change import changed_recipe

# -- job events ------------------------------------------------------------------------------------
#
# A job's past and future events as a stream, until the job's end.

BEAT = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""

LOOKS = 600
"""Most database queries per minute for one reader; above that, events that arrive in between are read together."""

_BATCH = 500
_MOST = 2**53


async def event_stream(jobs: JobManager, job_id: str, after: int) -> Events:
    """Events numbered above `after`, each with its number as id; `[DONE]` at the job's end.

    Ends without `[DONE]` when the server stops; the client reconnects with its Last-Event-ID.
    """
    looks = Bucket(LOOKS, time.monotonic())
    while not jobs.feed.closed:
        ticket = jobs.feed.ticket(job_id)
        try:
            if pause := looks.seconds_until(1, time.monotonic()):
                await asyncio.sleep(pause)
            looks.take(1, time.monotonic())
            try:
                job, events = await jobs.tail.events(job_id, after=after, limit=_BATCH)
            except NotFound:  # deleted meanwhile
                yield DONE
                return
            for event in events:
                yield b"id: %d\ndata: %s\n\n" % (event.number, msgspec.json.encode(event_item(event)))
                after = event.number
            if len(events) == _BATCH:
                continue
            if job.ended:
                yield DONE
                return
            if not await jobs.feed.until(ticket, BEAT):
                yield b": still here\n\n"
        finally:
            ticket.cancel()


def follow(api: Api, events: Events) -> EventStream:
    """A response that streams `events`. Raises `TooManyRequests` at the limit of followers."""
    most = api.settings.server.max_event_streams
    if api.event_streams >= most:
        raise TooManyRequests(
            f"{most} clients follow jobs' events already (server.max_event_streams). Try again later, or ask without "
            "`Accept: text/event-stream`.",
            retry_after=5,
        )
    api.event_streams += 1

    def left() -> None:
        api.event_streams -= 1

    return EventStream(events, left)


def first_number(request: AnyRequest) -> int:
    """Number after which events begin: Last-Event-ID, which a browser sends when it reconnects, or `after`."""
    last = request.headers.get("last-event-id")
    if last is None:
        return integer(request, "after", default=0, least=0, most=_MOST)
    return number(last, "Last-Event-ID", least=0, most=_MOST)


MAX_EVENTS = 1000
MAX_ROWS = 10_000
MAX_LINES = 10_000

_ALL = 2**31

_EVENTS_QUERY = {"after": whole(0, _MOST), "limit": whole(1, MAX_EVENTS)}
_METRICS_QUERY = {"after": whole(0, _ALL), "limit": whole(1, MAX_ROWS)}
_LOGS_QUERY = {"lines": whole(1, MAX_LINES)}

_COLUMNS = (
    "type", "step", "epoch", "loss", "accuracy", "learning_rate", "grad_norm", "tokens", "trained_tokens", "seconds",
    "busy_seconds",
)  # fmt: skip


@get("/admin/jobs", opt={TRAIN: True, QUERY: page_query(MAX_PAGE, status={"enum": list(STATES)})})
async def list_jobs(request: AnyRequest) -> ObjectPage[JobItem]:
    """The newest jobs first. `after` takes an id, `limit` up to 100, `order` asc or desc, `status` one or several
    states."""
    page = page_request(request, further=("status",))
    found, more = await _jobs(request).store.page(
        after=page.after,
        limit=page.limit,
        states=choices(request, "status", STATES),
        owner=visible_to(record_of(request)),
        newest_first=page.newest_first,
    )
    return object_page([job_item(job, progress) for job, progress in found], more)


@get("/admin/jobs/{job_id:str}", opt={TRAIN: True})
async def retrieve_job(request: AnyRequest) -> JobDetail:
    """One job, with its plan, files and checkpoints."""
    check_names(request, ())
    return await detail_of(_jobs(request), await job_id_of(request))


@get("/admin/jobs/{job_id:str}/recipe", media_type=YAML, opt={TRAIN: True})
async def job_recipe(request: AnyRequest) -> Response[bytes]:
    """The recipe of a job, as it was sent."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ())
    job, _ = await jobs.store.describe(job_id)
    return Response(job.recipe, media_type=YAML)


@get("/admin/jobs/{job_id:str}/files/{name:path}", media_type="application/octet-stream", opt={TRAIN: True})
async def job_file(request: AnyRequest) -> Response[bytes]:
    """A data file that came with a job's recipe, by its name in `files`; 404 once it was deleted."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ())
    name = str(request.path_params["name"]).removeprefix("/")
    file = next((one for one in await jobs.store.files(job_id) if one.name == name), None)
    if file is None:
        raise NotFound(f"The job has no file `{name[:100]}`.", code="file_not_found")
    try:
        opened = await asyncio.to_thread(open, jobs.directories.uploads(job_id) / file.stored_as, "rb")
    except FileNotFoundError as error:
        raise NotFound(f"The file `{name[:100]}` was deleted.", code="file_not_found") from error
    except OSError as error:
        raise storage_unavailable("The file cannot be read", error) from error
    headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff"}
    return Stream(file_pieces(opened), media_type="application/octet-stream", headers=headers)  # type: ignore[return-value]


@get("/admin/jobs/{job_id:str}/events", opt={TRAIN: True, QUERY: _EVENTS_QUERY, ALSO: "text/event-stream"})
async def job_events(request: AnyRequest) -> Response[Page[EventItem]]:
    """Events numbered above `after`. With `Accept: text/event-stream`: also future events, until the job's end;
    continues after Last-Event-ID."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ("after", "limit"))
    limit = integer(request, "limit", default=100, least=1, most=MAX_EVENTS)
    after = first_number(request)
    if "text/event-stream" in request.headers.get("accept", ""):
        return follow(api_of(request), event_stream(jobs, job_id, after))
    _, events = await jobs.store.events(job_id, after=after, limit=limit + 1)
    return Response(Page(data=[event_item(event) for event in events[:limit]], has_more=len(events) > limit))


@get("/admin/jobs/{job_id:str}/metrics", opt={TRAIN: True, QUERY: _METRICS_QUERY, ALSO: "text/csv"})
async def job_metrics(request: AnyRequest) -> Response[Page[dict[str, Any]]]:
    """A row for each step and each evaluation after step `after`; as CSV with `Accept: text/csv`. Without `after`, also
    the evaluation before the first step, of step 0."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ("after", "limit"))
    limit = integer(request, "limit", default=MAX_ROWS, least=1, most=MAX_ROWS)
    after = integer(request, "after", default=-1, least=0, most=_ALL)
    found = await jobs.store.metrics(job_id, after=after, limit=limit + 1)
    if "text/csv" in request.headers.get("accept", ""):
        return Response(await asyncio.to_thread(_csv, found[:limit]), media_type="text/csv")  # type: ignore[arg-type]
    return Response(Page(data=found[:limit], has_more=len(found) > limit))


@get("/admin/jobs/{job_id:str}/logs", media_type="application/jsonl", opt={TRAIN: True, QUERY: _LOGS_QUERY})
async def job_logs(request: AnyRequest) -> Response[bytes]:
    """The last `lines` of the job's log, a JSON object each."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ("lines",))
    lines = integer(request, "lines", default=1000, least=1, most=MAX_LINES)
    text = await asyncio.to_thread(tail, jobs.directories.log(job_id), lines)
    return Response(text, media_type="application/jsonl")


@post("/admin/jobs/{job_id:str}/cancel", opt={TRAIN: True}, status_code=200)
async def cancel_job(request: AnyRequest) -> JobDetail:
    """Cancel a job: at once, or, if it is running, after the current step (`wanted` is then cancel). 409 at its end."""
    jobs = _jobs(request)
    job = await jobs.cancel(await job_id_of(request))
    return await detail_of(jobs, job.id)


@post("/admin/jobs/{job_id:str}/pause", opt={TRAIN: True}, status_code=200)
async def pause_job(request: AnyRequest) -> JobDetail:
    """Pause a queued or a running job; a running one stops after the current step, with a checkpoint. Other jobs
    run meanwhile. 409 for any other."""
    jobs = _jobs(request)
    job = await jobs.pause(await job_id_of(request))
    return await detail_of(jobs, job.id)


@post("/admin/jobs/{job_id:str}/resume", opt={TRAIN: True}, status_code=200)
async def resume_job(request: AnyRequest) -> JobDetail:
    """Queue a paused job again, or one that has failed and has a checkpoint; it continues from there. 409 for any
    other (`resumable` is false)."""
    jobs = _jobs(request)
    job = await jobs.resume(await job_id_of(request))
    return await detail_of(jobs, job.id)


class RerunRequest(msgspec.Struct, kw_only=True):
    """Changes to the recipe of a job that is started again."""

    set: dict[str, Any] = {}
    """Path of a key, such as `learning_rate` or `publish.when`, to its new value; null takes it out."""


_rerun = Intake(RerunRequest)


@post(
    "/admin/jobs/{job_id:str}/rerun",
    opt={TRAIN: True, BODY: RerunRequest, QUERY: {"dry_run": FLAG}, ANSWERS: SUBMITTED},
    status_code=201,
)
async def rerun_job(request: AnyRequest) -> Response[JobDetail | DryRun]:
    """Start a new job with the recipe and the data files of another, and changes (`set`). `dry_run=1` asks for the plan
    only. 409 where the files were deleted."""
    api_of(request).handle.require()
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ("dry_run",))
    only_plan = flag(request, "dry_run")
    asked = await _rerun.read(request, api_of(request))
    job = await jobs.store.get(job_id)
    with jobs.arriving():
        recipe = await asyncio.to_thread(changed_recipe, job.recipe, asked.set)
        submission = await jobs.copy_of(job_id, recipe, owner=record_of(request).tenant)
        if only_plan:
            record_of(request).action = ""  # it changes nothing
            prepared = await jobs.dry_run(submission)
            plan = DryRun(name=prepared.name, total_steps=prepared.total_steps, summary=prepared.summary)
            return Response(plan, status_code=200)
    made, _ = await jobs.submit(submission)
    changes = ", ".join(f"{key} = {msgspec.json.encode(value).decode()}" for key, value in asked.set.items())
    await jobs.store.note(made.id, Note(f"Started from {job_id}" + (f" with {changes[:1000]}." if changes else ".")))
    record_of(request).target = made.id
    location = {"Location": f"/admin/jobs/{made.id}"}
    status = 202 if made.state == "validating" else 201
    return Response(await detail_of(jobs, made.id), status_code=status, headers=location)


@get("/admin/jobs/{job_id:str}/report", media_type="text/html", opt={TRAIN: True})
async def job_report(request: AnyRequest) -> Response[str]:
    """The job as one HTML page: curves, evaluations, answers, data, recipe and versions."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ())
    store = jobs.store
    job, progress = await store.describe(job_id)
    report = JobReport(
        job=job,
        progress=progress,
        files=await store.files(job_id),
        checkpoints=await store.checkpoints(job_id),
        metrics=await store.thinned_metrics(job_id, limit=MAX_ROWS),
        answers=await store.answers(job_id),
    )
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(await asyncio.to_thread(render_report, report), media_type="text/html", headers=headers)


@delete("/admin/jobs/{job_id:str}", opt={TRAIN: True}, status_code=200)
async def delete_job(request: AnyRequest) -> JobDeleted:
    """Delete a job that has ended: its files, checkpoints, events and log. The adapter that it published stays. 409
    for one that has not ended."""
    jobs, job_id = _jobs(request), await job_id_of(request)
    check_names(request, ())
    await jobs.delete(job_id)
    return JobDeleted(id=job_id)


def _jobs(request: AnyRequest) -> JobManager:
    return api_of(request).handle.require_jobs()


def _csv(rows: list[dict[str, Any]]) -> str:
    """One column for each field, then one for each of the loss's own metrics."""
    further = sorted({name for row in rows for name in row.get("metrics", {})} - set(_COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, *further], restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row.get("metrics", {}), **row} for row in rows)
    return text.getvalue()
