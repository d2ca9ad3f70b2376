"""The app's hold on the engine, which may still be loading. Never imports the engine: that imports torch.

Handlers find it in the app's state (`api_of`).
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from litestar import Request
from msgspec import Struct

from runtime.access import Access
from runtime.api.http.event_log import EventLogs
from runtime.errors import EngineUnavailable, ModelLoading
from runtime.support.event_loop import BackgroundTasks, LagSampler, is_set_within
from settings.schema import ObservabilitySettings, Settings

if TYPE_CHECKING:
    from runtime.batches.manager import BatchManager
    from runtime.batches.records import Ask
    from runtime.engine.service import EngineService
    from runtime.feedback import FeedbackStore
    from runtime.files.library import FileLibrary
    from runtime.responses import ResponseStore
    from runtime.support.tracing import Tracing
    from runtime.trainer.jobs.manager import JobManager


AnyRequest = Request[Any, Any, Any]


MAX_RECENT_REQUESTS = 300
MAX_WAIT_SECONDS = 60.0
"""Longest that a request waits for a model that is being loaded in place of another."""
MOVING = "The server is moving to another model. Try again in a moment."


class RequestEntry(Struct, frozen=True, kw_only=True):
    """One request that has ended: names, numbers and times, never a text."""

    id: str
    time: float
    """Of its end, in seconds since the epoch."""
    method: str
    handler: str
    """The route's template."""
    status: int
    milliseconds: float
    key: str
    """Name of the key that it came with; "" without keys."""
    details: dict[str, Any]
    """Fields of its log line: numbers of tokens, the error's code."""


class RequestGate:
    """Requests under way, by the model that they began with, and a door that can be shut for new ones. Event-loop
    thread only."""

    def __init__(self) -> None:
        self._model = 0
        """Number of models before."""
        self._under_way: Counter[int] = Counter()
        self._open = asyncio.Event()
        self._open.set()
        self._left = asyncio.Event()

    async def enter(self) -> int:
        """Begin a request; returns the number of its model, for `leave`. Waits while the door is shut. Raises
        `ModelLoading` after `MAX_WAIT_SECONDS`."""
        if not self._open.is_set() and not await is_set_within(self._open, MAX_WAIT_SECONDS):
            raise ModelLoading(MOVING)
        self._under_way[self._model] += 1
        return self._model

    def leave(self, model: int) -> None:
        """End a request."""
        self._under_way[model] -= 1
        if not self._under_way[model]:
            del self._under_way[model]
            self._left.set()

    def shut(self) -> None:
        """Have new requests wait."""
        self._open.clear()

    def open(self) -> None:
        """Let requests in, those that wait among them."""
        self._open.set()

    def next_model(self) -> None:
        """Count new requests as those of another model."""
        self._model += 1

    async def until_left(self, *, before: bool) -> None:
        """Wait until no request is under way, or, with `before`, none that began with a model before."""
        while any(model < self._model or not before for model in self._under_way):
            self._left.clear()
            await self._left.wait()


