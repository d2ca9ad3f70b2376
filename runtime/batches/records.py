"""The nouns of batches: states and their transitions, a batch's row, the answer to one line."""

import re
from typing import Literal, Protocol, get_args

from msgspec import Struct, field

from runtime.files.store import StoredFile

FOLDER = "batches"
"""Folder in the state directory; each batch has a folder of its own there, named for its id."""
RECORD = "batch.json"
"""File in a batch's folder: a copy of its row, and of those of the files that it wrote, in case they are lost."""

State = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
STATES: tuple[State, ...] = get_args(State)

TRANSITIONS: dict[State, frozenset[State]] = {
    "validating": frozenset({"in_progress", "failed", "cancelling", "expired"}),
    "in_progress": frozenset({"finalizing", "cancelling", "expired", "failed"}),
    "finalizing": frozenset({"completed", "failed"}),
    "cancelling": frozenset({"cancelled", "failed"}),
    "failed": frozenset(),
    "completed": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}

ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)

STAMPED: dict[State, str] = {state: f"{state}_at" for state in STATES if state != "validating"}
"""State → the column with the time at which it began."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)

MAX_WINDOW_SECONDS = 30 * 86400
"""Longest completion window."""

_WINDOW = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

MAX_CUSTOM_ID = 256
"""Characters of a line's `custom_id`."""

MAX_LISTED_ERRORS = 100
"""Most errors that a failed batch's row lists; the error file has them all."""


def window_seconds(text: str) -> int | None:
    """Seconds of a completion window such as `24h`; None for anything else."""
    match = _WINDOW.fullmatch(text)
    if match is None:
        return None
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]]
    return seconds if seconds <= MAX_WINDOW_SECONDS else None


class LineError(Struct, frozen=True, kw_only=True):
    """A fault of the input file."""

    code: str
    message: str
    line: int | None = None
    """Number of the line, from 1; None for a fault of the whole file."""
    param: str | None = None


class Counts(Struct, kw_only=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class CachedTokens(Struct, kw_only=True):
    """`input_tokens_details` of a batch's usage."""

    cached_tokens: int = 0


class ReasoningTokens(Struct, kw_only=True):
    """`output_tokens_details` of a batch's usage."""

    reasoning_tokens: int = 0


class BatchUsage(Struct, kw_only=True):
    """Tokens of all answers of a batch."""

    input_tokens: int = 0
    input_tokens_details: CachedTokens = field(default_factory=CachedTokens)
    output_tokens: int = 0
    output_tokens_details: ReasoningTokens = field(default_factory=ReasoningTokens)
    total_tokens: int = 0


class Batch(Struct, frozen=True, kw_only=True):
    """One row. Times are seconds since the epoch."""

    id: str
    owner: str
    """Tenant label of the key that it belongs to."""
    status: State
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_lifetime: int | None = None
    """Seconds after which its output files are deleted."""
    model: str | None = None
    """Model of the first line."""
    errors: list[LineError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: BatchUsage | None = None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class BatchRecord(Struct, frozen=True, kw_only=True):
    """The record of a batch in its folder."""

    batch: Batch
    outputs: list[StoredFile] = []


class Answer(Struct, frozen=True, kw_only=True):
    """Response to one line, as an HTTP client would get it."""

    status: int
    body: bytes
    """JSON."""
    request_id: str
    retry_after: float | None = None
    """Seconds that the response asks to wait before another try."""


class Ask(Protocol):
    """Answers one request, over the path that requests of HTTP take."""

    async def __call__(self, path: str, body: bytes, *, owner: str) -> Answer:
        """`owner`: tenant label whose request it is. When the caller is cancelled, so is the request."""
