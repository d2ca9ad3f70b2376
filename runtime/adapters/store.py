"""The library's rows. Every function here is part of a transaction of `runtime.support.database`."""

import json
import re
import time
import unicodedata
from sqlite3 import Connection
from typing import Any

from msgspec import Struct, field

from runtime.errors import Conflict, InvalidRequest, NotFound

# -- records ---------------------------------------------------------------------------------------
#
# Data types of the library, as they are stored and shown.

# -- names -----------------------------------------------------------------------------------------
#
# Rules for names of adapters and aliases: a name becomes a folder, a label, and the `model` of a request.

MAX_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_VERSION = re.compile(r"(.+)[:@]([0-9]{1,9})")
_CHECKPOINT = re.compile(r".+:ckpt-step-[0-9]+")


def name_problem(name: str) -> str | None:
    """Reason why `name` cannot be an adapter's name on any server, or None. ASCII only, so that no two look alike."""
    if not 1 <= len(name) <= MAX_NAME:
        return f"must have 1 to {MAX_NAME} characters, got {len(name)}"
    if not _NAME.fullmatch(name) or ".." in name:
        return (
            "must begin with a letter or digit and have only ASCII letters, digits, and `.`, `_`, `-`, `:`, "
            f"no two dots in a row; got {name!r}"
        )
    if _VERSION.fullmatch(name):
        return f"must not end like a version, `:` and a number; got {name!r}"
    if _CHECKPOINT.fullmatch(name):
        return f"must not end like a checkpoint, `:ckpt-step-` and a number; got {name!r}"
    return None


class NameTaken(Exception):
    """The served model has the name of an adapter in the state directory."""


