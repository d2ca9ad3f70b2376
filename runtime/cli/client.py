"""Where a command sends its requests: to a server, or to a model loaded in this process.

Both are an `httpx.AsyncClient` with the API's paths, so what uses it need not know which.
"""

import ipaddress
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import msgspec

from runtime.cli.asgi import InProcessTransport
from runtime.cli.errors import CommandError, UsageError
from settings.load import Loaded
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService
    from runtime.trainer.state import State

_CONNECT = httpx.Timeout(None, connect=10.0)
"""No limit on how long an answer may take; the caller sets one where it wants one."""


@asynccontextmanager
async def remote(url: str, api_key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server at `url` (with or without a trailing /v1). Raises `UsageError` for no URL."""
    base = _base(url)
    key = api_key or os.environ.get("EFT_API_KEY")
    async with httpx.AsyncClient(
        base_url=base,
        timeout=_CONNECT,
        headers=_authorization(key),
        trust_env=not _is_loopback(base),  # a proxy in the environment knows nothing of our loopback
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as client:
        yield client


def in_process(loaded: Loaded, *, training: bool = False) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Load the model of these settings, and give a client of the API over it. No socket is opened.

    With `training` the API has the state directory's jobs and adapters too. Entering raises `StateDirectoryInUse`
    where a server has them.

    Blocks while it loads, and is called outside of an event loop: Ctrl-C then ends it at once.
    """
    from runtime.clash import refuse_clash

    refuse_clash()
    from runtime import logs
    from runtime.service import EngineService

    settings = _quiet(loaded)
    logs.configure(settings.observability)
    return _client_of(EngineService.load(settings), settings, training=training)


@asynccontextmanager
async def _client_of(
    service: "EngineService", settings: Settings, *, training: bool
) -> AsyncIterator[httpx.AsyncClient]:
    from runtime.api.app import create_app
    from runtime.api.handle import ServiceHandle

    handle = ServiceHandle(service)
    service.start()
    stack = AsyncExitStack()
    try:
        if training:
            state = await stack.enter_async_context(open_state(service, settings))
            service.adapters, handle.jobs = state.adapters, state.jobs
        transport = InProcessTransport(create_app(handle, settings))
        key = next(iter(settings.server.admin_key if training else settings.server.api_key), None)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=None, headers=_authorization(key)
        ) as client:
            yield client
    finally:
        if handle.jobs is not None:
            await handle.jobs.stop(settings.server.drain_timeout)
        await stack.aclose()
        await service.stop(0.0)


def open_state(service: "EngineService", settings: Settings) -> "AbstractAsyncContextManager[State]":
    """Jobs and adapters of the state directory."""
    from runtime.trainer.state import open_state as opened

    return opened(service, settings)


async def served_model(client: httpx.AsyncClient) -> str:
    """The name of the first model that is served. Raises `CommandError` where none answers."""
    try:
        response = await client.get("/v1/models")
    except httpx.TransportError as error:
        raise CommandError(f"no server answers at {client.base_url}: {describe(error)}") from error
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


def describe(error: httpx.HTTPError) -> str:
    """httpx leaves many messages empty; the class then says what happened."""
    return str(error) or type(error).__name__


def _quiet(loaded: Loaded) -> Settings:
    """Without the log lines that a server writes, unless they were asked for."""
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