class ServiceHandle:
    """Holder of the engine service: set once the engine is loaded, read by every request. Event-loop thread only."""

    def __init__(self, service: "EngineService | None" = None, jobs: "JobManager | None" = None) -> None:
        self.service = service
        self.before: EngineService | None = None
        """While another model is loaded in its place: the service before, stopped, for what is asked of it still."""
        self.jobs = jobs
        self.gate = RequestGate()
        self.swapper: Any = None
        """The `ModelSwapper`, which knows this class; None where there is no server around the app."""
        self.files: FileLibrary | None = None
        self.batches: BatchManager | None = None
        self.inside: Ask | None = None
        """The app itself, for requests that the server makes; set when the app is made."""
        self.responses: ResponseStore | None = None
        self.feedback: FeedbackStore | None = None
        self.tracing: Tracing | None = None
        """Spans of requests and jobs; None where the settings do not ask for them."""
        self.recent: deque[RequestEntry] = deque(maxlen=MAX_RECENT_REQUESTS)
        """The last requests, but for probes."""
        self.no_jobs = "This server runs no training jobs."
        """Reason why there is no `jobs` although the engine is loaded."""
        self.problem: str | None = None
        """Reason why nothing can be stored, once the state directory was opened."""

    def serve(
        self,
        service: "EngineService",
        jobs: "JobManager | None",
        *,
        files: "FileLibrary | None" = None,
        batches: "BatchManager | None" = None,
        problem: str | None = None,
    ) -> None:
        """Serve requests from now on, and accept jobs, files and batches if they are given; `problem` is the reason for
        `None`."""
        self.jobs, self.files, self.batches = jobs, files, batches
        self.no_jobs = problem or self.no_jobs
        self.problem = problem
        self.service = service

    def replace(self, service: "EngineService | None") -> None:
        """Serve another model; None: the one before has stopped, and the next is not there yet."""
        if self.before is not None:
            self.before.set_adapters(None)
        self.before = self.service if service is None else None
        self.service = service

    def require(self) -> "EngineService":
        """The service. Raises `ModelLoading` while there is none."""
        if self.service is None:
            raise ModelLoading("The model is still loading. Try again in a moment." if self.before is None else MOVING)
        return self.service

    @property
    def latest(self) -> "EngineService | None":
        """The service, or the one before while another model is loaded in its place: for names, numbers and adapters.
        None while the first model loads."""
        return self.service or self.before

    def require_latest(self) -> "EngineService":
        """As `latest`. Raises `ModelLoading` while there is none."""
        return self.latest or self.require()

    def require_jobs(self) -> "JobManager":
        """The training jobs. Raises `EngineUnavailable` while, or where, there are none."""
        self.require_latest()
        if self.jobs is None:
            raise EngineUnavailable(self.no_jobs, code="training_unavailable")
        return self.jobs

    def require_files(self) -> "FileLibrary":
        """The stored files. Raises `EngineUnavailable` while, or where, there are none."""
        self.require_latest()
        if self.files is None:
            raise EngineUnavailable(f"This server stores no files. {self.no_jobs}", code="storage_unavailable")
        return self.files

    def require_feedback(self) -> "FeedbackStore":
        """The stored feedback. Raises `EngineUnavailable` while, or where, there is none."""
        self.require_latest()
        if self.feedback is None:
            raise EngineUnavailable(f"This server stores no feedback. {self.no_jobs}", code="storage_unavailable")
        return self.feedback

    def require_responses(self, kind: str = "responses") -> "ResponseStore":
        """The stored responses, chats among them. `kind`: what the error names. Raises `EngineUnavailable` while, or
        where, there are none."""
        self.require_latest()
        if self.responses is None:
            raise EngineUnavailable(f"This server stores no {kind}. {self.no_jobs}", code="storage_unavailable")
        return self.responses

    def require_batches(self) -> "BatchManager":
        """The batches. Raises `EngineUnavailable` while, or where, there are none."""
        self.require_files()
        if self.batches is None:
            raise EngineUnavailable(f"This server runs no batches. {self.no_jobs}", code="storage_unavailable")
        return self.batches


class Api:
    """Objects that every handler works with."""

    def __init__(
        self, handle: ServiceHandle, settings: Settings, access: Access, origins: Mapping[str, str] | None = None
    ) -> None:
        self.handle = handle
        self.settings = settings
        self.access = access
        self.origins = origins or {}
        """Where each setting came from, by key; without settings that no file, variable or flag names."""
        self.lag = LagSampler()
        self.background = BackgroundTasks()
        self.event_logs = EventLogs(settings.responses.max_events_total)
        self.event_streams = 0
        """Number of clients that follow a job's events, or the overview, now."""

    def observability(self) -> ObservabilitySettings:
        """The settings of logs that are in force now: SIGHUP may change them."""
        return self.settings.observability


def api_of(request: AnyRequest) -> Api:
    """State that the app's handlers share."""
    api: Api = request.app.state.api
    return api