def canonical(name: str) -> str:
    """Canonical form of a name, equal for names that people would confuse: compatible characters, and no case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def clashes(name: str, base: str) -> bool:
    """True if the adapter or alias `name`, or one of its versions or checkpoints, would have the name of the served
    model `base`, ignoring case."""
    own, served = canonical(name), canonical(base)
    version = split_version(served)
    return own == served or (version is not None and version[0] == own) or served.startswith(f"{own}:ckpt-step-")


def check_name(name: str, *, base: str, param: str) -> None:
    """Raise `InvalidRequest` naming `param`. `base`: the name of the model that the adapters are for."""
    problem = name_problem(name)
    if problem is None and clashes(name, base):
        problem = (
            f"must not be the base model's name, {base!r}, in any case, got {name!r}; call the adapter otherwise, or "
            "serve the model under another name (--served-model-name)"
        )
    if problem is not None:
        raise InvalidRequest(f"{param} {problem}.", param=param)


def checkpoint_name(name: str, step: int) -> str:
    """Name in requests of the checkpoint of a job that will publish as `name`."""
    return f"{name}:ckpt-step-{step}"


def split_version(text: str) -> tuple[str, int] | None:
    """`name@3` or `name:3` → its two parts."""
    match = _VERSION.fullmatch(text)
    return (match[1], int(match[2])) if match else None


class Version(Struct, frozen=True, kw_only=True):
    """One immutable state of an adapter."""

    name: str
    number: int
    """Number of the version: from 1, rising, never reused for this name."""
    key: str
    """`name@number:digest`: unique for ever. Its id in the engine and the KV cache."""
    created: float
    """Unix time."""
    rank: int
    base: str
    """Fingerprint of its base model."""
    sha256: str
    """Digest of its files."""
    job: str | None = None
    """The training job that made it; None when it came from elsewhere."""
    step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.number}"


class CheckpointVersion(Version, frozen=True, kw_only=True):
    """State of a running job at a step, which is its number."""

    @property
    def id(self) -> str:
        return checkpoint_name(self.name, self.number)


class Canary(Struct, frozen=True):
    """A version that gets a share of the requests for its name."""

    version: int
    weight: float
    """Share of the requests, from 0 to 1."""


class AdapterRecord(Struct, frozen=True, kw_only=True):
    """A name, and what it points to."""

    name: str
    created: float
    current: int
    served: bool
    """False: unloaded by hand. Its versions are kept, and requests for it fail."""
    versions: dict[int, Version]
    canary: Canary | None = None
    aliases: tuple[str, ...] = ()

    @property
    def version(self) -> Version:
        return self.versions[self.current]

    def at(self, number: int) -> Version:
        """The version of this number. Raises `NotFound`."""
        if number not in self.versions:
            there = ", ".join(map(str, self.versions))
            raise NotFound(f"{self.name!r} has no version {number}; there are: {there}.", param="version")
        return self.versions[number]


class Catalogue(Struct, frozen=True):
    """Everything in the library at one moment."""

    adapters: dict[str, AdapterRecord] = {}
    aliases: dict[str, str] = {}
    """Alias → name."""

    def find(self, name: str) -> AdapterRecord | None:
        return self.adapters.get(self.aliases.get(name, name))

    def namesake(self, name: str) -> str | None:
        """Another adapter or alias whose name differs from `name` in the case of letters alone."""
        own = canonical(name)
        return next((one for one in (*self.adapters, *self.aliases) if one != name and canonical(one) == own), None)

    def named(self, name: str) -> AdapterRecord:
        """The adapter of this name, not of an alias. Raises `NotFound`."""
        if name not in self.adapters:
            raise NotFound(f"There is no adapter {name[:200]!r}.", param="name")
        return self.adapters[name]

    def locate(self, model: str) -> tuple[AdapterRecord, int | None] | None:
        """The adapter that a request for `model` means, and the number of its version where `model` has one."""
        record = self.find(model)
        if record is not None:
            return record, None
        parts = split_version(model)
        record = None if parts is None else self.find(parts[0])
        return None if parts is None or record is None else (record, parts[1])

    def check_free(self, name: str, *, base: str, param: str) -> None:
        """Raise `InvalidRequest` or `Conflict`, which name `param`, where no version can be published under `name`
        beside a model that is served as `base`."""
        check_name(name, base=base, param=param)
        if name in self.aliases:
            raise Conflict(f"{name!r} is an alias of {self.aliases[name]!r}.", param=param)
        known = None if name in self.adapters else self.namesake(name)
        if known is not None:
            what = "an alias" if known in self.aliases else "an adapter"
            raise Conflict(
                f"There is {what} {known!r}, and {name!r} differs in the case of letters alone: use that name, or "
                "another one.",
                param=param,
            )

    def check_base(self, base: str) -> None:
        """Raise `NameTaken` where an adapter, alias or version has the name of a model that is served as `base`."""
        for name in (*self.adapters, *self.aliases):
            if clashes(name, base):
                what = "alias" if name in self.aliases else "adapter"
                raise NameTaken(
                    f"the model is served as {base!r}, and the state directory has an {what} {name!r}, which requests "
                    "would mean by the same name. Serve the model under another name (--served-model-name), or, served "
                    f"so, take the {what} away first (eft adapters {'unalias' if what == 'alias' else 'delete'} {name})"
                )


class NameRecord(Struct, frozen=True, kw_only=True):
    """The stored state of a name besides its versions; also of one without any, whose numbers stay taken."""

    name: str
    created: float
    current: int | None
    next_number: int
    served: bool
    canary: Canary | None
    aliases: tuple[str, ...]
    moves: tuple[int, ...]
    """Numbers of the versions that it pointed to, in order."""


SCHEMA = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    current INTEGER,
    next_number INTEGER NOT NULL DEFAULT 1,
    served INTEGER NOT NULL DEFAULT 1,
    canary INTEGER,
    canary_weight REAL
);
CREATE TABLE IF NOT EXISTS adapter_versions (
    name TEXT NOT NULL REFERENCES adapters (name),
    number INTEGER NOT NULL,
    key TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    rank INTEGER NOT NULL,
    base TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    job TEXT,
    step INTEGER,
    metrics TEXT NOT NULL DEFAULT '{}',
    state TEXT NOT NULL DEFAULT 'published' CHECK (state IN ('published', 'deleted')),
    PRIMARY KEY (name, number)
);
CREATE TABLE IF NOT EXISTS adapter_moves (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL REFERENCES adapters (name),
    number INTEGER NOT NULL,
    moved REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS adapter_aliases (
    alias TEXT PRIMARY KEY,
    name TEXT NOT NULL REFERENCES adapters (name)
);
"""


