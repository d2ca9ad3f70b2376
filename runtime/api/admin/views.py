"""What the admin endpoints answer: jobs and what belongs to them, in the shapes that OpenAI's lists have."""

import time
from typing import Any, Generic, TypeVar

from msgspec import Struct

from runtime.trainer.jobs.records import Checkpoint, Job, JobEvent, JobFile, Progress

T = TypeVar("T")


class Page(Struct, Generic[T], kw_only=True):
    object: str = "list"
    data: list[T]
    has_more: bool = False


class JobFailure(Struct):
    code: str
    message: str
    param: str | None = None


class JobItem(Struct, kw_only=True):
    """A job in a list. Times are whole seconds since the epoch."""

    object: str = "job"
    id: str
    status: str
    name: str | None
    """Of the adapter; null until the recipe was read."""
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    step: int
    total_steps: int | None
    loss: float | None
    """Of the last step."""
    trained_tokens: int
    wanted: str | None
    """cancel or pause: takes effect after the step that is running."""
    adapter: str | None
    """The version that was published: a model name for requests. Null in a job that succeeded: the recipe's
    `publish.when` was not met."""
    error: JobFailure | None


class CheckpointItem(Struct, kw_only=True):
    step: int
    best: bool
    created_at: int


class FileItem(Struct, kw_only=True):
    name: str
    bytes: int


class JobDetail(JobItem, kw_only=True):
    """One job, asked for by its id."""

    summary: dict[str, Any]
    """The plan: rows, tokens, steps, estimates."""
    files: list[FileItem]
    checkpoints: list[CheckpointItem]


class EventItem(Struct, kw_only=True):
    object: str = "job.event"
    id: str
    """A number that counts up in its job: what `after` and Last-Event-ID take."""
    created_at: int
    level: str
    type: str
    """message or metrics"""
    message: str
    data: dict[str, Any]


class DryRun(Struct, kw_only=True):
    """What a recipe would do."""

    object: str = "job.plan"
    name: str
    total_steps: int
    summary: dict[str, Any]


def job_item(job: Job, progress: Progress) -> JobItem:
    return JobItem(**_fields(job, progress))


def job_detail(job: Job, progress: Progress, files: list[JobFile], checkpoints: list[Checkpoint]) -> JobDetail:
    return JobDetail(
        **_fields(job, progress),
        summary=job.summary,
        files=[FileItem(name=file.name, bytes=file.bytes) for file in files],
        checkpoints=[
            CheckpointItem(step=checkpoint.step, best=checkpoint.best, created_at=int(checkpoint.created_at))
            for checkpoint in checkpoints
        ],
    )


def event_item(event: JobEvent) -> EventItem:
    return EventItem(
        id=str(event.number),
        created_at=int(event.created_at),
        level=event.level,
        type="message" if event.kind == "message" else "metrics",
        message=event.message,
        data=event.data,
    )


def _fields(job: Job, progress: Progress) -> dict[str, Any]:
    error = job.error
    return {
        "id": job.id,
        "status": job.state,
        "name": job.name,
        "created_at": int(job.created_at),
        "started_at": _seconds(job.started_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _estimated_finish(job, progress),
        "step": progress.step,
        "total_steps": job.total_steps,
        "loss": progress.loss,
        "trained_tokens": progress.trained_tokens,
        "wanted": job.wanted,
        "adapter": job.adapter,
        "error": error and JobFailure(error.code, error.message, error.param),
    }


def _estimated_finish(job: Job, progress: Progress) -> int | None:
    if job.state != "running" or job.total_steps is None or progress.step_seconds is None:
        return None
    return int(time.time() + (job.total_steps - progress.step) * progress.step_seconds)


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
