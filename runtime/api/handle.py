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


AnyRequest = Request[Any, Any, Any]


class ServiceHandle:
    """Filled by whoever loads the engine; read by every request. Event-loop thread only."""

    def __init__(self, service: "EngineService | None" = None) -> None:
        self.service = service

    def require(self) -> "EngineService":
        """The service. Raises `EngineUnavailable` while there is none."""
        if self.service is None:
            raise EngineUnavailable("The model is still loading. Try again in a moment.")
        return self.service


class Api:
    """What every handler works with."""

    def __init__(self, handle: ServiceHandle, settings: Settings) -> None:
        self.handle = handle
        self.settings = settings
        self.lag = LagSampler()


def api_of(request: AnyRequest) -> Api:
    api: Api = request.app.state.api
    return api
