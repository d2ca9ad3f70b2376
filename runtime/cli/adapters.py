"""`eft adapters …`: the adapters of a running server."""

import asyncio
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.cli.client import DEFAULT_URL, AdminKey, ServerRefusal, Url, admin_client, error_text, no_server
from runtime.cli.flags import Json
from runtime.cli.output import CommandError, UsageError, console
from runtime.support.peft_files import FILES

AdapterName = Annotated[str, Parameter(help="The adapter.")]


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


def show(name: AdapterName, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Print the versions of an adapter."""
    _show(_ask("GET", _path(name), url, admin_key), json)


def load(
    name: AdapterName,
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


def unload(name: AdapterName, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Serve an adapter no more; its versions stay."""
    _show(_ask("POST", _path(name) + "/unload", url, admin_key), json)


def promote(
    name: AdapterName,
    version: Annotated[int, Parameter(help="Number of the version.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Point an adapter's name to another version."""
    _show(_ask("POST", _path(name) + "/promote", url, admin_key, {"version": version}), json)


def rollback(name: AdapterName, /, *, url: Url = DEFAULT_URL, admin_key: AdminKey = None, json: Json = False) -> None:
    """Point an adapter's name to the version before."""
    _show(_ask("POST", _path(name) + "/rollback", url, admin_key), json)


def alias(
    name: AdapterName,
    alias: Annotated[str, Parameter(help="Another name for it, taken from the adapter that has it.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Give an adapter another name too."""
    _show(_ask("POST", _path(name) + "/alias", url, admin_key, {"alias": alias}), json)


def unalias(
    name: AdapterName,
    alias: Annotated[str, Parameter(help="The name to take away.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Take an alias away."""
    _show(_ask("DELETE", f"{_path(name)}/alias/{quote(alias, safe='')}", url, admin_key), json)


def canary(
    name: AdapterName,
    version: Annotated[int, Parameter(help="Number of the version.")],
    weight: Annotated[float, Parameter(help="Its share of the requests for the name, from 0 to 1; 0 takes it back.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Send a share of the requests to another version."""
    body = {"version": version, "weight": weight}
    _show(_ask("POST", _path(name) + "/canary", url, admin_key, body), json)


def delete(
    name: AdapterName,
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
        async with admin_client(url, admin_key) as client:
            try:
                return await client.request(method, path, json=body)
            except httpx.TransportError as error:
                raise no_server(client, error) from error

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
    current: dict[str, Any] = next((version for version in adapter["versions"] if version["current"]), {})
    if path := current.get("path"):
        print(f"in {path}")
    if (prompt := current.get("prompt")) and (prompt["format"] != "chat" or "system" in prompt):
        system = f", with the system message {prompt['system']!r}" if "system" in prompt else ""
        print(f"asked as {prompt['format']}{system}")
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


# -- adapter upload --------------------------------------------------------------------------------
#
# `eft adapters upload`: a folder of PEFT's on this machine, to a server that may be another one.

_SENT = (*FILES, "eft.json")
"""Files of an adapter; the last, the card of one that was trained by Eft, may be absent."""
_READ = 1024 * 1024
"""Bytes per read."""


def upload(
    name: AdapterName,
    folder: Annotated[Path, Parameter(help="Folder on this machine, as PEFT's save_pretrained writes it.")],
    /,
    *,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Send an adapter's files to the server, which serves them as the next version of the name."""
    with ExitStack() as stack:
        files = list[tuple[str, IO[bytes]]]()
        for file in _SENT:
            try:
                files.append((file, stack.enter_context(open(folder / file, "rb"))))
            except FileNotFoundError as error:
                if file != _SENT[-1]:
                    how = "give a folder that PEFT's save_pretrained wrote"
                    raise UsageError(f"{folder} holds no {file}: {how}") from error
            except OSError as error:
                raise CommandError(f"cannot read {folder / file}: {error.strerror or error}") from error
        _show(asyncio.run(_send(name, files, url, admin_key)), json)


async def _send(name: str, files: list[tuple[str, IO[bytes]]], url: str, admin_key: str | None) -> dict[str, Any]:
    """The server's view of the adapter."""
    headers = {"content-type": "application/x-tar"}
    async with admin_client(url, admin_key) as http:
        try:
            response = await http.post(
                "/admin/adapters/upload", params={"name": name}, content=_archive(files), headers=headers, timeout=None
            )
        except httpx.TransportError as error:
            raise no_server(http, error) from error
    if response.is_error:
        raise CommandError(error_text(response))
    return dict(msgspec.json.decode(response.content))


async def _archive(files: list[tuple[str, IO[bytes]]]) -> AsyncIterator[bytes]:
    """A tar archive of the files, as it is read."""
    for name, file in files:
        info = tarfile.TarInfo(name)
        info.size = os.fstat(file.fileno()).st_size
        yield info.tobuf(tarfile.PAX_FORMAT)
        left = info.size
        while left:
            data = file.read(min(left, _READ))
            if not data:
                raise CommandError(f"{name} was cut while it was read")
            left -= len(data)
            yield data
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


# -- adapter download ------------------------------------------------------------------------------
#
# `eft adapters download`: a version's folder, as PEFT loads it, from a server to this machine.

_PARTIAL = ".partial"


def download(
    name: AdapterName,
    /,
    *,
    version: Annotated[
        int | None, Parameter(help="Number of the version; default: the one that the name means.")
    ] = None,
    output: Annotated[Path | None, Parameter(help="Folder to make; default: the adapter's name, here.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Write an adapter's files into a folder that is not there yet, or leave none."""
    folder = output or Path(name)
    if folder.exists():
        raise UsageError(f"{folder} is there already; it is left as it is (--output names another folder)")
    try:
        label = asyncio.run(fetch_adapter(folder, name, version, url, admin_key))
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {error.strerror or error}") from error
    print(f"{label} is in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}.")


async def fetch_adapter(folder: Path, name: str, version: int | None, url: str, admin_key: str | None) -> str:
    """Write a version's files into a new folder, or leave none; returns the version's label. Raises `CommandError` and
    `OSError`."""
    partial = folder.with_name(folder.name + _PARTIAL)
    try:
        with tempfile.TemporaryFile() as archive:
            label = await _fetch(archive, name, version, url, admin_key)
            archive.seek(0)
            _unpack(archive, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return label


async def _fetch(archive: IO[bytes], name: str, version: int | None, url: str, admin_key: str | None) -> str:
    """Write the archive to a file; returns the version's label."""
    path = f"/admin/adapters/{quote(name, safe='')}/export"
    params = {} if version is None else {"version": version}
    async with admin_client(url, admin_key) as http:
        try:
            async with http.stream("GET", path, params=params) as response:
                if response.is_error:
                    await response.aread()
                    raise ServerRefusal(response)
                async for data in response.aiter_bytes():
                    archive.write(data)
                return str(response.headers.get("x-eft-adapter-version", name))
        except httpx.TransportError as error:
            raise no_server(http, error) from error


def _unpack(archive: IO[bytes], folder: Path) -> list[str]:
    """Write the plain files of the archive into a new folder, without their paths; returns their names."""
    names: list[str] = []
    folder.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=archive, mode="r:") as members:
            for member in members:
                name = Path(member.name).name
                content = members.extractfile(member) if member.isfile() and name not in ("", "..") else None
                if content is None or name in names:
                    raise CommandError(f"the server sent no adapter: {member.name!r} is in its archive")
                with open(folder / name, "xb") as file:
                    shutil.copyfileobj(content, file)
                names.append(name)
    except tarfile.TarError as error:
        raise CommandError(f"the server sent no adapter: {error}") from error
    return names
