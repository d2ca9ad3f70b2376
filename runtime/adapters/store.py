"""The library's rows. Every function here is part of a transaction of `runtime.trainer.database`."""

import json
import time
from sqlite3 import Connection

from runtime.trainer.adapters.records import AdapterRecord, Canary, Catalogue, Version

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


def reserve_number(connection: Connection, name: str) -> int:
    """The next version number of a name, which nobody gets again whatever becomes of this one."""
    connection.execute("INSERT OR IGNORE INTO adapters (name, created) VALUES (?, ?)", (name, time.time()))
    row = connection.execute("SELECT next_number FROM adapters WHERE name = ?", (name,)).fetchone()
    connection.execute("UPDATE adapters SET next_number = next_number + 1 WHERE name = ?", (name,))
    return int(row["next_number"])


def add_version(connection: Connection, version: Version) -> None:
    """A new version, and its name points to it."""
    connection.execute(
        "INSERT INTO adapter_versions (name, number, key, created, rank, base, sha256, job, step, metrics)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            version.name, version.number, version.key, version.created, version.rank, version.base, version.sha256,
            version.job, version.step, json.dumps(version.metrics),
        ),
    )  # fmt: skip
    move_pointer(connection, version.name, version.number)
    set_served(connection, version.name, served=True)


def move_pointer(connection: Connection, name: str, number: int) -> None:
    """`name` means this version from now on. A canary has done its work."""
    connection.execute(
        "UPDATE adapters SET current = ?, canary = NULL, canary_weight = NULL WHERE name = ?", (number, name)
    )
    moved = (name, number, time.time())
    connection.execute("INSERT INTO adapter_moves (name, number, moved) VALUES (?, ?, ?)", moved)


def previous_number(connection: Connection, name: str) -> int | None:
    """The version that the name pointed to before, and that is still there."""
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
    connection.execute("UPDATE adapters SET served = ? WHERE name = ?", (served, name))


def set_canary(connection: Connection, name: str, canary: Canary | None) -> None:
    values = (canary.version, canary.weight) if canary else (None, None)
    connection.execute("UPDATE adapters SET canary = ?, canary_weight = ? WHERE name = ?", (*values, name))


def set_alias(connection: Connection, alias: str, name: str) -> None:
    connection.execute("INSERT OR REPLACE INTO adapter_aliases (alias, name) VALUES (?, ?)", (alias, name))


def delete_alias(connection: Connection, alias: str) -> None:
    connection.execute("DELETE FROM adapter_aliases WHERE alias = ?", (alias,))


def delete_version(connection: Connection, name: str, number: int) -> None:
    """The row stays, so that its number and key stay taken."""
    connection.execute("UPDATE adapter_versions SET state = 'deleted' WHERE name = ? AND number = ?", (name, number))
    connection.execute(
        "UPDATE adapters SET canary = NULL, canary_weight = NULL WHERE name = ? AND canary = ?", (name, number)
    )


def delete_adapter(connection: Connection, name: str) -> None:
    """All versions, aliases and history of a name; the name keeps counting if it comes back."""
    connection.execute("UPDATE adapter_versions SET state = 'deleted' WHERE name = ?", (name,))
    connection.execute("DELETE FROM adapter_aliases WHERE name = ?", (name,))
    connection.execute("DELETE FROM adapter_moves WHERE name = ?", (name,))
    connection.execute(
        "UPDATE adapters SET current = NULL, canary = NULL, canary_weight = NULL WHERE name = ?", (name,)
    )
