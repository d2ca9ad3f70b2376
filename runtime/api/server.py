"""The server process: a socket that answers at once, an engine that loads in parallel, an orderly shutdown.

uvicorn parses and writes HTTP. Tasks that it does by polling or not at all (waiting for the end, deadlines, signals)
are done here and in `runtime.api.http.protocol`.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from litestar import Litestar

from runtime.access import Access
from runtime.access.access import make_token, remove_token, write_token
from runtime.access.keys import KeysFileError
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.http.acceptor import Acceptor, connections_for, raise_descriptor_limit
from runtime.api.http.protocol import MAX_HEADERS, Protocol, SocketProtocol
from runtime.api.http.sockets import socket_paths
from runtime.api.supervisor import Reloader, notify
from runtime.api.swap import ModelSwapper
from runtime.support.event_loop import cancel
from runtime.support.logs import configure, get_logger
from runtime.support.threads import call_in_fresh_thread
from settings.load import Loaded
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService
    from runtime.engine.state import OpenedState
    from runtime.trainer.jobs.manager import JobManager

KEEP_ALIVE = 30
"""Seconds that a connection may be idle between two requests."""

FLUSH = 5.0
"""Seconds that responses get to be written out once the engine has stopped."""

HURRY_SECONDS = 3.0
"""Seconds after the second signal until the process ends, even if something hangs."""

_log = get_logger("server")


OpenState = Callable[["EngineService", Settings], AbstractAsyncContextManager["OpenedState"]]
"""Opens the state directory for a loaded and started engine, and closes it at the end."""


async def serve(
    settings: Settings,
    *,
    open_state: OpenState | None = None,
    on_ready: Callable[[str, str], None] | None = None,
    stop: asyncio.Event | None = None,
    origins: Mapping[str, str] | None = None,
    reread: Callable[[], Loaded] | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or `stop`; return the process's exit code.

    The socket is open at once: /health, /ready and /metrics answer while the model loads. `on_ready` gets the
    server's URL, and the model's name in requests, when they can be served. `origins`: where each setting came from,
    by key; `reread`: reads the settings again, for SIGHUP. A second signal ends everything within `HURRY_SECONDS`, if
    need be by exiting the process at once with code 1. The code is 0 after an orderly end, 1 when the address is taken,
    the model cannot be loaded, or the engine dies.
    """
    configure(settings.observability)
    handle = ServiceHandle()
    if settings.observability.tracing and not _open_tracing(handle):
        return 1
    try:
        access = Access(settings)
        access.audit.check()
    except (KeysFileError, OSError) as error:
        _log.error("cannot_guard", reason=str(error))
        return 1
    try:
        if settings.server.uds is not None:
            listener = _listen_at(settings.server.uds)
        else:
            listener = _listen(settings.server.host, settings.server.port)
    except OSError as error:
        address = settings.server.uds or f"{settings.server.host}:{settings.server.port}"
        _log.error("cannot_listen", address=address, reason=error.strerror or str(error))
        return 1
    access.report()
    stop = stop or asyncio.Event()
    descriptors = raise_descriptor_limit()
    asked = settings.server.max_connections
    config = _config(settings, handle, access, origins)
    server = _Server(config, max_connections=min(asked, connections_for(descriptors)))
    app = cast(Litestar, config.app)
    notify("STATUS=loading the model")
    with _signals(stop, server, Reloader(app.state.api, access, reread)):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            url = _url(settings.server.host, listener)
            port = 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1]
            token = partial(_admin_token, access, port)
            return await _run(settings, handle, url, open_state, on_ready, stop, server, token)
        finally:
            if listener.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):  # before it is closed: afterwards it may be another server's
                    os.unlink(listener.getsockname())
            server.leave()
            await serving
            if handle.tracing is not None:
                with contextlib.suppress(TimeoutError):  # an exporter may take longer than it is given
                    await asyncio.wait_for(call_in_fresh_thread(handle.tracing.close), 2 * FLUSH)


def _open_tracing(handle: ServiceHandle) -> bool:
    """Trace from now on. False, with the reason in the log, where that is not possible."""
    try:
        from runtime.support.tracing import open_tracing
    except ImportError as error:
        what = f"observability.tracing needs OpenTelemetry: pip install 'eft-server[otel]' ({error})"
        _log.error("cannot_trace", reason=what)
        return False
    try:
        handle.tracing = open_tracing()
    except (ImportError, ValueError) as error:
        _log.error("cannot_trace", reason=str(error))
        return False
    return True


