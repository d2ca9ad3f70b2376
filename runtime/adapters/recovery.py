"""Recovery of rows from folders: each version's folder has a copy of its row, and one file has the meaning of names.

Existing rows have priority. This module is for a lost database, and for serving without a readable one.
"""

from collections.abc import Iterable
from pathlib import Path
from sqlite3 import Connection

import msgspec
from msgspec import Struct, field

from runtime.adapters import store
from runtime.adapters.store import NameRecord, Version, name_problem
from runtime.adapters.versions import NAMES, RECORD, digest, versions
from runtime.support.durable import PARTIAL, reason


class Adopted(Struct):
    """The result of making rows from folders."""

    made: list[str] = field(default_factory=list)
    """Ids of versions that got a row."""
    problems: list[str] = field(default_factory=list)
    """Folders that got no row, each with the reason."""


def adopt(connection: Connection, root: Path, *, verify: bool) -> Adopted:
    """Make rows for the versions below `root` without one, and for their names. Part of a transaction.

    With `verify`, their files are read and compared with their digests.
    """
    result = Adopted()
    known = {(row["name"], row["number"]) for row in connection.execute("SELECT name, number FROM adapter_versions")}
    found: dict[str, list[Version]] = {}
    for directory in versions(root):
        number = directory.name
        if PARTIAL in number or (directory.parent.name, int(number)) in known:
            continue
        try:
            version = _read_version(directory, verify=verify)
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            result.problems.append(f"adapters/{directory.parent.name}/{number}: {why}")
            continue
        found.setdefault(version.name, []).append(version)
    told = {record.name: record for record in _read_names(root, result)}
    for name, new in found.items():
        _add(connection, name, sorted(new, key=lambda version: version.number), told.get(name))
        result.made += [version.id for version in new]
    for name, record in told.items():
        if name in found:
            _add_aliases(connection, record)
        else:  # deleted, and its numbers stay taken
            _add_name(connection, name, record.created, record.next_number)
    return result


def _read_version(directory: Path, *, verify: bool) -> Version:
    """The record in a version's folder. Raises `OSError`, and `ValueError` where it does not fit the folder."""
    try:
        version = msgspec.json.decode((directory / RECORD).read_bytes(), type=Version)
    except FileNotFoundError:
        raise ValueError(f"it has no {RECORD}; load it as a new version with `eft adapters load`") from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"its {RECORD} is damaged: {error}") from None
    if (version.name, str(version.number)) != (directory.parent.name, directory.name) or name_problem(version.name):
        raise ValueError(f"its {RECORD} is that of {version.id}")
    if verify and digest(directory) != version.sha256:
        raise ValueError("its files are not what they were")
    return version


def _read_names(root: Path, result: Adopted) -> Iterable[NameRecord]:
    try:
        return msgspec.json.decode((root / NAMES).read_bytes(), type=list[NameRecord])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError) as error:
        result.problems.append(f"adapters/{NAMES}: {error}; names mean their newest versions")
        return ()


def _add(connection: Connection, name: str, new: list[Version], told: NameRecord | None) -> None:
    fresh = connection.execute("SELECT 1 FROM adapters WHERE name = ?", (name,)).fetchone() is None
    numbers = [version.number for version in new]
    next_number = max(numbers[-1] + 1, told.next_number if told else 0)
    _add_name(connection, name, told.created if told else new[0].created, next_number)
    for version in new:
        store.insert_version(connection, version)
    current = connection.execute("SELECT current FROM adapters WHERE name = ?", (name,)).fetchone()["current"]
    if current is not None:
        return
    moves = [number for number in told.moves if number in numbers] if told else []
    current = told.current if told and told.current in numbers else numbers[-1]
    for number in moves if moves and moves[-1] == current else [*moves, current]:
        store.move_pointer(connection, name, number)
    if fresh and told is not None:
        store.set_served(connection, name, served=told.served)
        if told.canary is not None and told.canary.version in numbers and told.canary.version != current:
            store.set_canary(connection, name, told.canary)


def _add_name(connection: Connection, name: str, created: float, next_number: int) -> None:
    connection.execute("INSERT OR IGNORE INTO adapters (name, created) VALUES (?, ?)", (name, created))
    query = "UPDATE adapters SET next_number = max(next_number, ?) WHERE name = ?"
    connection.execute(query, (next_number, name))


def _add_aliases(connection: Connection, record: NameRecord) -> None:
    for alias in record.aliases:
        taken = connection.execute(
            "SELECT 1 FROM adapters WHERE name = ? AND current IS NOT NULL UNION "
            "SELECT 1 FROM adapter_aliases WHERE alias = ?",
            (alias, alias),
        ).fetchone()
        if taken is None and name_problem(alias) is None:
            store.set_alias(connection, alias, record.name)