def read_catalogue(connection: Connection) -> Catalogue:
    """All names that have a version."""
    versions: dict[str, dict[int, Version]] = {}
    for row in connection.execute("SELECT * FROM adapter_versions WHERE state = 'published' ORDER BY name, number"):
        fields = {name: row[name] for name in Version.__struct_fields__}
        fields["metrics"] = json.loads(row["metrics"])
        versions.setdefault(row["name"], {})[row["number"]] = Version(**fields)
    aliases = {row["alias"]: row["name"] for row in connection.execute("SELECT * FROM adapter_aliases ORDER BY alias")}
    adapters = {}
    for row in connection.execute("SELECT * FROM adapters WHERE current IS NOT NULL ORDER BY name"):
        canary = None if row["canary"] is None else Canary(row["canary"], row["canary_weight"])
        adapters[row["name"]] = AdapterRecord(
            name=row["name"],
            created=row["created"],
            current=row["current"],
            served=bool(row["served"]),
            versions=versions[row["name"]],
            canary=canary,
            aliases=tuple(alias for alias, name in aliases.items() if name == row["name"]),
        )
    return Catalogue(adapters, aliases)


def read_names(connection: Connection) -> list[NameRecord]:
    """All names that ever had a version, or had one reserved."""
    aliases: dict[str, list[str]] = {}
    for row in connection.execute("SELECT alias, name FROM adapter_aliases ORDER BY alias"):
        aliases.setdefault(row["name"], []).append(row["alias"])
    moves: dict[str, list[int]] = {}
    for row in connection.execute("SELECT name, number FROM adapter_moves ORDER BY id"):
        moves.setdefault(row["name"], []).append(row["number"])
    return [
        NameRecord(
            name=row["name"],
            created=row["created"],
            current=row["current"],
            next_number=row["next_number"],
            served=bool(row["served"]),
            canary=None if row["canary"] is None else Canary(row["canary"], row["canary_weight"]),
            aliases=tuple(aliases.get(row["name"], ())),
            moves=tuple(moves.get(row["name"], ())),
        )
        for row in connection.execute("SELECT * FROM adapters ORDER BY name")
    ]


def deleted_versions(connection: Connection) -> list[tuple[str, int]]:
    """(name, number) of deleted versions; their files may still be there."""
    query = "SELECT name, number FROM adapter_versions WHERE state = 'deleted'"
    return [(row["name"], row["number"]) for row in connection.execute(query)]


def reserve_number(connection: Connection, name: str) -> int:
    """Reserve the next version number of a name. It is never reused, also if no version results."""
    connection.execute("INSERT OR IGNORE INTO adapters (name, created) VALUES (?, ?)", (name, time.time()))
    row = connection.execute("SELECT next_number FROM adapters WHERE name = ?", (name,)).fetchone()
    connection.execute("UPDATE adapters SET next_number = next_number + 1 WHERE name = ?", (name,))
    return int(row["next_number"])


def add_version(connection: Connection, version: Version) -> None:
    """Add a version, and point its name to it."""
    insert_version(connection, version)
    move_pointer(connection, version.name, version.number)
    set_served(connection, version.name, served=True)


def insert_version(connection: Connection, version: Version) -> None:
    """Insert a version's row."""
    connection.execute(
        "INSERT INTO adapter_versions (name, number, key, created, rank, base, sha256, job, step, metrics)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            version.name, version.number, version.key, version.created, version.rank, version.base, version.sha256,
            version.job, version.step, json.dumps(version.metrics),
        ),
    )  # fmt: skip


def move_pointer(connection: Connection, name: str, number: int) -> None:
    """Point `name` to this version, and end its canary."""
    connection.execute(
        "UPDATE adapters SET current = ?, canary = NULL, canary_weight = NULL WHERE name = ?", (number, name)
    )
    moved = (name, number, time.time())
    connection.execute("INSERT INTO adapter_moves (name, number, moved) VALUES (?, ?, ?)", moved)


def previous_number(connection: Connection, name: str) -> int | None:
    """The last version that the name pointed to before and that still exists; None where there is none."""
    row = connection.execute(
        "SELECT m.number FROM adapter_moves m JOIN adapters a USING (name)"
        " JOIN adapter_versions v ON v.name = m.name AND v.number = m.number"
        " WHERE m.name = ? AND v.state = 'published' AND m.number != a.current ORDER BY m.id DESC LIMIT 1",
        (name,),
    ).fetchone()
    return None if row is None else int(row["number"])


def roll_back(connection: Connection, name: str, number: int) -> None:
    """Point to `number` again, and forget the moves since: a second roll back goes further back."""
    connection.execute(
        "DELETE FROM adapter_moves WHERE name = ? AND id >="
        " (SELECT max(id) FROM adapter_moves WHERE name = ? AND number = ?)",
        (name, name, number),
    )
    move_pointer(connection, name, number)


