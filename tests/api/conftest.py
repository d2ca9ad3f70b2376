"""The app over a fake engine, and a whole server over a tiny model."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from runtime.adapters.library import AdapterLibrary
from runtime.api.app import create_app
from runtime.batches.manager import BatchManager
from runtime.engine.state import SCHEMAS, OpenedState
from runtime.feedback import FeedbackStore
from runtime.files.library import FileLibrary
from runtime.responses import ResponseStore
from runtime.support.database import Database
from runtime.support.logs import configure
from settings.api import FeedbackSettings, ResponseSettings, ServerSettings
from settings.schema import CacheSettings, ModelSettings, ObservabilitySettings, Settings
from tests.api import blocking
from tests.api.fakes import FakeService
from tests.trainer.jobs.fakes import World

if TYPE_CHECKING:
    from runtime.api.server import OpenState


blocking.install()


@pytest.fixture(autouse=True)
def _event_loop_is_never_blocked(request: pytest.FixtureRequest) -> Iterator[None]:
    """For over 100 ms, by whatever the test asks of the app. `may_block(reason)` marks a test whose own doing would."""
    with blocking.watching() as watch:
        yield
    if request.node.get_closest_marker("may_block") is None:
        assert not watch.blocked, blocking.describe(watch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a busy host makes slow once it does not make slow three times; what blocks blocks each time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=2, only_rerun=[blocking.BLOCKED]))


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    configure(ObservabilitySettings(log_level="error", log_format="json"))


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> httpx.AsyncClient:
    """A client of the app with default settings."""
    return client_of(service, Settings())


def client_of(service: FakeService, settings: Settings, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(service, settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


class RunningServer:
    """`runtime.api.server.serve` on a thread, with a loop of its own."""

    def __init__(self, settings: Settings, open_state: "OpenState | None" = None) -> None:
        self._open_state = open_state
        self.exit_code: int | None = None
        self.url = self.model = ""
        self._settings = settings
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        assert self._ready.wait(120), "the server did not start"
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()
        self._thread.join(30)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already, and its loop with it
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> int | None:
        self._thread.join(30)
        return self.exit_code

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def _run(self) -> None:
        async def main() -> int:
            from runtime.api.server import serve

            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            return await serve(self._settings, open_state=self._open_state, on_ready=self._on_ready, stop=self._stop)

        try:
            import uvloop

            self.exit_code = uvloop.run(main())
        finally:
            self._ready.set()

    def _on_ready(self, url: str, model: str) -> None:
        blocking.watch_loop(asyncio.get_running_loop())
        self.url, self.model = url, model
        self._ready.set()


def tiny_settings(model: Path, **server: object) -> Settings:
    """A server for tests: any free port, one thread, deadlines of seconds."""
    fields: dict[str, Any] = {
        "port": 0,
        "max_body": 1024 * 1024,
        "header_timeout": 1.0,
        "body_timeout": 1.0,
        "write_timeout": 2.0,
        "drain_timeout": 10.0,
    }
    return Settings(
        model=ModelSettings(model=str(model), threads=1),
        cache=CacheSettings(num_blocks=128),
        server=ServerSettings(**{**fields, **server}),
    )


def jobs_of(world: World) -> "OpenState":
    """Training jobs over fakes, beside a real library of adapters, for a server."""

    @contextlib.asynccontextmanager
    async def open_state(service: Any, settings: Settings) -> AsyncIterator[OpenedState]:
        folder = world.path / "adapters-of-the-server"
        database = Database(folder, SCHEMAS)
        library = await AdapterLibrary.open(database, folder, service, max_loaded=4, max_rank=64)
        files = FileLibrary(database, folder, settings.files)
        await files.start()
        batches = BatchManager(database, folder, files, settings.files, max_line=settings.server.max_body)
        responses = ResponseStore(database, ResponseSettings(keep_responses=None))
        feedback = FeedbackStore(database, FeedbackSettings(keep_feedback=None))
        try:
            yield OpenedState(library, await world.start(), files, batches, responses, feedback)
        finally:
            await world.stop(0.0)
            await batches.stop()
            await library.close()
            database.close()

    return open_state


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that all tests share: leave it as you found it."""
    world = World(tmp_path_factory.mktemp("state"))
    with RunningServer(tiny_settings(tiny_model), jobs_of(world)) as running:
        yield running