async def _run(
    settings: Settings,
    handle: ServiceHandle,
    url: str,
    open_state: OpenState | None,
    on_ready: Callable[[str, str], None] | None,
    stop: asyncio.Event,
    server: "_Server",
    admin_token: Callable[[Path], AbstractContextManager[None]],
) -> int:
    loading, stopping = (
        asyncio.ensure_future(call_in_fresh_thread(_load_engine, settings)),
        asyncio.ensure_future(stop.wait()),
    )
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        stopping.cancel()
        return 0  # the loading thread is a daemon, and ends with the process
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
        service.set_adapters(state.adapters)
        if state.directory is not None:
            stack.enter_context(admin_token(state.directory))
        if state.batches is not None and handle.inside is not None:
            await state.batches.start(handle.inside)
        if state.jobs is not None and handle.tracing is not None:
            state.jobs.trace_with(handle.tracing.jobs)
        handle.responses, handle.feedback = state.responses, state.feedback
        handle.serve(service, state.jobs, files=state.files, batches=state.batches, problem=state.problem)
        handle.swapper = swapper = ModelSwapper(handle, service, state, settings)
        return await _until_the_end(settings, swapper, handle, url, on_ready, stopping, server)


@contextlib.contextmanager
def _admin_token(access: Access, port: int, directory: Path) -> Iterator[None]:
    """Keep the admin token in the state directory, which this process owns, while the block lasts."""
    token = make_token(port)
    access.ring.set_token(token)
    try:
        path = write_token(directory, token)
    except OSError as error:
        _log.warning("no_admin_token", reason=error.strerror or str(error))
        yield
        return
    try:
        yield
    finally:
        remove_token(path, token)


async def _open(
    stack: contextlib.AsyncExitStack, open_state: "OpenState | None", service: "EngineService", settings: Settings
) -> "OpenedState":
    """Open the state on disk, adapters and jobs, for this server until the stack is left.

    A configured directory that another server holds, or that cannot be made, is an error. If it is the default one,
    this server runs without state: it serves the base model, and /admin gives the reason.
    A read-only directory is served from (`runtime.engine.state`).
    """
    from runtime.engine import state
    from runtime.support.database import StateDirectoryInUse

    try:
        return await stack.enter_async_context((open_state or state.open_state)(service, settings))
    except (StateDirectoryInUse, OSError) as error:
        if settings.trainer.state_dir is not None:
            raise
        _log.warning("no_state", reason=str(error))
        why = "another process has its state directory" if isinstance(error, StateDirectoryInUse) else "it has no state"
        return state.OpenedState(None, None, problem=f"This server runs no training jobs: {why}. Its log says more.")