def set_served(connection: Connection, name: str, *, served: bool) -> None:
    """Record whether an adapter is served."""
    connection.execute("UPDATE adapters SET served = ? WHERE name = ?", (served, name))


def set_canary(connection: Connection, name: str, canary: Canary | None) -> None:
    """Set an adapter's canary; None removes it."""
    values = (canary.version, canary.weight) if canary else (None, None)
    connection.execute("UPDATE adapters SET canary = ?, canary_weight = ? WHERE name = ?", (*values, name))


def set_alias(connection: Connection, alias: str, name: str) -> None:
    """Point `alias` to `name`. Raises `NotFound` where `name` has no version: it may have been deleted since the
    look-up."""
    row = connection.execute("SELECT 1 FROM adapters WHERE name = ? AND current IS NOT NULL", (name,)).fetchone()
    if row is None:
        raise NotFound(f"There is no adapter {name[:200]!r}.", param="name")
    connection.execute("INSERT OR REPLACE INTO adapter_aliases (alias, name) VALUES (?, ?)", (alias, name))


def delete_alias(connection: Connection, alias: str) -> None:
    """Delete an alias."""
    connection.execute("DELETE FROM adapter_aliases WHERE alias = ?", (alias,))


def delete_version(connection: Connection, name: str, number: int) -> None:
    """Mark a version as deleted. The row stays, so that its number and key stay taken."""
    connection.execute("UPDATE adapter_versions SET state = 'deleted' WHERE name = ? AND number = ?", (name, number))
    connection.execute(
        "UPDATE adapters SET canary = NULL, canary_weight = NULL WHERE name = ? AND canary = ?", (name, number)
    )


def delete_adapter(connection: Connection, name: str) -> None:
    """Delete all versions, aliases and history of a name. Its numbers continue if the name is used again."""
    connection.execute("UPDATE adapter_versions SET state = 'deleted' WHERE name = ?", (name,))
    connection.execute("DELETE FROM adapter_aliases WHERE name = ?", (name,))
    connection.execute("DELETE FROM adapter_moves WHERE name = ?", (name,))
    connection.execute(
        "UPDATE adapters SET current = NULL, canary = NULL, canary_weight = NULL WHERE name = ?", (name,)
    )


# -- shared names ----------------------------------------------------------------------------------
#
# What a name means on all servers that share it (`runtime.adapters.shared`), read from rows and brought to rows.


def read_name(connection: Connection, name: str) -> tuple[NameRecord, tuple[Version, ...]] | None:
    """A name and its versions; None where it has no row."""
    record = next((one for one in read_names(connection) if one.name == name), None)
    if record is None:
        return None
    adapter = read_catalogue(connection).adapters.get(name)
    return record, () if adapter is None else tuple(adapter.versions.values())


def replace_name(connection: Connection, record: NameRecord, versions: tuple[Version, ...]) -> None:
    """Make a name mean this. Its other versions become deleted ones; a number that has been reserved stays taken."""
    name, canary = record.name, record.canary
    connection.execute("INSERT OR IGNORE INTO adapters (name, created) VALUES (?, ?)", (name, record.created))
    rows = connection.execute("SELECT number, key FROM adapter_versions WHERE name = ?", (name,))
    there = {row["number"]: row["key"] for row in rows}
    for version in versions:
        if version.number not in there:
            insert_version(connection, version)
    kept = {version.key for version in versions}
    for number, key in there.items():
        if key not in kept:
            delete_version(connection, name, number)
    connection.execute(
        "UPDATE adapters SET current = ?, next_number = max(next_number, ?), served = ?, canary = ?, canary_weight = ?"
        " WHERE name = ?",
        (
            record.current, record.next_number, record.served, canary and canary.version, canary and canary.weight,
            name,
        ),
    )  # fmt: skip
    connection.execute("DELETE FROM adapter_moves WHERE name = ?", (name,))
    for number in record.moves:
        moved = (name, number, time.time())
        connection.execute("INSERT INTO adapter_moves (name, number, moved) VALUES (?, ?, ?)", moved)
    connection.execute("DELETE FROM adapter_aliases WHERE name = ?", (name,))
    for alias in record.aliases:
        if connection.execute("SELECT 1 FROM adapters WHERE name = ?", (alias,)).fetchone() is None:
            set_alias(connection, alias, name)
