"""One server's copy of the shared store: its changes go to the store first, and others' changes are taken from there.

A change is computed on the rows, written to the store as the next revision of the name, and only then committed to the
rows. Where another server was faster, its revision is taken first, and the change computed again. So the rows never
have what the store has not, and a process that ends in between takes the revision at its next start.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from sqlite3 import Connection
from typing import Any, TypeVar

from runtime.adapters import store
from runtime.adapters.shared import SharedName, SharedStore
from runtime.adapters.shared_objects import ConditionalWritesMissing
from runtime.adapters.store import NameRecord, Version, canonical
from runtime.checkpoints.peft import AdapterInvalid
from runtime.errors import Conflict, StorageUnavailable
from runtime.support.durable import reason
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.threads import call_in_fresh_thread
from settings.errors import SettingsError

T = TypeVar("T")
RowChange = Callable[[Connection], T]
Commit = Callable[[RowChange[Any]], Awaitable[Any]]
Discard = Callable[[Collection[Version]], Awaitable[None]]
NameMeaning = tuple[NameRecord, tuple[Version, ...]]

FOLLOW_SECONDS = 1.0
"""Time between looks at the shared store."""
FIRST_SYNC_SECONDS = 60.0
"""Most that a start waits for the shared store; the rest comes afterwards."""
ANSWER_SECONDS = 60.0
"""Most that one read or write of the shared store may take; the libraries' own limits are shorter."""
TRANSFER_SECONDS = 1800.0
"""The same of all files of a version."""
MAX_TRIES = 100
"""Tries of a change while other servers change the same name."""

_log = get_logger("adapters")


