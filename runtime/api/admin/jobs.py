"""/admin/jobs: what jobs there are, how they are doing, and holding or ending them."""

import asyncio
import csv
import io
from typing import Any

from litestar import Response, get, post

from runtime.api.admin.job_events import event_stream, first_number
from runtime.api.admin.query import check_names, choices, integer
from runtime.api.admin.train import detail_of
from runtime.api.admin.views import EventItem, JobDetail, JobItem, Page, event_item, job_item
from runtime.api.auth import ADMIN
from runtime.api.handle import AnyRequest, api_of
from runtime.api.sse import EventStream
from runtime.trainer.jobs.journal import tail
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.states import STATES

MAX_JOBS = 100
MAX_EVENTS = 1000
MAX_ROWS = 10_000
MAX_LINES = 10_000

_ALL = 2**31

_COLUMNS = (
    "type", "step", "epoch", "loss", "accuracy", "learning_rate", "grad_norm", "tokens", "trained_tokens", "seconds",
    "busy_seconds",
)  # fmt: skip


@get("/admin/jobs", opt={ADMIN: True})
async def list_jobs(request: AnyRequest) -> Page[JobItem]:
    """The newest jobs first. `after` takes an id, `limit` up to 100, `status` one or several states."""
    check_names(request, ("after", "limit", "status"))
    found, more = await _jobs(request).store.page(
        after=request.query_params.get("after"),
        limit=integer(request, "limit", default=20, least=1, most=MAX_JOBS),
        states=choices(request, "status", STATES),
    )
    return Page(data=[job_item(job, progress) for job, progress in found], has_more=more)


@get("/admin/jobs/{job_id:str}", opt={ADMIN: True})
async def retrieve_job(request: AnyRequest) -> JobDetail:
    """One job, with its plan, files and checkpoints."""
    check_names(request, ())
    return await detail_of(_jobs(request), _job_id(request))


@get("/admin/jobs/{job_id:str}/events", opt={ADMIN: True})
async def job_events(request: AnyRequest) -> Response[Page[EventItem]]:
    """What happened, from behind the number `after`. With `Accept: text/event-stream`: also what is still to
    come, until the job's end; goes on from Last-Event-ID."""
    jobs, job_id = _jobs(request), _job_id(request)
    check_names(request, ("after", "limit"))
    limit = integer(request, "limit", default=100, least=1, most=MAX_EVENTS)
    after = first_number(request)
    if "text/event-stream" in request.headers.get("accept", ""):
        await jobs.store.get(job_id)
        return EventStream(event_stream(jobs, job_id, after), lambda: None)
    _, events = await jobs.store.events(job_id, after=after, limit=limit + 1)
    return Response(Page(data=[event_item(event) for event in events[:limit]], has_more=len(events) > limit))


@get("/admin/jobs/{job_id:str}/metrics", opt={ADMIN: True})
async def job_metrics(request: AnyRequest) -> Response[Page[dict[str, Any]]]:
    """A row for each step and each evaluation behind the step `after`; as CSV with `Accept: text/csv`."""
    jobs, job_id = _jobs(request), _job_id(request)
    check_names(request, ("after", "limit"))
    limit = integer(request, "limit", default=MAX_ROWS, least=1, most=MAX_ROWS)
    after = integer(request, "after", default=0, least=0, most=_ALL)
    found = await jobs.store.metrics(job_id, after=after, limit=limit + 1)
    if "text/csv" in request.headers.get("accept", ""):
        return Response(await asyncio.to_thread(_csv, found[:limit]), media_type="text/csv")  # type: ignore[arg-type]
    return Response(Page(data=found[:limit], has_more=len(found) > limit))


@get("/admin/jobs/{job_id:str}/logs", opt={ADMIN: True})
async def job_logs(request: AnyRequest) -> Response[bytes]:
    """The last `lines` of the job's log, a JSON object each."""
    jobs, job_id = _jobs(request), _job_id(request)
    check_names(request, ("lines",))
    lines = integer(request, "lines", default=1000, least=1, most=MAX_LINES)
    await jobs.store.get(job_id)
    text = await asyncio.to_thread(tail, jobs.directories.log(job_id), lines)
    return Response(text, media_type="application/jsonl")


@post("/admin/jobs/{job_id:str}/cancel", opt={ADMIN: True}, status_code=200)
async def cancel_job(request: AnyRequest) -> JobDetail:
    """End a job: at once, or where it is running, after the current step (`wanted` says so). 409 at its end."""
    jobs = _jobs(request)
    job = await jobs.cancel(_job_id(request))
    return await detail_of(jobs, job.id)


@post("/admin/jobs/{job_id:str}/pause", opt={ADMIN: True}, status_code=200)
async def pause_job(request: AnyRequest) -> JobDetail:
    """Hold a queued or a running job, the latter after the current step and with a checkpoint. Others go first
    meanwhile. 409 for any other."""
    jobs = _jobs(request)
    job = await jobs.pause(_job_id(request))
    return await detail_of(jobs, job.id)


@post("/admin/jobs/{job_id:str}/resume", opt={ADMIN: True}, status_code=200)
async def resume_job(request: AnyRequest) -> JobDetail:
    """Let a paused job go on where it stood, once it is its turn. 409 for any other."""
    jobs = _jobs(request)
    job = await jobs.resume(_job_id(request))
    return await detail_of(jobs, job.id)


def _job_id(request: AnyRequest) -> str:
    return str(request.path_params["job_id"])


def _jobs(request: AnyRequest) -> JobManager:
    return api_of(request).handle.require_jobs()


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
