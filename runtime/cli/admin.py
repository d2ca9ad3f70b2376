"""Asking a server's admin endpoints, and what to say when it refuses."""

import os
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import httpx
import msgspec
from cyclopts import Parameter

from runtime.cli import client
from runtime.cli.errors import CommandError

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, Parameter(help="The server.")]
AdminKey = Annotated[str | None, Parameter(help="Admin key of the server; default: EFT_ADMIN_KEY.")]


def admin_client(url: str, admin_key: str | None) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """A client that sends the admin key: the one given, or EFT_ADMIN_KEY."""
    return client.remote(url, admin_key or os.environ.get("EFT_ADMIN_KEY"))


async def ask(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> Any:
    """The decoded JSON of a success. Raises `CommandError` for anything else."""
    return msgspec.json.decode((await send(http, method, path, **options)).content)


async def send(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """A successful response. Raises `CommandError` for anything else."""
    try:
        response = await http.request(method, path, **options)
    except httpx.TransportError as error:
        raise CommandError(f"no server answers at {http.base_url}: {client.describe(error)}") from error
    if response.is_error:
        raise CommandError(client.error_text(response))
    return response