class Replica:
    """The revisions that this server has. Event loop only, one change of a name at a time; the store is reached on
    threads."""

    def __init__(
        self, shared: SharedStore, commit: Commit, discard: Discard, directory: Callable[[str, int], Path]
    ) -> None:
        """`commit` runs a transaction on the rows, `discard` deletes versions' files and memory here, `directory` is
        the folder of a version."""
        self._shared = shared
        self._commit = commit
        self._discard = discard
        self._directory = directory
        self._refused: dict[str, int] = {}
        """Names whose revision cannot be taken here, with it: logged once."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.revisions: dict[str, int] = {}
        """The revision of each name that this server has."""
        self.problem: str | None = None
        """Reason why the store could not be reached last time."""

    async def newer(self) -> dict[str, int]:
        """Names with a revision that this server has neither taken nor refused. Raises `StorageUnavailable`."""
        newest = await self._reach(self._shared.revisions)
        return {
            name: revision
            for name, revision in newest.items()
            if revision > self.revisions.get(name, 0) and revision != self._refused.get(name)
        }

    async def take(self, name: str, revision: int) -> None:
        """Bring files and rows to a revision. Raises `StorageUnavailable`, `AdapterInvalid`, and `Conflict` where the
        name has another adapter's versions here."""
        async with self._locks[name]:
            if revision > self.revisions.get(name, 0):  # else an own change was faster
                await self._take_newest(await self._reach(self._shared.read, name, revision))

    async def check(self) -> None:
        """Raise `SettingsError` for a store in which servers would lose each other's changes. One that cannot be
        reached, or that this server may not write to, is none."""
        try:
            await self._within(ANSWER_SECONDS, self._shared.check)
        except ConditionalWritesMissing as error:
            raise SettingsError([f"adapters.shared_store: servers would lose each other's changes: {error}"]) from error
        except OSError as error:
            _log.warning("shared_store_not_checked", reason=_text(error))

    def is_unknown(self, name: str) -> bool:
        """True for a name that the store does not have, as far as this server has seen."""
        return name not in self.revisions and name not in self._refused

    def refuse(self, name: str, revision: int, error: Exception) -> None:
        """Leave a name as it is until its next revision."""
        self._refused[name] = revision
        _log.error("shared_adapter_refused", adapter=name, revision=revision, reason=str(error))

    async def change(self, name: str, work: RowChange[T]) -> T:
        """Make a change on all servers. Raises what `work` raises, and `StorageUnavailable` where the store cannot be
        reached: nothing has changed then."""
        async with self._locks[name]:
            for _ in range(MAX_TRIES):
                done, result = await self._try(name, work)
                if done:
                    return result
        raise StorageUnavailable(f"Other servers changed {name!r} {MAX_TRIES} times meanwhile: try again.")

    async def _try(self, name: str, work: RowChange[T]) -> tuple[bool, T]:
        """(False where another server was faster, the result of `work`)."""
        known: SharedName | None = await self._reach(self._shared.newest, name)
        newest, own = 0 if known is None else known.revision, self.revisions.get(name, 0)
        if newest < own:  # an empty mount point, or another bucket
            raise self._lost(OSError(f"it has revision {newest} of {name!r}, and had revision {own}"))
        if known is None:
            await self._refuse_namesake(name)
        elif newest > own:
            known = await self._take_newest(known)
            newest = known.revision
        result, (record, versions) = await self._commit(lambda connection: _try_out(connection, name, work))
        before = {} if known is None else {version.key: version for version in known.versions}
        for version in versions:
            if version.key not in before:
                folder = self._directory(name, version.number)
                await self._reach(self._shared.upload, version, folder, seconds=TRANSFER_SECONDS)
        wanted = SharedName(revision=newest + 1, record=record, versions=versions)
        if await self._reach(self._shared.write, wanted):
            failpoint("shared.before_commit", name)
            await self._commit(lambda connection: store.replace_name(connection, record, versions))
            self.revisions[name] = newest + 1
            await self._delete([before[key] for key in before.keys() - wanted.keys])
            return True, result
        return False, result

    async def _refuse_namesake(self, name: str) -> None:
        """Raise `Conflict` where the store has a name that differs from a new one in the case of letters alone."""
        for other, revision in (await self._reach(self._shared.revisions)).items():
            if other != name and canonical(other) == canonical(name):
                if not (await self._reach(self._shared.read, other, revision)).versions:
                    continue  # it was deleted
                raise Conflict(
                    f"Another server has the adapter {other!r}, and {name!r} differs in the case of letters alone: use "
                    "that name, or another one.",
                    param="name",
                )

    async def share(self, name: str) -> None:
        """Bring a name that only this server has to the store. Raises `StorageUnavailable`."""
        await self.change(name, lambda connection: None)

    async def _take_newest(self, shared: SharedName) -> SharedName:
        """Take a revision, or the one after it where another server has deleted versions meanwhile. Returns which."""
        while True:
            try:
                await self._take(shared)
                return shared
            except AdapterInvalid:
                newer: SharedName | None = await self._reach(self._shared.newest, shared.record.name)
                if newer is None or newer.revision <= shared.revision:
                    raise
                shared = newer

    async def _take(self, shared: SharedName) -> None:
        name = shared.record.name
        found = await self._commit(lambda connection: store.read_name(connection, name))
        here = {version.number: version for version in found[1]} if found else {}
        for version in shared.versions:
            if (mine := here.get(version.number)) is not None and mine.key != version.key:
                raise Conflict(
                    f"{version.id} is another adapter here than in the shared store. Export it, delete {name!r} from "
                    "this server's state directory, and publish it under another name.",
                    param="name",
                )
        for version in shared.versions:
            folder = self._directory(name, version.number)
            if version.number not in here and not folder.exists():
                await self._reach(self._shared.download, version, folder, seconds=TRANSFER_SECONDS)
        await self._commit(lambda connection: store.replace_name(connection, shared.record, shared.versions))
        self.revisions[name] = shared.revision
        self._refused.pop(name, None)
        await self._discard([version for version in here.values() if version.key not in shared.keys])
        _log.info("shared_adapter_taken", adapter=name, revision=shared.revision, current=shared.record.current)

    async def _delete(self, versions: list[Version]) -> None:
        for version in versions:
            try:
                await self._reach(self._shared.remove, version)
            except StorageUnavailable as error:  # it takes room, and no revision names it
                _log.warning("shared_version_not_deleted", adapter=version.id, reason=str(error))

    async def _reach(self, function: Callable[..., T], *args: Any, seconds: float | None = None) -> T:
        """Call the store. `seconds`: most that this may take, by default `ANSWER_SECONDS`. Raises
        `StorageUnavailable`."""
        try:
            result = await self._within(seconds or ANSWER_SECONDS, function, *args)
        except OSError as error:
            raise self._lost(error) from error
        if self.problem is not None:
            self.problem = None
            _log.info("shared_store_reached")
        return result

    async def _within(self, seconds: float, function: Callable[..., T], *args: Any) -> T:
        """Call the store on a thread of its own, which a store that never answers may keep. Raises `OSError`."""
        try:
            async with asyncio.timeout(seconds) as limit:
                return await call_in_fresh_thread(function, *args)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the store's own
            raise TimeoutError(f"it did not answer within {seconds:g} s") from error

    def _lost(self, error: OSError) -> StorageUnavailable:
        text = _text(error)
        if self.problem is None:
            _log.error("shared_store_lost", reason=text)
        self.problem = text
        return StorageUnavailable(
            "The shared store of adapters cannot be reached, so nothing can be changed now; what this server has is "
            f"served: {text}.",
            code="shared_store_unavailable",
        )


def _text(error: OSError) -> str:
    """The error of a store in words; those of libraries have no number."""
    return reason(error) if error.errno else str(error)


def _try_out(connection: Connection, name: str, work: RowChange[T]) -> tuple[T, NameMeaning]:
    """The result of a change and what the name would mean; the rows stay as they are."""
    connection.execute("SAVEPOINT try_out")
    try:
        result = work(connection)
        meaning = store.read_name(connection, name)
    finally:
        connection.execute("ROLLBACK TO try_out")
        connection.execute("RELEASE try_out")
    if meaning is None:
        raise AdapterInvalid(f"there is no adapter {name!r}")
    return result, meaning
