"""Adapters by name: publish, resolve, promote, roll back, delete. Event loop only; work on files and rows
runs on other threads."""

import asyncio
import contextlib
import functools
import random
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from runtime.adapters import store
from runtime.adapters.card import Card, Cards
from runtime.adapters.publishing import Offers, VersionPublisher
from runtime.adapters.replica import FIRST_SYNC_SECONDS, FOLLOW_SECONDS, Replica
from runtime.adapters.resolver import AdapterResolver, AdapterSources
from runtime.adapters.shared import SharedStore
from runtime.adapters.store import (
    AdapterRecord,
    Canary,
    Catalogue,
    NameRecord,
    Version,
    canonical,
    check_name,
    clashes,
)
from runtime.adapters.versions import (
    AdapterHost,
    NamedVersions,
    NamesMirror,
    VersionSource,
    sweep,
    write_missing_record,
)
from runtime.checkpoints.peft import AdapterInvalid
from runtime.errors import (
    AdapterUnavailable,
    Conflict,
    EngineUnavailable,
    InvalidRequest,
    ModelLoading,
    NotFound,
    StorageUnavailable,
)
from runtime.metrics import AdapterTraffic
from runtime.support.database import Database
from runtime.support.durable import PARTIAL, make_directory, pinned, reason, remove
from runtime.support.event_loop import cancel
from runtime.support.logs import get_logger

P = ParamSpec("P")
T = TypeVar("T")
Records = list[AdapterRecord]
NameRecords = list[NameRecord]
INCOMING = ".incoming"
"""Folder beside those of the adapters, whose names never begin with a dot."""

_log = get_logger("adapters")