async def _until_the_end(
    settings: Settings,
    swapper: ModelSwapper,
    handle: ServiceHandle,
    url: str,
    on_ready: Callable[[str, str], None] | None,
    stopping: "asyncio.Future[Any]",
    server: "_Server",
) -> int:
    jobs = handle.jobs
    if on_ready is not None:
        on_ready(url, swapper.name)
    _log.info("ready", url=url, model=swapper.label)
    notify("READY=1", f"STATUS=serving {swapper.label} at {url}")
    died = asyncio.ensure_future(swapper.died.wait())
    await asyncio.wait((died, stopping), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        stopping.cancel()
        _log.error("engine_dead")
        await swapper.close(0.0)
        if jobs is not None:
            await jobs.stop(0.0, crashed=True)
        return 1
    died.cancel()
    if handle.batches is not None:
        await handle.batches.stop()
    await _drain(swapper, jobs, settings.server.drain_timeout, server)
    return 0


async def _drain(swapper: ModelSwapper, jobs: "JobManager | None", timeout: float, server: "_Server") -> None:
    """Refuse new requests. Running ones, and a checkpoint of the running job, get `timeout` seconds, or until a
    second signal."""
    notify("STOPPING=1")
    if (service := swapper.service) is not None:
        _log.info("draining", timeout_s=timeout, running=service.num_running, waiting=service.num_waiting)
        service.drain(leaving=True)
    draining = asyncio.ensure_future(_stop(swapper, jobs, timeout))
    hurry = asyncio.ensure_future(server.hurry.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_hurry(draining, swapper, jobs), HURRY_SECONDS / 2)
    await cancel(hurry)


async def _stop(swapper: ModelSwapper, jobs: "JobManager | None", timeout: float) -> None:
    """Stop jobs, then the engine: the engine thread finishes the step of a running job."""
    began = time.monotonic()
    await swapper.close(timeout)
    if jobs is not None:
        await jobs.stop(timeout)
    if swapper.service is not None:
        await swapper.service.stop(max(0.0, timeout - (time.monotonic() - began)))


async def _hurry(draining: "asyncio.Future[None]", swapper: ModelSwapper, jobs: "JobManager | None") -> None:
    """Stop like `_stop`, but without waiting for the engine thread, which may hang."""
    await asyncio.gather(draining, return_exceptions=True)
    ends = [] if swapper.service is None else [swapper.service.stop(0.0, patience=HURRY_SECONDS / 6)]
    if jobs is not None:
        ends.append(jobs.stop(0.0))
    await asyncio.gather(*ends)


def _load_engine(settings: Settings) -> "EngineService":
    from runtime.engine.service import EngineService  # here, because it imports torch

    return EngineService.load(settings)


def _report_load_error(error: BaseException) -> None:
    from runtime.model.config import ModelLoadError

    if isinstance(error, ModelLoadError):
        _log.error("cannot_load_model", reason=str(error))
    else:
        _log.error("cannot_load_model", exc_info=error)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers and without its ten wake-ups per second."""

    def __init__(self, config: uvicorn.Config, *, max_connections: int) -> None:
        super().__init__(config)
        self._max_connections = max_connections
        self._acceptors: list[Acceptor] = []
        self.hurry = asyncio.Event()
        """Set by the second signal: stop waiting for anything."""
        self._leave = asyncio.Event()

    def leave(self) -> None:
        """Stop serving. Responses being written may finish, for `FLUSH` seconds at most."""
        self._leave.set()

    def rush(self) -> None:
        if not self.hurry.is_set():
            self.hurry.set()
            self.force_exit = True
            end = threading.Timer(HURRY_SECONDS, _end_now)
            end.daemon = True
            end.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # the listeners are for acceptors of ours
        for listener in sockets or []:
            acceptor = Acceptor(
                listener, self._make_protocol, most=self._max_connections, make_room=self._close_idle_connections
            )
            self._acceptors.append(acceptor)

    def _make_protocol(self) -> Protocol:
        return cast(type[Protocol], self.config.http_protocol_class)(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _close_idle_connections(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol) and connection.idle:
                connection.transport.close()

    async def main_loop(self) -> None:
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then, and its task is cancelled with a traceback in the log
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), HURRY_SECONDS / 6)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _end_now() -> None:
    _log.error("forced_end", after_s=HURRY_SECONDS)
    os._exit(1)


def _config(
    settings: Settings, handle: ServiceHandle, access: Access, origins: Mapping[str, str] | None
) -> uvicorn.Config:
    server = settings.server
    protocol = Protocol.configured(
        header_timeout=server.header_timeout,
        write_timeout=server.write_timeout,
        socket_paths=socket_paths(server.root_path),
    )
    return uvicorn.Config(
        create_app(handle, settings, access, origins=origins),
        http=protocol,
        ws=SocketProtocol.configured(write_timeout=server.write_timeout),
        ws_max_size=server.max_body,
        ws_per_message_deflate=False,  # a small message could become one of gigabytes
        lifespan="on",
        log_config=None,
        access_log=False,  # ours is `runtime.api.http.observe`
        proxy_headers=False,
        server_header=False,
        date_header=False,  # uvicorn makes it every second, even if unused; `observe` makes it when needed
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(FLUSH),
    )


@contextlib.contextmanager
def _signals(stop: asyncio.Event, server: _Server, reloader: Reloader) -> Iterator[None]:
    """Handle signals: the first SIGTERM or SIGINT stops, the second hurries; SIGHUP rereads the keys file and settings.
    Does nothing off the main thread."""
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
    if reloader.useful:
        loop.add_signal_handler(signal.SIGHUP, reloader.ask)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return _listening(socket.socket(family, kind), address)


def _listen_at(name: str) -> socket.socket:
    """A listening Unix socket, in the place of one that a server which was killed has left. Raises `OSError`."""
    path = Path(name).expanduser()
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    return _listening(socket.socket(socket.AF_UNIX), str(path))


def _listening(listener: socket.socket, address: Any) -> socket.socket:
    """The socket, bound to the address of its family, or closed. Raises `OSError`."""
    try:
        if listener.family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """URL of the server for a client on this machine; for a Unix socket, its path after `unix:`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"
