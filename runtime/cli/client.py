"""Target of a command's requests: a server, or a model loaded in this process.

Both are an `httpx.AsyncClient` with the API's paths, so callers treat them alike.
"""

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter

from runtime.cli.output import CommandError, UsageError
from settings.errors import SettingsError
from settings.load import Loaded, load
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService
    from runtime.engine.state import OpenedState


_CONNECT = httpx.Timeout(None, connect=10.0)
"""No limit on the time of an answer; the caller sets one if needed."""


@asynccontextmanager
async def remote(url: str, api_key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server at `url` (with or without a trailing /v1). Raises `UsageError` for no URL."""
    base = _base(url)
    key = api_key or os.environ.get("EFT_API_KEY")
    async with httpx.AsyncClient(
        base_url=base,
        timeout=_CONNECT,
        headers=_authorization(key),
        trust_env=not _is_loopback(base),  # a proxy in the environment does not reach our loopback
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as client:
        yield client


def in_process(loaded: Loaded, *, training: bool = False) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Load the model of these settings, and give a client of the API over it. No socket is opened.

    With `training` the API has the state directory's jobs and adapters too. Entering raises `StateDirectoryInUse`
    where a server has them.

    Blocks while it loads, and is called outside of an event loop: Ctrl-C then ends it at once.
    """
    from runtime.support.version import refuse_clash

    refuse_clash()
    from runtime.engine.service import EngineService
    from runtime.support import logs

    settings = _quiet(loaded)
    logs.configure(settings.observability)
    return _client_of(EngineService.load(settings), settings, training=training)


@asynccontextmanager
async def _client_of(
    service: "EngineService", settings: Settings, *, training: bool
) -> AsyncIterator[httpx.AsyncClient]:
    from runtime.access import Access
    from runtime.access.access import make_token
    from runtime.api.app import create_app
    from runtime.api.handle import ServiceHandle

    handle, access = ServiceHandle(service), Access(settings)
    key = make_token(0)
    access.ring.set_token(key)
    service.start()
    stack = AsyncExitStack()
    try:
        if training:
            state = await stack.enter_async_context(open_state(service, settings))
            service.set_adapters(state.adapters)
            handle.serve(service, state.jobs, problem=state.problem)
        transport = InProcessTransport(create_app(handle, settings, access))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=None, headers=_authorization(key)
        ) as client:
            yield client
    finally:
        if handle.jobs is not None:
            await handle.jobs.stop(settings.server.drain_timeout)
        await stack.aclose()
        await service.stop(0.0)


def open_state(service: "EngineService", settings: Settings) -> "AbstractAsyncContextManager[OpenedState]":
    """Jobs and adapters of the state directory."""
    from runtime.engine.state import open_state as opened

    return opened(service, settings)


def local_token(url: str) -> str | None:
    """The admin token of a server on this machine, whose state directory is the one that the settings here name."""
    from runtime.access.access import read_token
    from runtime.support.state_directory import state_directory

    try:
        base = _base(url)
        if base.host not in ("localhost", "127.0.0.1", "::1"):
            return None
        return read_token(state_directory(load().settings), base.port or (443 if base.scheme == "https" else 80))
    except (UsageError, SettingsError):  # reported by the request itself
        return None


async def served_model(client: httpx.AsyncClient) -> str:
    """The name of the first model that is served. Raises `CommandError` if no server answers."""
    try:
        response = await client.get("/v1/models")
    except httpx.TransportError as error:
        raise no_server(client, error) from error
    if response.status_code != 200:
        raise CommandError(f"{client.base_url} answers {error_text(response)}")
    try:
        return str(msgspec.json.decode(response.content)["data"][0]["id"])
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        raise CommandError(f"{client.base_url} lists no model: this is no OpenAI-style server") from error


def error_text(response: httpx.Response) -> str:
    """Status and message of an error response whose body was read."""
    try:
        message = msgspec.json.decode(response.content)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = response.reason_phrase
    return f"{response.status_code}: {message}"


def no_server(http: httpx.AsyncClient, error: httpx.HTTPError) -> CommandError:
    """The error of a request that found no server, with what to do."""
    start = "; `eft serve` starts one" if _is_loopback(http.base_url) else ""
    return CommandError(f"no server answers at {http.base_url}: {describe(error)}{start}")


def describe(error: httpx.HTTPError) -> str:
    """Message of an httpx error; its class where httpx leaves the message empty."""
    return str(error) or type(error).__name__


