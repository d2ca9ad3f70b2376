"""`eft keys`: the file of API keys."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.table import Table

from runtime.access.keys import (
    LABEL_DIGITS,
    SCOPES,
    KeysFileError,
    Scope,
    StoredKey,
    change_keys,
    describe_limits,
    digest_of,
    make_key,
    read_keys,
)
from runtime.cli.flags import ConfigFile, Json
from runtime.cli.output import CommandError, UsageError, console
from settings.load import load

KeysPath = Annotated[Path | None, Parameter(help="The keys file; default: the setting server.keys_file.")]
KeyNameArgument = Annotated[str, Parameter(help="Name of the key, for lists and logs.")]


def new(
    name: KeyNameArgument,
    /,
    *,
    scope: Annotated[
        list[Scope] | None,
        Parameter(help="What it opens: inference (default), train or admin; several times for several."),
    ] = None,
    requests_per_minute: Annotated[int | None, Parameter(help="Most requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, Parameter(help="Most tokens a minute.")] = None,
    max_concurrent: Annotated[int | None, Parameter(help="Most requests at once.")] = None,
    max_queue_share: Annotated[float | None, Parameter(help="Largest share of the queue, from 0 to 1.")] = None,
    min_priority: Annotated[
        int | None, Parameter(help="Lowest `priority` that it may ask for.", allow_leading_hyphen=True)
    ] = None,
    min_deadline: Annotated[float | None, Parameter(help="Shortest `deadline_ms`, in seconds.")] = None,
    file: KeysPath = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Make a key, store its digest, and print it. It is shown this once."""
    path = _path(file, config)
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "max_queue_share": max_queue_share,
        "min_priority": min_priority,
        "min_deadline": min_deadline,
    }
    key = make_key()
    try:
        stored = msgspec.convert(
            {
                "name": name,
                "scopes": [one for one in SCOPES if one in (scope or ["inference"])],
                "sha256": digest_of(key.encode()),
                "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "limits": {field: value for field, value in given.items() if value is not None},
            },
            StoredKey,
        )
    except msgspec.ValidationError as error:
        raise UsageError(f"this is no key: {error}") from error

    def add(keys: tuple[StoredKey, ...]) -> Iterable[StoredKey]:
        if any(one.name == name for one in keys):
            raise CommandError(f"{path} has a key {name!r} already; revoke it first, or take another name")
        return (*keys, stored)

    _change(path, add)
    if json:
        print(msgspec.json.encode({"key": key, **_view(stored)}).decode())
    else:
        print(key)


def list_keys(*, file: KeysPath = None, config: ConfigFile = None, json: Json = False) -> None:
    """Print the keys' names, scopes and limits. The keys themselves are nowhere."""
    try:
        keys = read_keys(_path(file, config)).keys
    except KeysFileError as error:
        raise CommandError(str(error)) from error
    if json:
        print(msgspec.json.format(msgspec.json.encode([_view(key) for key in keys])).decode())
        return
    table = Table("name", "scopes", "tenant", "created", "limits", box=None, pad_edge=False)
    for key in keys:
        limits = ", ".join(f"{field} {value}" for field, value in describe_limits(key.limits).items())
        table.add_row(key.name, ", ".join(key.scopes), key.sha256[:LABEL_DIGITS], key.created, limits)
    console().print(table)


def revoke(name: KeyNameArgument, /, *, file: KeysPath = None, config: ConfigFile = None) -> None:
    """Take a key out of the file. Servers that read it refuse the key within seconds."""
    path = _path(file, config)

    def remove(keys: tuple[StoredKey, ...]) -> Iterable[StoredKey]:
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            there = ", ".join(key.name for key in keys) or "none"
            raise CommandError(f"{path} has no key {name!r}; it has: {there}")
        return left

    _change(path, remove)
    print(f"Revoked {name}.")


def _change(path: Path, change: Any) -> None:
    try:
        change_keys(path, change)
    except KeysFileError as error:
        raise CommandError(str(error)) from error


def _path(file: Path | None, config: Path | None) -> Path:
    named = load(file=config).settings.server.keys_file
    if file is None and named is None:
        raise UsageError(
            "which keys file? Give --file PATH, or set server.keys_file (EFT_SERVER_KEYS_FILE), which the server reads"
        )
    return file or Path(str(named)).expanduser()


def _view(key: StoredKey) -> dict[str, Any]:
    tenant = key.sha256[:LABEL_DIGITS]
    limits = describe_limits(key.limits)
    return {"name": key.name, "scopes": key.scopes, "tenant": tenant, "created": key.created, "limits": limits}
