"""The server process: a socket that answers at once, an engine that loads beside it, and an orderly end.

uvicorn parses and writes HTTP; what it does by polling or not at all (waiting for the end, deadlines, signals)
is done here and in `runtime.api.protocol`.
"""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import uvicorn

from runtime.apart import call_apart
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.protocol import MAX_HEADERS, Protocol
from runtime.logs import configure, get_logger
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService
    from runtime.trainer.jobs.manager import JobManager
    from runtime.trainer.state import State

KEEP_ALIVE = 30
"""Seconds that a connection may be idle between two requests."""

FLUSH = 5.0
"""Seconds that responses get to be written out once the engine has stopped."""

_log = get_logger("server")


OpenState = Callable[["EngineService", Settings], AbstractAsyncContextManager["State"]]
"""Opens the state directory for a loaded and started engine, and closes it at the end."""


async def serve(
    settings: Settings,
    *,
    open_state: OpenState | None = None,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or `stop`; return the process's exit code.

    The socket is open at once: /health, /ready and /metrics answer while the model loads. `on_ready` gets the
    server's URL when requests can be served. A second signal ends everything immediately. The code is 0 after
    an orderly end, 1 when the address is taken, the model cannot be loaded, or the engine dies.
    """
    configure(settings.observability)
    try:
        listener = _listen(settings.server.host, settings.server.port)
    except OSError as error:
        address = f"{settings.server.host}:{settings.server.port}"
        _log.error("cannot_listen", address=address, reason=error.strerror or str(error))
        return 1
    stop = stop or asyncio.Event()
    handle = ServiceHandle()
    server = _Server(_config(settings, handle))
    with _signals(stop, server):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            url = _url(settings.server.host, listener)
            return await _run(settings, handle, url, open_state, on_ready, stop, server)
        finally:
            server.leave()
            await serving


async def _run(
    settings: Settings,
    handle: ServiceHandle,
    url: str,
    open_state: OpenState | None,
    on_ready: Callable[[str], None] | None,
    stop: asyncio.Event,
    server: "_Server",
) -> int:
    loading, stopping = asyncio.ensure_future(call_apart(_load_engine, settings)), asyncio.ensure_future(stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        stopping.cancel()
        return 0  # the loading thread is a daemon, and goes with the process
    if (error := loading.exception()) is not None:
        _report_load_error(error)
        stopping.cancel()
        return 1
    service = loading.result()
    service.start()
    async with contextlib.AsyncExitStack() as stack:
        try:
            state = await _open(stack, open_state, service, settings)
        except Exception as error:
            _log.error("cannot_open_state", reason=str(error))
            stopping.cancel()
            await service.stop(0.0)
            return 1
        if state is not None:
            service.adapters, handle.jobs = state.adapters, state.jobs
        else:
            handle.no_jobs = "This server runs no training jobs: another process has its state directory."
        handle.service = service
        return await _until_the_end(settings, service, handle.jobs, url, on_ready, stopping, server)


async def _open(
    stack: contextlib.AsyncExitStack, open_state: "OpenState | None", service: "EngineService", settings: Settings
) -> "State | None":
    """What is kept on the disk, adapters and jobs, opened for this server until the stack is left.

    A directory that was asked for and cannot be had is an error. Of the default one, a second server beside the
    first does without: it serves the base model, and /admin says why there is no more.
    """
    from runtime.trainer.database import StateDirectoryInUse

    if open_state is None:
        from runtime.trainer import state

        open_state = state.open_state
    try:
        return await stack.enter_async_context(open_state(service, settings))
    except (StateDirectoryInUse, OSError) as error:
        if settings.trainer.state_dir is not None:
            raise
        _log.warning("no_state", reason=str(error))
        return None


async def _until_the_end(
    settings: Settings,
    service: "EngineService",
    jobs: "JobManager | None",
    url: str,
    on_ready: Callable[[str], None] | None,
    stopping: "asyncio.Future[Any]",
    server: "_Server",
) -> int:
    if on_ready is not None:
        on_ready(url)
    _log.info("ready", url=url, model=service.model_name)
    died = asyncio.ensure_future(service.died.wait())
    await asyncio.wait((died, stopping), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        stopping.cancel()
        _log.error("engine_dead")
        if jobs is not None:
            await jobs.stop(0.0, crashed=True)
        return 1
    died.cancel()
    await _drain(service, jobs, settings.server.drain_timeout, server)
    return 0


async def _drain(service: "EngineService", jobs: "JobManager | None", timeout: float, server: "_Server") -> None:
    """No new requests; the running ones and a checkpoint of the running job get `timeout` seconds, or until a
    second signal."""
    _log.info("draining", timeout_s=timeout, running=service.num_running, waiting=service.num_waiting)
    service.drain()
    draining = asyncio.ensure_future(_stop(service, jobs, timeout))
    hurry = asyncio.ensure_future(server.hurry.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        await _stop(service, jobs, 0.0)
    hurry.cancel()
    await asyncio.gather(hurry, return_exceptions=True)


async def _stop(service: "EngineService", jobs: "JobManager | None", timeout: float) -> None:
    """Jobs first: the engine thread is what brings a running one to the end of its step."""
    began = time.monotonic()
    if jobs is not None:
        await jobs.stop(timeout)
    await service.stop(max(0.0, timeout - (time.monotonic() - began)))


def _load_engine(settings: Settings) -> "EngineService":
    from runtime.service import EngineService  # here, because it imports torch

    return EngineService.load(settings)


def _report_load_error(error: BaseException) -> None:
    from runtime.workers.loading.errors import ModelLoadError

    if isinstance(error, ModelLoadError):
        _log.error("cannot_load_model", reason=str(error))
    else:
        _log.error("cannot_load_model", exc_info=error)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers and without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.hurry = asyncio.Event()
        """Set by the second signal: nothing is waited for any more."""
        self._leave = asyncio.Event()

    def leave(self) -> None:
        """End: what is being written may be finished, for `FLUSH` seconds at most."""
        self._leave.set()

    def rush(self) -> None:
        self.hurry.set()
        self.force_exit = True

    async def main_loop(self) -> None:
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _config(settings: Settings, handle: ServiceHandle) -> uvicorn.Config:
    server = settings.server
    protocol = Protocol.configured(header_timeout=server.header_timeout, write_timeout=server.write_timeout)
    return uvicorn.Config(
        create_app(handle, settings),
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # ours is `runtime.api.observe`
        proxy_headers=False,
        server_header=False,
        date_header=False,  # uvicorn makes it once a second, asked for or not; `observe` makes it when needed
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(FLUSH),
    )


@contextlib.contextmanager
def _signals(stop: asyncio.Event, server: _Server) -> Iterator[None]:
    """The first SIGTERM or SIGINT stops, the second hurries. Off the main thread there are no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal() -> None:
        if stop.is_set():
            server.rush()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"
