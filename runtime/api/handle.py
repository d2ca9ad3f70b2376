"""The app's hold on the engine, which may still be loading. Never imports the engine: that imports torch.

Handlers find it in the app's state (`api_of`).
"""

from typing import TYPE_CHECKING, Any

from litestar import Request

from runtime.api.lag import LagSampler
from runtime.errors import EngineUnavailable
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService
    from runtime.trainer.jobs.manager import JobManager


AnyRequest = Request[Any, Any, Any]


class ServiceHandle:
    """Filled by whoever loads the engine; read by every request. Event-loop thread only."""

    def __init__(self, service: "EngineService | None" = None, jobs: "JobManager | None" = None) -> None:
        self.service = service
        self.jobs = jobs
        self.no_jobs = "This server runs no training jobs."
        """Why there is no `jobs` where the engine is loaded."""

    def require(self) -> "EngineService":
        """The service. Raises `EngineUnavailable` while there is none."""
        if self.service is None:
            raise EngineUnavailable("The model is still loading. Try again in a moment.")
        return self.service

    def require_jobs(self) -> "JobManager":
        """The training jobs. Raises `EngineUnavailable` while, or where, there are none."""
        self.require()
        if self.jobs is None:
            raise EngineUnavailable(self.no_jobs, code="training_unavailable")
        return self.jobs


class Api:
    """What every handler works with."""

    def __init__(self, handle: ServiceHandle, settings: Settings) -> None:
        self.handle = handle
        self.settings = settings
        self.lag = LagSampler()


def api_of(request: AnyRequest) -> Api:
    api: Api = request.app.state.api
    return api
