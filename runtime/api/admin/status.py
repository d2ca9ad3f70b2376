"""/admin/status: the state of the server now, and as a stream of its changes: numbers, jobs, adapters, moves."""

from typing import TYPE_CHECKING

import msgspec
from litestar import Response, get
from msgspec import Struct

from runtime.api.admin.adapters import AdapterList, adapter_list
from runtime.api.admin.jobs import follow
from runtime.api.admin.overview import OverviewHistory, OverviewSample
from runtime.api.admin.views import JobItem, job_item
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import TRAIN
from runtime.api.http.query import check_names
from runtime.api.http.record import record_of, visible_to
from runtime.api.http.sse import Events
from runtime.api.swap import ModelSwap
from runtime.errors import RequestError
from runtime.support.version import version

if TYPE_CHECKING:
    from runtime.trainer.jobs.manager import JobManager

MAX_JOBS = 50
"""Jobs in an answer: the newest. `/admin/jobs` has the others."""


class JobsNow(Struct, kw_only=True):
    """The newest jobs, the newest first."""

    data: list[JobItem]


class AdminStatus(Struct, kw_only=True):
    """The server, its jobs and its adapters."""

    object: str = "status"
    model: str
    version: str
    max_model_len: int
    ready: bool
    """False while the server drains, and while another model is loaded in place of this one."""
    sample: OverviewSample | None
    """The newest sample of `/admin/overview`; null before the first."""
    jobs: JobsNow | None
    """Jobs that this key may see, 50 at most; null where the server runs none."""
    adapters: AdapterList | None
    """As `/admin/adapters` has them; null where the server keeps none."""
    swap: ModelSwap | None
    """The last move to another model, or the one under way; null before the first."""


@get("/admin/status", opt={TRAIN: True})
async def admin_status(request: AnyRequest) -> Response[AdminStatus]:
    """The state of the server. With `Accept: text/event-stream`: the same as the event `status`, then an event `sample`
    every two seconds, and behind it `jobs`, `adapters` and `swap`, each whole, whenever they have changed since."""
    check_names(request, ())
    api, owner = api_of(request), visible_to(record_of(request))
    history: OverviewHistory = request.app.state.history
    changes = _Changes(api, owner)
    found = await changes.status(history)
    if "text/event-stream" in request.headers.get("accept", ""):
        return follow(api, _events(history, changes, found))
    return Response(found)


async def _events(history: OverviewHistory, changes: "_Changes", found: AdminStatus) -> Events:
    yield _event(b"status", found)
    while (sample := await history.next_sample()) is not None:
        yield _event(b"sample", sample)
        if (jobs := await changes.jobs()) is not None:
            yield _event(b"jobs", jobs)
        if (adapters := changes.adapters()) is not None:
            yield _event(b"adapters", adapters)
        if (swap := changes.swap()) is not None:
            yield _event(b"swap", swap)


def _event(name: bytes, data: Struct) -> bytes:
    return b"event: " + name + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


class _Changes:
    """Jobs, adapters and the last move as one client has seen them: read again only after a change, however many that
    was."""

    def __init__(self, api: Api, owner: str | None) -> None:
        self._api = api
        self._owner = owner
        self._jobs_seen = self._adapters_seen = -1
        self._swap_seen: bytes | None = None

    async def status(self, history: OverviewHistory) -> AdminStatus:
        """The whole state. Raises `EngineUnavailable` while the model loads, and `StorageUnavailable`."""
        service = self._api.handle.require_latest()
        return AdminStatus(
            model=service.model_name,
            version=version(),
            max_model_len=service.max_model_len,
            ready=service.ready,
            sample=history.samples[-1] if history.samples else None,
            jobs=None if self._api.handle.jobs is None else await self._read_jobs(self._api.handle.jobs),
            adapters=self.adapters(),
            swap=self.swap(),
        )

    async def jobs(self) -> JobsNow | None:
        """The jobs if one has changed since the last call. None where they cannot be read now: the next call tries
        again."""
        jobs = self._api.handle.jobs
        if jobs is None or jobs.feed.count == self._jobs_seen:
            return None
        try:
            return await self._read_jobs(jobs)
        except RequestError:
            return None

    async def _read_jobs(self, jobs: "JobManager") -> JobsNow:
        seen = jobs.feed.count
        found, _ = await jobs.store.page(after=None, limit=MAX_JOBS, states=(), owner=self._owner)
        self._jobs_seen = seen
        return JobsNow(data=[job_item(job, progress) for job, progress in found])

    def adapters(self) -> AdapterList | None:
        """The adapters if one has changed since the last call."""
        service = self._api.handle.latest
        library = None if service is None else service.adapters
        if library is None or library.changes == self._adapters_seen:
            return None
        self._adapters_seen = library.changes
        return adapter_list(library)

    def swap(self) -> ModelSwap | None:
        """The last move to another model if it has changed since the last call."""
        swapper = self._api.handle.swapper
        last: ModelSwap | None = None if swapper is None else swapper.last
        if last is None or (found := msgspec.json.encode(last)) == self._swap_seen:  # it changes in place
            return None
        self._swap_seen = found
        return last
