"""The app's hold on the engine, which may still be loading. Never imports the engine: that imports torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import EngineUnavailable
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService


@dataclass
class ServiceHandle:
    """Filled by whoever loads the engine; read by every request. Event-loop thread only."""

    service: "EngineService | None" = None

    def require(self) -> "EngineService":
        """The service. Raises `EngineUnavailable` while there is none."""
        if self.service is None:
            raise EngineUnavailable("The model is still loading. Try again in a moment.")
        return self.service


@dataclass(frozen=True)
class Api:
    """What every handler gets: the engine and the settings."""

    handle: ServiceHandle
    settings: Settings