def _quiet(loaded: Loaded) -> Settings:
    """The settings without the log lines of a server, unless they were configured."""
    changes = {
        name: value
        for name, value in (("log_requests", False), ("log_level", "warning"))
        if loaded.origins[f"observability.{name}"] == "default"
    }
    observability = msgspec.structs.replace(loaded.settings.observability, **changes)
    return msgspec.structs.replace(loaded.settings, observability=observability)


def _authorization(key: str | None) -> dict[str, str]:
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key has characters that no HTTP header can hold")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _base(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise UsageError(f"--url {text!r} is no URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--url {text!r} is no URL of a server, such as http://127.0.0.1:8000")
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1"), query=None, fragment=None)


def _is_loopback(url: httpx.URL) -> bool:
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


# -- admin endpoints -------------------------------------------------------------------------------
#
# Requests to a server's admin endpoints, and messages for its refusals.

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, Parameter(help="The server.")]
AdminKey = Annotated[
    str | None,
    Parameter(
        help="Admin key of the server; default: EFT_ADMIN_KEY, else the token that a server on this machine leaves in "
        "its state directory."
    ),
]


class ServerRefusal(CommandError):
    """A server answered with an error."""

    def __init__(self, response: httpx.Response) -> None:
        """Takes a response whose body was read."""
        super().__init__(error_text(response))
        self.status = response.status_code
        try:
            self.detail: dict[str, Any] = dict(msgspec.json.decode(response.content)["error"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            self.detail = {"message": response.reason_phrase, "type": "", "param": None, "code": None}

    @property
    def message(self) -> str:
        return str(self.detail.get("message", ""))

    @property
    def names_a_field(self) -> bool:
        """True if something that was sent is at fault, not the key or the server."""
        return self.status in (400, 409, 413) or (self.status < 500 and self.detail.get("param") is not None)


def admin_client(url: str, admin_key: str | None) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """A client that sends the admin key: the one given, EFT_ADMIN_KEY, or a local server's token."""
    return remote(url, admin_key or os.environ.get("EFT_ADMIN_KEY") or local_token(url))


async def ask(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> Any:
    """The decoded JSON of a success. Raises `CommandError` for anything else."""
    return msgspec.json.decode((await send(http, method, path, **options)).content)


async def send(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """A successful response. Raises `CommandError` for anything else."""
    try:
        response = await http.request(method, path, **options)
    except httpx.TransportError as error:
        raise no_server(http, error) from error
    if response.is_error:
        raise ServerRefusal(response)
    return response


async def answers(http: httpx.AsyncClient) -> bool:
    """True if a server answers and is ready."""
    try:
        return (await http.get("/ready", timeout=2.0)).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


# -- in this process -------------------------------------------------------------------------------
#
# An httpx transport that runs an ASGI app in this process and streams its response.
#
# `httpx.ASGITransport` returns nothing before the app has finished, so an answer would not stream, and
# leaving it would not reach the app. Here the body arrives as it is sent, and closing the response is
# a disconnect, as it is over a socket. Runs no lifespan: the caller starts everything that the app needs.

AsgiMessage = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

_GRACE = 5.0
"""Seconds that an app gets to notice a disconnect before its task is cancelled."""


class InProcessTransport(httpx.AsyncBaseTransport):
    """Transport that sends every request to one ASGI app."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(await request.aread())
        exchange.start(self._app, _scope(request))
        try:
            start = await exchange.next_message()
        except BaseException:  # cancelled while the app is at work: it must get the disconnect
            await exchange.aclose()
            raise
        if start is None:
            await exchange.aclose()
            raise httpx.RemoteProtocolError("the application ended without a response", request=request)
        return httpx.Response(start["status"], headers=start.get("headers", []), stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request's messages, in both directions. Also the response's body stream."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[AsgiMessage | None] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, app: App, scope: AsgiMessage) -> None:
        self._task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: App, scope: AsgiMessage) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            self._sent.put_nowait(None)

    async def _receive(self) -> AsgiMessage:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: AsgiMessage) -> None:
        if self._closed.is_set():
            raise OSError("the client has gone")  # as a server's `send` does after a disconnect
        self._sent.put_nowait(message)

    async def next_message(self) -> AsgiMessage | None:
        """The next message sent; None at the end. Raises the error of the app."""
        message = await self._sent.get()
        if message is None and self._task is not None:
            await self._task
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.next_message()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        """Disconnect, and give the app `_GRACE` seconds to finish. Errors that it raises then are dropped."""
        self._closed.set()
        if self._task is None:
            return
        done, _ = await asyncio.wait([self._task], timeout=_GRACE)
        if not done:
            self._task.cancel()
        elif not self._task.cancelled():
            self._task.exception()


def _scope(request: httpx.Request) -> AsgiMessage:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
        "root_path": "",
        "state": {},
    }
