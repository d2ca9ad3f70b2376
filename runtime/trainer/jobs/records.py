"""The nouns of jobs, as the store gives them out."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from msgspec import Struct

from runtime.events import ReadingEvent, RunEvent
from runtime.trainer.recipe import Publish, Recipe

# -- states ----------------------------------------------------------------------------------------
#
# The states of a job, and which may follow which.

JobState = Literal[
    "validating",
    "queued",
    "running",
    "paused",
    "evaluating",
    "publishing",
    "succeeded",
    "failed",
    "cancelled",
    "interrupted",
]
STATES: tuple[JobState, ...] = get_args(JobState)

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    "validating": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"paused", "evaluating", "failed", "cancelled", "interrupted"}),
    "paused": frozenset({"running", "queued", "failed", "cancelled"}),
    "evaluating": frozenset({"publishing", "succeeded", "failed", "cancelled", "interrupted"}),
    "publishing": frozenset({"succeeded", "failed", "interrupted"}),
    # The process ended while the job was at work; the next process decides at its start.
    "interrupted": frozenset({"queued", "paused", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),  # resumed, from its newest checkpoint
    "cancelled": frozenset(),
}

ENDED: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})
AT_WORK: frozenset[JobState] = frozenset({"running", "evaluating", "publishing"})
"""At most one job is in one of these: the one that the manager holds."""
WAITING: frozenset[JobState] = frozenset({"validating", "queued"})
"""Counted by `trainer.max_queued_jobs`."""


PendingAction = Literal["cancel", "pause"]
Level = Literal["info", "warning", "error"]
EventKind = Literal["message", "step", "eval", "answers", "progress", "reading"]


class JobError(Struct, frozen=True):
    """Reason for a job's failure."""

    code: str
    message: str
    param: str | None = None


class JobFile(Struct, frozen=True, kw_only=True):
    """A data file that was sent with the recipe."""

    name: str
    """Name that the client sent, and that the recipe uses."""
    stored_as: str
    """Its name in the job's folder of uploads."""
    bytes: int


class JobSubmission(Struct, frozen=True, kw_only=True):
    """A job that is submitted. Its files are in place already."""

    id: str
    recipe: bytes
    files: tuple[JobFile, ...] = ()
    digest: str = ""
    """Digest of recipe and files: equal ones are "the same body" for an idempotency key."""
    idempotency_key: str | None = None
    owner: str = ""
    """Tenant label of the key that it belongs to; "" without keys."""


class Job(Struct, frozen=True, kw_only=True):
    """One row. Times are in seconds since the epoch."""

    id: str
    state: JobState
    name: str | None
    """Name of the adapter; None until the recipe was read."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    recipe: bytes
    summary: dict[str, Any]
    total_steps: int | None
    wanted: PendingAction | None
    """Request that takes effect at the next step's end."""
    attempts: int
    """Starts in a row that brought no checkpoint."""
    error: JobError | None
    adapter: str | None
    """The version that was published. None in a job that succeeded: its recipe's gate was not passed."""
    owner: str = ""
    """Tenant label of the key that it belongs to; "" for one that was made without keys."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class JobProgress(Struct, frozen=True, kw_only=True):
    """Progress of a job, from the reports of its run."""

    step: int = 0
    loss: float | None = None
    trained_tokens: int = 0
    step_seconds: float | None = None
    """Mean seconds of the last steps."""
    fraction: float | None = None
    """Share done of the activity under way, where that takes long; None without a report since the last step."""
    finish: float | None = None
    """Time at which the run will end at this pace, in seconds since the epoch, as it was last reported."""
    rows_read: int | None = None
    """Rows of the data that were read so far, as it was last reported; None from the first step on."""


class ThinnedMetrics(Struct, frozen=True, kw_only=True):
    """Steps and evaluations of a whole job, evenly chosen where there are many."""

    rows: list[dict[str, Any]]
    """As `JobReader.metrics` has them."""
    steps: int
    """Steps that there are."""
    evaluations: int


class JobEvent(Struct, frozen=True, kw_only=True):
    """Something that happened, numbered from 1 in its job."""

    number: int
    created_at: float
    level: Level
    kind: EventKind
    message: str
    data: dict[str, Any]


class Note(Struct, frozen=True):
    """An event about to be stored."""

    message: str
    level: Level = "info"
    data: dict[str, Any] = {}
    kind: EventKind = "message"
    step: int | None = None


class JobCheckpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint's row. `created_at`: seconds since the epoch."""

    step: int
    best: bool
    created_at: float