def _exclusive(
    method: Callable[Concatenate["AdapterLibrary", str, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["AdapterLibrary", str, P], Coroutine[Any, Any, T]]:
    """Run one change of a name at a time, each to its end, also when its caller is cancelled."""

    @functools.wraps(method)
    async def alone(self: "AdapterLibrary", name: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._held is not None:
            raise ModelLoading(self._held)

        async def work() -> T:
            async with self._locks.setdefault(canonical(name), asyncio.Lock()):
                return await method(self, name, *args, **kwargs)

        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    return alone


class AdapterLibrary:
    """All adapters of one state directory. Made by `open`."""

    def __init__(
        self,
        database: Database,
        directory: Path,
        host: AdapterHost,
        *,
        max_loaded: int,
        max_rank: int,
        max_vocabulary: int | None = None,
        sources: AdapterSources,
        shared: SharedStore | None = None,
    ) -> None:
        self._database = database
        self._state = directory
        self._root = directory / "adapters"
        self._host = host
        self._named_versions = NamedVersions(host)
        self._publisher = VersionPublisher(
            self._root, host.lora_base, self._named_versions, max_rank=max_rank, max_vocabulary=max_vocabulary
        )
        self._offers = Offers(host.lora_base, max_rank=max_rank)
        self._cards = Cards()
        self._mirror = NamesMirror(self._root)
        self._max_loaded = max_loaded
        self._catalogue = Catalogue()
        self.changes = 0
        """Changes of the catalogue so far."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._replica: Replica | None = None
        if shared is not None and database.frozen is None:
            self._replica = Replica(shared, self._commit, self._discard, self._publisher.directory)
        self._follower: asyncio.Task[None] | None = None
        self._held: str | None = None
        """Reason why nothing can be changed for now."""
        self._resolver = AdapterResolver(
            sources, make_folder=self.make_incoming, publish=lambda name, folder: self.publish(name, folder, new=True)
        )

    @classmethod
    async def open(
        cls,
        database: Database,
        directory: Path,
        host: AdapterHost,
        *,
        max_loaded: int,
        max_rank: int,
        max_vocabulary: int | None = None,
        sources: AdapterSources | None = None,
        shared: SharedStore | None = None,
        clears_up: bool = True,
    ) -> "AdapterLibrary":
        """Read the rows, clean up the leftovers of crashes, and load the published versions, newest first.

        `database` was made with `store.SCHEMA` among its schemas. `max_vocabulary`: most bytes of an adapter's rows of
        embedding and head. `sources`: where unknown adapters are looked for;
        default: nowhere. `shared`: where servers share adapters; what cannot be brought from there at the start comes
        when it can be reached. With a frozen database, nothing on the disk is changed. Not `clears_up`: files are on
        their way into the directory.
        Raises `StorageUnavailable`, and `SettingsError` for a shared store in which changes would be lost.
        """
        sources = sources or AdapterSources()
        library = cls(
            database,
            directory,
            host,
            max_loaded=max_loaded,
            max_rank=max_rank,
            max_vocabulary=max_vocabulary,
            sources=sources,
            shared=shared,
        )
        deleted = await library._commit(store.deleted_versions)
        library._catalogue.check_base(host.model_name)
        if database.frozen is None and clears_up:
            await asyncio.to_thread(library._clear_up, deleted)
        if library._replica is not None:
            with contextlib.suppress(TimeoutError, StorageUnavailable):
                async with asyncio.timeout(FIRST_SYNC_SECONDS):
                    await library._replica.check()
                    await library.follow_shared()
            library._catalogue.check_base(host.model_name)
            library._follower = asyncio.create_task(library._keep_following())
        await library._load_published()
        await library._cards.read(
            (version.key, library.directory(version)) for one in library.list() for version in one.versions.values()
        )
        return library

    async def close(self) -> None:
        """Wait for running changes. The owner of the database closes it."""
        await cancel(self._follower)
        await self._resolver.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hold(self, why: str | None) -> None:
        """Refuse changes with `why` from now on, and wait for those under way; None: take them again. What is there is
        served all the while."""
        self._held = why
        if why is not None:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def frozen(self) -> str | None:
        """Reason why the library is read-only; None where it is not."""
        return self._database.frozen

    # -- asking --------------------------------------------------------------------------------

    def list(self) -> Records:
        """Every adapter, by name."""
        return [*self._catalogue.adapters.values()]

    def checkpoints(self) -> Sequence[Version]:
        """Checkpoints of running jobs, each with a name of its own as its id."""
        return self._offers.list()

    def find(self, name: str) -> AdapterRecord | None:
        """The adapter of this name or alias; None where there is none."""
        return self._catalogue.find(name)

    def get(self, name: str) -> AdapterRecord:
        """The adapter of this name or alias. Raises `NotFound`."""
        record = self.find(name)
        if record is None:
            raise NotFound(f"There is no adapter {name[:200]!r}.", param="name")
        return record

    def resolve(self, model: str) -> Version | None:
        """The version for a request for `model` (a name, an alias, `name@3` or `name:3`, a running job's
        `name:ckpt-step-20`); None where there is none.

                With a canary, two calls may differ.
        """
        if (offered := self._offers.find(model)) is not None:
            return offered
        found = self._catalogue.locate(model)
        if found is None or not found[0].served:
            return None
        record, number = found
        if number is None:
            number = record.current
            if record.canary is not None and random.random() < record.canary.weight:
                number = record.canary.version
        version = record.versions.get(number)
        return version if version is not None and self.fits(version) else None

    async def look_for(self, model: str) -> None:
        """Publish the adapter `model` if the library does not know it, and the settings `adapters.resolve_folder` or
        `resolve_hub` lead to one. Raises `AdapterUnavailable`, `StorageUnavailable`."""
        catalogue = self._catalogue
        if catalogue.find(model) is not None or self._offers.find(model) is not None or self.frozen is not None:
            return
        if catalogue.namesake(model) is None and not clashes(model, self._host.model_name):
            await self._resolver.look_for(model)

    def fits(self, version: Version) -> bool:
        """True if the version was made for the served base model."""
        return version.base == self._host.lora_base.fingerprint

    def is_name(self, model: str) -> bool:
        """True for an adapter's name and for an alias, False for the id of one version."""
        return self._catalogue.find(model) is not None

    def traffic(self, version: Version) -> AdapterTraffic | None:
        """Requests to a version since it was loaded; None for one that is not in memory."""
        return self._host.metrics.adapter_traffic(version.key)

    def is_loaded(self, version: Version) -> bool:
        """True if the version is in memory."""
        return self._host.adapter_loaded(version.key)

    def card(self, version: Version) -> Card:
        """The version's card."""
        return self._cards.of(version.key)

    def directory(self, version: Version) -> Path:
        """The folder of the version's files."""
        return self._offers.directory(version.id) or self._publisher.directory(version.name, version.number)

    async def ready(self, version: Version) -> None:
        """Let a request name a version that is submitted before the next await; it waits in the queue for a place in
        memory. Raises `AdapterUnavailable`, `StorageUnavailable`."""
        await self._named_versions.ensure(version, self.directory(version))

    # -- publishing ----------------------------------------------------------------------------

    def make_incoming(self) -> Path:
        """A fresh folder for files on their way to `publish`. The caller removes it; what a crash leaves of it is
        deleted at the next start, as the rest of an unfinished version. Blocks. Raises `OSError`."""
        folder = self._root / INCOMING / f"0{PARTIAL}{uuid.uuid4().hex}"
        make_directory(folder)
        return folder

    @_exclusive
    async def publish(
        self,
        name: str,
        source: VersionSource,
        *,
        new: bool = False,
        job: str | None = None,
        step: int | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Version:
        """Add a version from a folder (or from a function that writes one), and point `name` to it.

                `new`: the name must not be there yet. Raises `InvalidRequest` for the name, `AdapterInvalid` for the
        files, `Conflict`, and `StorageUnavailable` when they cannot be stored; nothing has changed then.
        """
        self.check_free(name, "name")
        if new and name in self._catalogue.adapters:
            raise Conflict(f"There is an adapter {name!r} already.", param="name")
        return await self._publish(name, source, job=job, step=step, metrics=metrics or {})

    @_exclusive
    async def load_external(self, name: str, path: Path, *, inplace: bool) -> Version:
        """Publish the adapter in `path` under `name`, for `/v1/load_lora_adapter`. `path`: absolute, and without links
        when it was checked; none that is put there since is followed.

        Raises `InvalidRequest` for a name that is already served, unless `inplace`. An unloaded name is served again,
        as the same version when the files are the same.
        """
        self.check_free(name, "lora_name")
        record = self._catalogue.adapters.get(name)
        if record is not None and record.served and not inplace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. To replace it, set load_inplace.",
                param="lora_name",
                code="adapter_exists",
            )
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(pinned(path))
            except OSError as error:
                raise AdapterInvalid(f"The adapter's folder cannot be opened: {reason(error)}.") from error
            if record is not None and self.fits(record.version) and await self._publisher.same(folder, record.version):
                return await self._serve(record.version)
            return await self._publish(name, folder)

    async def _publish(self, name: str, source: VersionSource, **details: Any) -> Version:
        outcome = "failed"
        try:
            version = await self._publisher.publish(name, source, lambda work: self._change(name, work), **details)
            outcome = "published"
        except InvalidRequest:
            outcome = "refused"
            raise
        finally:
            self._host.metrics.on_publish(outcome)
        await self._cards.read([(version.key, self.directory(version))])
        _log.info("adapter_published", adapter=version.id, rank=version.rank, job=version.job, step=version.step)
        return version

    async def offer(self, name: str, job: str, folders: Mapping[int, Path]) -> None:
        """Make the checkpoints of a running job available to requests: folders of PEFT's files by step, in place of the
        job's earlier ones. Running requests keep their adapters in memory."""
        await self._release(await self._offers.replace(name, job, folders))
        await self._cards.read((version.key, self.directory(version)) for version in self._offers.list())

    # -- pointers ------------------------------------------------------------------------------

    @_exclusive
    async def load(self, name: str) -> Version:
        """Serve an unloaded name, and load its version into memory. Raises `NotFound`, `Conflict`."""
        return await self._serve(self._fitting(self._catalogue.named(name), None))

    async def _serve(self, version: Version) -> Version:
        await self._prepared(version)
        await self._change(version.name, lambda connection: store.set_served(connection, version.name, served=True))
        return version

    @_exclusive
    async def unload(self, name: str) -> None:
        """Stop serving a name, and free its memory after the last use. Its versions stay. Raises `NotFound`."""
        record = self._catalogue.named(name)
        await self._change(name, lambda connection: store.set_served(connection, name, served=False))
        await self._release(record.versions.values())

    @_exclusive
    async def promote(self, name: str, number: int) -> Version:
        """Point a name to another of its versions. Raises `NotFound`, `Conflict`, `AdapterUnavailable`."""
        version = self._fitting(self._catalogue.named(name), number)
        await self._prepared(version)
        await self._change(name, lambda connection: store.move_pointer(connection, name, number))
        _log.info("adapter_promoted", adapter=version.id)
        return version

    @_exclusive
    async def rollback(self, name: str) -> Version:
        """Point a name to its previous version. Raises `NotFound`, and `Conflict` where there is none."""
        record = self._catalogue.named(name)
        number = await self._database.call(lambda connection: store.previous_number(connection, name))
        if number is None:
            raise Conflict(f"{record.version.id} has no version before it to go back to.", param="name")
        version = self._fitting(record, number)
        await self._prepared(version)
        await self._change(name, lambda connection: store.roll_back(connection, name, number))
        _log.info("adapter_rolled_back", adapter=version.id)
        return version

    @_exclusive
    async def set_alias(self, alias: str, name: str) -> None:
        """Point `alias` to `name`, in place of an earlier target. Raises `InvalidRequest`, `Conflict`, `NotFound`."""
        check_name(alias, base=self._host.model_name, param="alias")
        self._catalogue.named(name)
        if (known := self._catalogue.namesake(alias)) is not None:
            what = "an adapter's own name" if known in self._catalogue.adapters else "an alias"
            raise Conflict(f"{known!r} is {what}: {alias!r} would be the same in other letters.", param="alias")
        if alias in self._catalogue.adapters:
            raise Conflict(f"{alias!r} is an adapter's own name.", param="alias")
        await self._change(name, lambda connection: store.set_alias(connection, alias, name))

    @_exclusive
    async def delete_alias(self, alias: str, name: str) -> None:
        """Delete an alias. Raises `NotFound` where `alias` does not point to `name`."""
        if self._catalogue.aliases.get(alias) != name:
            raise NotFound(f"{name[:200]!r} has no alias {alias[:200]!r}.", param="alias")
        await self._change(name, lambda connection: store.delete_alias(connection, alias))

    @_exclusive
    async def set_canary(self, name: str, number: int, weight: float) -> None:
        """Give a version a share of the requests for its name, from 0 to 1; 0 ends the canary. Raises `NotFound`,
        `Conflict`."""
        record = self._catalogue.named(name)
        if not 0.0 <= weight <= 1.0:
            raise InvalidRequest(f"weight must be from 0 to 1, got {weight:g}.", param="weight")
        version = self._fitting(record, number)
        if number == record.current:
            raise Conflict(f"{version.id} is the current version already.", param="version")
        canary = Canary(number, weight) if weight else None
        await self._prepared(version)
        await self._change(name, lambda connection: store.set_canary(connection, name, canary))

    # -- sharing -------------------------------------------------------------------------------

    def revision(self, name: str) -> int | None:
        """Revision of a name in the shared store that this server has; None without a store."""
        return None if self._replica is None else self._replica.revisions.get(name)

    @property
    def shared_problem(self) -> str | None:
        """Reason why the shared store cannot be reached; None while it can, and where there is none."""
        return None if self._replica is None else self._replica.problem

    async def follow_shared(self) -> None:
        """Take what other servers have changed, and share names that only this server has. Raises
        `StorageUnavailable`."""
        replica = self._replica
        if replica is None:
            return
        for name, revision in (await replica.newer()).items():
            try:
                await self._follow(name, revision)
            except (InvalidRequest, Conflict) as error:
                replica.refuse(name, revision, error)
        for name in [name for name in self._catalogue.adapters if replica.is_unknown(name)]:
            await self._share(name)

    @_exclusive
    async def _follow(self, name: str, revision: int) -> None:
        assert self._replica is not None
        check_name(name, base=self._host.model_name, param="name")
        await self._replica.take(name, revision)
        record = self._catalogue.adapters.get(name)
        if record is None:
            return
        await self._cards.read((version.key, self.directory(version)) for version in record.versions.values())
        if record.served and self.fits(record.version):
            with contextlib.suppress(AdapterUnavailable, StorageUnavailable):  # logged; requests get the error
                await self._prepared(record.version)

    @_exclusive
    async def _share(self, name: str) -> None:
        if self._replica is not None and self._replica.is_unknown(name):
            await self._replica.share(name)

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.follow_shared()
            except (StorageUnavailable, EngineUnavailable):
                continue  # logged once, or nothing can be changed for now
            except Exception as error:
                _log.error("cannot_follow_shared_store", reason=f"{type(error).__name__}: {error}")

    # -- deleting ------------------------------------------------------------------------------

    @_exclusive
    async def delete(self, name: str, *, drain: bool = False) -> None:
        """Delete a name and all its versions. Running requests keep their adapters in memory.

        Raises `NotFound`, and `Conflict` while it is in use, unless `drain`.
        """
        record = self._catalogue.named(name)
        self._refuse_if_used(record.versions.values(), drain=drain)
        await self._change(name, lambda connection: store.delete_adapter(connection, name))
        await self._discard(record.versions.values())
        _log.info("adapter_deleted", adapter=name)

    @_exclusive
    async def delete_version(self, name: str, number: int, *, drain: bool = False) -> None:
        """Delete one version that its name does not point to. Raises as `delete`."""
        record = self._catalogue.named(name)
        version = record.at(number)
        if number == record.current:
            raise Conflict(f"{version.id} is the current version: promote another one first.", param="version")
        self._refuse_if_used([version], drain=drain)
        await self._change(name, lambda connection: store.delete_version(connection, name, number))
        await self._discard([version])

    # -- parts ---------------------------------------------------------------------------------

    def check_free(self, name: str, param: str) -> None:
        """See `Catalogue.check_free`. Any thread."""
        self._catalogue.check_free(name, base=self._host.model_name, param=param)

    def _fitting(self, record: AdapterRecord, number: int | None) -> Version:
        version = record.at(record.current if number is None else number)
        if not self.fits(version):
            raise Conflict(f"{version.id} was made for another base model than the one that is served.")
        return version

    async def _prepared(self, version: Version) -> None:
        """Load a version into memory if there is room; in any case check that it is readable."""
        await self._named_versions.warm(version, self.directory(version))

    def _refuse_if_used(self, versions: Collection[Version], *, drain: bool) -> None:
        used = [version.id for version in versions if self._host.adapter_in_use(version.key)]
        if used and not drain:
            raise Conflict(f"{used[0]} is answering requests. Try again later, or with drain=1.", param="name")

    async def _release(self, versions: Collection[Version]) -> None:
        for version in versions:
            await self._named_versions.release(version.key)

    async def _discard(self, versions: Collection[Version]) -> None:
        await self._release(versions)
        for version in versions:
            await asyncio.to_thread(remove, self.directory(version))

    def _clear_up(self, deleted: Sequence[tuple[str, int]]) -> None:
        live = {self.directory(v): v for record in self.list() for v in record.versions.values()}
        try:
            sweep(self._state, self._root, live, {self._publisher.directory(*version) for version in deleted})
            for directory, version in live.items():
                write_missing_record(directory, version)
        except OSError as error:
            _log.error("cannot_clear_up_adapters", reason=reason(error))

    async def _load_published(self) -> None:
        served = [record.version for record in self.list() if record.served and self.fits(record.version)]
        for version in sorted(served, key=lambda version: -version.created)[: self._max_loaded]:
            with contextlib.suppress(AdapterUnavailable, StorageUnavailable):  # logged; requests for it get the error
                await self._prepared(version)

    async def _change(self, name: str, work: Callable[[Connection], T]) -> T:
        """Change what a name means: on this server, or on all that share its adapters."""
        if self._replica is not None:
            return await self._replica.change(name, work)
        return await self._commit(work)

    async def _commit(self, work: Callable[[Connection], T]) -> T:
        """Run one transaction, and read the catalogue after it."""

        def transaction(connection: Connection) -> tuple[T, Catalogue, NameRecords]:
            result = work(connection)
            return result, store.read_catalogue(connection), store.read_names(connection)

        result, self._catalogue, names = await self._database.call(transaction)
        self.changes += 1
        if self.frozen is None:
            await self._mirror.write(names)
        return result
