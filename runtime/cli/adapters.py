"""`eft adapters …`: the adapters of a running server."""

import asyncio
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.client import describe, error_text, remote
from runtime.cli.errors import CommandError
from runtime.cli.flags import Json
from runtime.cli.output import console

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, Parameter(help="The server.")]
AdminKey = Annotated[
    str | None,
    Parameter(help="Admin key of the server; default: EFT_ADMIN_KEY. A server on this machine may need none."),
]
Name = Annotated[str, Parameter(help="The adapter.")]


def list_adapters(*, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Print every adapter and the version that its name means."""
    found = _ask("GET", "/admin/adapters", url, admin_key)
    if json:
        return _print_json(found)
    _print_table(
        ("name", "version", "served", "aliases"),
        ((a["name"], str(a["current"]), _yes(a["served"]), ", ".join(a["aliases"])) for a in found["adapters"]),
    )
    return None


def show(name: Name, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Print the versions of an adapter."""
    _show(_ask("GET", _path(name), url, admin_key), json)


def load(
    name: Name,
    path: Annotated[
        Path | None, Parameter(help="Folder on the server with an adapter of PEFT's; default: serve what was unloaded.")
    ] = None,
    /,
    *,
    inplace: Annotated[bool, Parameter(help="Take the place of the adapter of this name.", negative="")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Load an adapter from a folder, or one that was unloaded."""
    if path is None:
        _ask("POST", _path(name) + "/load", url, admin_key)
    else:
        body = {"lora_name": name, "lora_path": str(path.absolute()), "load_inplace": inplace}
        _ask("POST", "/v1/load_lora_adapter", url, admin_key, body)
    _show(_ask("GET", _path(name), url, admin_key), json)


def unload(name: Name, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Serve an adapter no more; its versions stay."""
    _show(_ask("POST", _path(name) + "/unload", url, admin_key), json)


def promote(
    name: Name,
    version: Annotated[int, Parameter(help="Number of the version.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Point an adapter's name to another version."""
    _show(_ask("POST", _path(name) + "/promote", url, admin_key, {"version": version}), json)


def rollback(name: Name, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Point an adapter's name to the version before."""
    _show(_ask("POST", _path(name) + "/rollback", url, admin_key), json)


def delete(
    name: Name,
    version: Annotated[int | None, Parameter(help="Only this version; default: the adapter with all of them.")] = None,
    /,
    *,
    drain: Annotated[bool, Parameter(help="Also while it is in use: running requests finish.", negative="")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Delete an adapter, or one of its versions."""
    path = _path(name) + (f"/versions/{version}" if version is not None else "")
    done = _ask("DELETE", path + ("?drain=1" if drain else ""), url, admin_key)
    if json:
        _print_json(done)
    else:
        print(f"Deleted {done['id']}.")


def _path(name: str) -> str:
    return f"/admin/adapters/{quote(name, safe='')}"


def _ask(method: str, path: str, url: str, admin_key: str | None, body: dict[str, Any] | None = None) -> Any:
    """The server's answer: JSON, or None for text. Raises `CommandError` with its message."""

    async def ask() -> httpx.Response:
        async with remote(url, admin_key or os.environ.get("EFT_ADMIN_KEY")) as client:
            try:
                return await client.request(method, path, json=body)
            except httpx.TransportError as error:
                raise CommandError(f"no server answers at {client.base_url}: {describe(error)}") from error

    response = asyncio.run(ask())
    if response.status_code != httpx.codes.OK:
        raise CommandError(error_text(response))
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return msgspec.json.decode(response.content) if is_json else None


def _show(adapter: dict[str, Any], json: bool) -> None:
    if json:
        return _print_json(adapter)
    state = "served" if adapter["served"] else "not served"
    aliases = f", also as {', '.join(adapter['aliases'])}" if adapter["aliases"] else ""
    print(f"{adapter['name']}: version {adapter['current']}, {state}{aliases}")
    canary = adapter["canary"] or {"version": None, "weight": 0.0}
    rows = (
        (
            f"{'*' if v['current'] else ' '} {v['number']}",
            datetime.fromtimestamp(v["created"]).strftime("%Y-%m-%d %H:%M"),
            str(v["rank"]),
            _yes(v["loaded"]),
            v["job"] or "",
            f"{canary['weight']:.0%}" if v["number"] == canary["version"] else "",
            "" if v["fits"] else "made for another base model",
        )
        for v in adapter["versions"]
    )
    _print_table(("version", "created", "rank", "loaded", "job", "canary", ""), rows)
    return None


def _print_table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def _yes(value: bool) -> str:
    return "yes" if value else "no"