ADAPTER_FILES = "adapter_files"
"""Folder of the adapter in a checkpoint and in a result."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedJob:
    """A recipe that was read, checked and planned."""

    name: str
    """Name of the adapter that will be published. Empty: the job's id is its name."""
    summary: dict[str, Any]
    """The plan for people, as JSON has it. Where they are there, `save_total_limit` is acted on (the most checkpoints
    that are kept), `warnings` and `how_to_ask` become events of the job, and what was trained is only continued for
    the same `base_fingerprint`."""
    total_steps: int
    publish: Publish
    recipe: Recipe | None = None
    """The recipe, for its loggers; None: there are none."""
    plan: object
    """The engine's own; opaque here."""
    result_files: str = ADAPTER_FILES
    """Folder of a result that is published. Another one than the adapter's is in no checkpoint."""

    def publish_when(self, metrics: dict[str, float]) -> tuple[bool, str]:
        """True if the result is good enough to publish, and the reason. `metrics`: see `JobReader.gate_metrics`."""
        return self.publish.decide(metrics)


class JobRecord(Struct, frozen=True, kw_only=True):
    """A job as its folder keeps it beside its files: enough to make its row again."""

    job: Job
    digest: str
    idempotency_key: str | None
    files: tuple[JobFile, ...]


def new_record(submission: JobSubmission) -> JobRecord:
    """Record of a submitted job, before it has a row."""
    job = Job(
        id=submission.id,
        state="validating",
        name=None,
        created_at=time.time(),
        started_at=None,
        finished_at=None,
        recipe=submission.recipe,
        summary={},
        total_steps=None,
        wanted=None,
        attempts=0,
        error=None,
        adapter=None,
        owner=submission.owner,
    )
    return JobRecord(
        job=job, digest=submission.digest, idempotency_key=submission.idempotency_key, files=submission.files
    )


# -- job engine ------------------------------------------------------------------------------------
#
# The interface through which jobs reach the engine. The engine's side implements it; tests fill it with fakes.


class RunHandle(Protocol):
    """A run. Its methods are called on the event loop; the first three take effect at the next optimiser
    step's end, and the event that says so follows."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def cancel(self) -> None: ...

    async def take_snapshot(self, step: int) -> Callable[[Path], None]:
        """Writer of the snapshot of `step`, with everything to continue from there; to be called after the checkpoint,
        paused or finished event of that step.

        The writer writes all files into an empty directory and fsyncs them. It blocks, and runs in a worker thread. For
        a finished run, the sub-directory `adapter_files` holds the adapter in PEFT's format.
        """

    def close(self) -> None:
        """Release everything, at any point of the run. No event follows."""


class JobEngine(Protocol):
    """The engine, as jobs need it: to read recipes, to train, and to publish."""

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's weights."""

    def prepare(
        self,
        recipe: bytes,
        uploads: Mapping[str, Path],
        kept: Path | None,
        on_reading: Callable[[ReadingEvent], None] | None = None,
    ) -> PreparedJob:
        """Read a recipe and its data; `uploads` has the files sent along, by the names they were sent under.

        `kept`: file for the prepared data of a job, which is read from there where it was written before; None for a
        recipe that is not to become a job. Blocks, and is called in a thread of its own, where `on_reading` is called
        too. Raises `RequestError` (400, 403, 404) with `param`.
        """

    def start(
        self, job_id: str, prepared: PreparedJob, resume_from: Path | None, on_event: Callable[[RunEvent], None]
    ) -> RunHandle:
        """Start the training of a job, from the beginning or from a snapshot's directory, beside the runs at work.

        Called on the event loop, where `on_event` is called too, in order. Raises `RequestError`.
        """

    def memory_for_jobs(self) -> int:
        """Bytes that the jobs at work may take together, by their plans, before another one starts."""

    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        """Make the files in `source`, a result's `PreparedJob.result_files`, the newest version of `name`, and return
        its label (`name@3`).

        A job that was published before a crash is published again after it: the same `job_id` gives the
        version that is there. Raises `RequestError`.
        """

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        """Make the PEFT files in these folders available to requests, by their steps, and withdraw earlier ones that
        are not among them. Not stored: without a job that runs there are none."""
