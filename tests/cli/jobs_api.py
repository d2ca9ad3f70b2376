"""The real app with training jobs over fakes, on a socket: what `eft train` and `eft jobs` talk to."""

from pathlib import Path
from typing import Any

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService
from tests.trainer.jobs.fakes import World

KEY = "boss"


class JobsApi:
    """An ASGI app. The jobs live in the loop of whoever serves it."""

    def __init__(self, state: Path, *, steps_itself: bool = True) -> None:
        self.world = World(state, steps_itself=steps_itself)
        self.cut_streams = 0
        """So many event streams end after two events, as when a proxy loses its patience."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self.world.start()
            service: Any = FakeService()
            settings = Settings(server=ServerSettings(admin_key=(KEY,)))
            self._app = create_app(ServiceHandle(service, self.world.manager), settings)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.world.stop(0.0)
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"].endswith("/events") and self.cut_streams:
            self.cut_streams -= 1
            await self._app(scope, receive, _Cut(send))
        else:
            await self._app(scope, receive, send)


class _Cut:
    def __init__(self, send: Any) -> None:
        self._send = send
        self._left = 3

    async def __call__(self, message: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError("the client is taken for gone")
        if self._left == 0:
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
