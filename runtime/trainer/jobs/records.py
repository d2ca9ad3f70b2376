"""The nouns of jobs, as the store gives them out."""

from typing import Any, Literal

from msgspec import Struct

from runtime.trainer.jobs.states import ENDED, State

Wanted = Literal["cancel", "pause"]
Level = Literal["info", "warning", "error"]
Kind = Literal["message", "step", "eval"]


class JobError(Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobFile(Struct, frozen=True, kw_only=True):
    """A data file that was sent with the recipe."""

    name: str
    """As the client called it, and as the recipe names it."""
    stored_as: str
    """Its name in the job's folder of uploads."""
    bytes: int


class Submission(Struct, frozen=True, kw_only=True):
    """A job that is asked for. Its files are in place already."""

    id: str
    recipe: bytes
    files: tuple[JobFile, ...] = ()
    digest: str = ""
    """Of recipe and files: what "the same body" means for an idempotency key."""
    idempotency_key: str | None = None


class Job(Struct, frozen=True, kw_only=True):
    """One row. Times are in seconds since the epoch."""

    id: str
    state: State
    name: str | None
    """Of the adapter; None until the recipe was read."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    recipe: bytes
    summary: dict[str, Any]
    total_steps: int | None
    wanted: Wanted | None
    """What somebody asked for that takes effect at the next step's end."""
    attempts: int
    """Starts in a row that brought no checkpoint."""
    error: JobError | None
    adapter: str | None
    """The version that was published. None in a job that succeeded: its recipe's gate was not passed."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Progress(Struct, frozen=True, kw_only=True):
    """How far a job is, from what its run reported."""

    step: int = 0
    loss: float | None = None
    trained_tokens: int = 0
    step_seconds: float | None = None
    """Mean of the last steps."""


class JobEvent(Struct, frozen=True, kw_only=True):
    """Something that happened, numbered from 1 in its job."""

    number: int
    created_at: float
    level: Level
    kind: Kind
    message: str
    data: dict[str, Any]


class Note(Struct, frozen=True):
    """An event about to be stored."""

    message: str
    level: Level = "info"
    data: dict[str, Any] = {}
    kind: Kind = "message"
    step: int | None = None


class Checkpoint(Struct, frozen=True, kw_only=True):
    step: int
    best: bool
    created_at: float
