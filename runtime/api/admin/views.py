"""Answers of the admin endpoints: jobs, their events and files, in the form of OpenAI's lists."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from runtime.api.handle import Api
from runtime.errors import Forbidden, NotFound, StorageUnavailable
from runtime.support.state_directory import state_directory
from runtime.trainer.jobs.records import Job, JobCheckpoint, JobEvent, JobFile, JobProgress

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary


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
    """Name of the adapter; null until the recipe was read."""
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    step: int
    step_progress: float | None
    """Fraction of the current step or evaluation that is done, 0 to 1, if it takes more than some seconds."""
    total_steps: int | None
    rows_read: int | None
    """Rows of the data that were read so far, while the job is validating and that takes more than some seconds."""
    loss: float | None
    """Loss of the last step."""
    trained_tokens: int
    wanted: str | None
    """Pending request, cancel or pause: takes effect after the running step."""
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


class SampleItem(Struct, kw_only=True):
    """A row of the evaluation, and what the model answered."""

    prompt: str
    reference: str
    before: str | None
    """Answer of the first evaluation: before the first step, where nothing went wrong."""
    after: str | None
    """Answer of the last one; null where there was one alone."""


class GateReport(Struct, kw_only=True):
    """The decision of a recipe's gate."""

    condition: str
    """`publish.when` of the recipe."""
    met: bool
    reason: str
    metrics: dict[str, float]
    """Metrics that it was decided with: `train_…`, `eval_…`, and `base_…` of the model before the first step."""


class JobDetail(JobItem, kw_only=True):
    """One job, in full."""

    summary: dict[str, Any]
    """The plan: rows, tokens, steps, estimates."""
    files: list[FileItem]
    checkpoints: list[CheckpointItem]
    samples: list[SampleItem]
    """Generated answers, of recipes that have some shown (`eval_table_size`)."""
    gate: GateReport | None
    """Null before the gate was asked."""
    resumable: bool
    """True for a job that `/admin/jobs/{job_id}/resume` can continue: a paused one, and a failed one whose checkpoint,
    data files and base model are there."""


class JobDeleted(Struct, kw_only=True):
    object: str = "job"
    id: str
    deleted: bool = True


class EventItem(Struct, kw_only=True):
    object: str = "job.event"
    id: str
    """Number within the job, ascending: the value for `after` and Last-Event-ID."""
    created_at: int
    level: str
    type: str
    """message or metrics"""
    message: str
    data: dict[str, Any]


class DryRun(Struct, kw_only=True):
    """Plan of a recipe that was not started."""

    object: str = "job.plan"
    name: str
    total_steps: int
    summary: dict[str, Any]


def job_item(job: Job, progress: JobProgress) -> JobItem:
    """A job as lists show it."""
    return JobItem(**_fields(job, progress))


def sample_items(answers: list[dict[str, Any]]) -> list[SampleItem]:
    """Samples before and after training; `answers` as `JobReader.answers` has them."""
    if not answers:
        return []
    first = {one["prompt"]: one["answer"] for one in answers[0]["samples"]}
    shown = answers[-1]["samples"]
    return [
        SampleItem(
            prompt=one["prompt"],
            reference=one["reference"],
            before=first.get(one["prompt"]),
            after=one["answer"] if len(answers) > 1 else None,
        )
        for one in shown
    ]


def job_detail(
    job: Job,
    progress: JobProgress,
    files: list[JobFile],
    checkpoints: list[JobCheckpoint],
    answers: list[dict[str, Any]],
    gate: dict[str, Any] | None,
    *,
    resumable: bool,
) -> JobDetail:
    """A job in full."""
    return JobDetail(
        **_fields(job, progress),
        summary=job.summary,
        files=[FileItem(name=file.name, bytes=file.bytes) for file in files],
        checkpoints=[
            CheckpointItem(step=checkpoint.step, best=checkpoint.best, created_at=int(checkpoint.created_at))
            for checkpoint in checkpoints
        ],
        samples=sample_items(answers),
        gate=None if gate is None else GateReport(**gate),
        resumable=resumable,
    )


def event_item(event: JobEvent) -> EventItem:
    """An event as clients see it."""
    return EventItem(
        id=str(event.number),
        created_at=int(event.created_at),
        level=event.level,
        type="metrics" if event.kind in ("step", "eval") else "message",
        message=event.message,
        data=event.data,
    )


def _fields(job: Job, progress: JobProgress) -> dict[str, Any]:
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
        "step_progress": progress.fraction if job.state == "running" else None,
        "total_steps": job.total_steps,
        "rows_read": progress.rows_read if job.state == "validating" else None,
        "loss": progress.loss,
        "trained_tokens": progress.trained_tokens,
        "wanted": job.wanted,
        "adapter": job.adapter,
        "error": error and JobFailure(error.code, error.message, error.param),
    }


def _estimated_finish(job: Job, progress: JobProgress) -> int | None:
    if job.state != "running" or job.total_steps is None:
        return None
    if progress.finish is not None:
        return int(max(progress.finish, time.time()))
    if progress.step_seconds is None:
        return None
    return int(time.time() + (job.total_steps - progress.step) * progress.step_seconds)


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


# -- library ---------------------------------------------------------------------------------------
#
# Helpers that the endpoints for adapters share: the library, and the folders that may be read.


def library_of(api: Api) -> "AdapterLibrary":
    """The adapter library. Raises `StorageUnavailable` if the server has none, or has it read-only."""
    library = api.handle.require_latest().adapters
    if library is None:
        raise StorageUnavailable(
            "This server keeps no adapters: its state directory could not be opened when it started (another server "
            "may have it; the log says why). Set trainer.state_dir."
        )
    if library.frozen is not None:
        raise StorageUnavailable(library.frozen)
    return library


def allowed_folder(path: str, api: Api, *, param: str) -> Path:
    """The folder that `path` names, links resolved. Blocks.

    Only under trainer.data_roots and the state directory: the right to load adapters does not cover the whole disk.
    Raises `Forbidden` for other paths, existing or not, and `NotFound`.
    """
    roots = [Path(root).expanduser() for root in api.settings.trainer.data_roots] + [state_directory(api.settings)]
    try:
        real = Path(path).expanduser().resolve()
        inside = any(real.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL, no such user
        inside = False
    if not inside:
        raise Forbidden(
            f"{param} must be in a folder that the setting trainer.data_roots names, or in the state directory.",
            param=param,
        )
    if not real.is_dir():
        raise NotFound(f"{param}: there is no such folder.", param=param)
    return real
