"""Adapters by name: publish, resolve, promote, roll back, delete. Belongs to the event loop; files and rows are
dealt with on other threads.
"""

import asyncio
import contextlib
import functools
import random
import shutil
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from runtime.errors import AdaptersBusy, AdapterUnavailable, Conflict, InvalidRequest, NotFound
from runtime.logs import get_logger
from runtime.trainer.adapters import store
from runtime.trainer.adapters.files import Source, sweep
from runtime.trainer.adapters.memory import AdapterHost, LoadedVersions
from runtime.trainer.adapters.names import check_name, split_version
from runtime.trainer.adapters.offers import Offers
from runtime.trainer.adapters.publishing import Publisher
from runtime.trainer.adapters.records import AdapterRecord, Canary, Catalogue, Version
from runtime.trainer.database import Database

P = ParamSpec("P")
T = TypeVar("T")
Records = list[AdapterRecord]
_log = get_logger("adapters")


def _exclusive(
    method: Callable[Concatenate["AdapterLibrary", str, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["AdapterLibrary", str, P], Coroutine[Any, Any, T]]:
    """One change of a name at a time, each to its end: whoever asked for it may leave meanwhile."""

    @functools.wraps(method)
    async def alone(self: "AdapterLibrary", name: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async def work() -> T:
            async with self._locks.setdefault(name, asyncio.Lock()):
                return await method(self, name, *args, **kwargs)

        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    return alone


class AdapterLibrary:
    """All adapters of one state directory. Made by `open`."""

    def __init__(
        self, database: Database, directory: Path, host: AdapterHost, *, max_loaded: int, max_rank: int
    ) -> None:
        self._database = database
        self._root = directory / "adapters"
        self._host = host
        self._loaded = LoadedVersions(host, most=max_loaded)
        self._publisher = Publisher(self._root, host.lora_base, self._loaded, max_rank=max_rank)
        self._offers = Offers(host.lora_base, max_rank=max_rank)
        self._max_loaded = max_loaded
        self._catalogue = Catalogue()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Future[Any]] = set()

    @classmethod
    async def open(
        cls, database: Database, directory: Path, host: AdapterHost, *, max_loaded: int, max_rank: int
    ) -> "AdapterLibrary":
        """Read the rows, delete what crashes left behind, and load what was published, newest first.

        `database` was made with `store.SCHEMA` among its schemas. Raises `StorageUnavailable`.
        """
        library = cls(database, directory, host, max_loaded=max_loaded, max_rank=max_rank)
        await library._change(lambda connection: None)
        live = [library.directory(v) for record in library.list() for v in record.versions.values()]
        if swept := await asyncio.to_thread(sweep, library._root, live):
            _log.info("adapter_leftovers_deleted", folders=swept)
        await library._load_published()
        return library

    async def close(self) -> None:
        """Wait for changes that are under way. The database is its owner's to close."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- asking --------------------------------------------------------------------------------

    def list(self) -> Records:
        """Every adapter, by name."""
        return [*self._catalogue.adapters.values()]

    def checkpoints(self) -> Sequence[Version]:
        """What running jobs have so far, each with a name of its own as its id."""
        return self._offers.list()

    def get(self, name: str) -> AdapterRecord:
        """The adapter of this name or alias. Raises `NotFound`."""
        record = self._catalogue.find(name)
        if record is None:
            raise NotFound(f"There is no adapter {name[:200]!r}.", param="name")
        return record

    def resolve(self, model: str) -> Version | None:
        """The version that a request for `model` (a name, an alias, `name@3` or `name:3`, a running job's
        `name:ckpt-step-20`) gets; None for none.

        With a canary, two calls may differ.
        """
        if (offered := self._offers.find(model)) is not None:
            return offered
        record, number = self._catalogue.find(model), None
        if record is None and (parts := split_version(model)) is not None:
            record, number = self._catalogue.find(parts[0]), parts[1]
        if record is None or not record.served:
            return None
        if number is None:
            number = record.current
            if record.canary is not None and random.random() < record.canary.weight:
                number = record.canary.version
        version = record.versions.get(number)
        return version if version is not None and self.fits(version) else None

    def fits(self, version: Version) -> bool:
        """Was it made for the base model that is served?"""
        return version.base == self._host.lora_base.fingerprint

    def is_loaded(self, version: Version) -> bool:
        return version.key in self._loaded

    def directory(self, version: Version) -> Path:
        """Where its files are."""
        return self._offers.directory(version.id) or self._publisher.directory(version.name, version.number)

    async def ready(self, version: Version) -> None:
        """Have a version in memory, so that a request submitted before the next await finds it there.
        Raises `AdaptersBusy`, `AdapterUnavailable`."""
        await self._loaded.ensure(version, self.directory(version))

    # -- publishing ----------------------------------------------------------------------------

    @_exclusive
    async def publish(
        self,
        name: str,
        source: Source,
        *,
        new: bool = False,
        job: str | None = None,
        step: int | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Version:
        """Add a version from a folder (or from what writes one), and point `name` to it.

        `new`: the name must not be there yet. Raises `InvalidRequest` for the name, `AdapterInvalid` for the
        files, `Conflict`, and `StorageUnavailable` when they cannot be stored; nothing has changed then.
        """
        self._check_free(name, "name")
        if new and name in self._catalogue.adapters:
            raise Conflict(f"There is an adapter {name!r} already.", param="name")
        return await self._publish(name, source, job=job, step=step, metrics=metrics or {})

    @_exclusive
    async def load_external(self, name: str, path: Path, *, inplace: bool) -> Version:
        """What `/v1/load_lora_adapter` does: publish the adapter in `path` under `name`.

        A name that is served already is an `InvalidRequest` unless `inplace`. One that was unloaded is served
        again, as the same version when the files are the same.
        """
        self._check_free(name, "lora_name")
        record = self._catalogue.adapters.get(name)
        if record is not None and record.served and not inplace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. To replace it, set load_inplace.",
                param="lora_name",
                code="adapter_exists",
            )
        if record is not None and self.fits(record.version) and await self._publisher.same(path, record.version):
            return await self._serve(record.version)
        return await self._publish(name, path)

    async def _publish(self, name: str, source: Source, **details: Any) -> Version:
        outcome = "failed"
        try:
            version = await self._publisher.publish(name, source, self._change, **details)
            outcome = "published"
        except InvalidRequest:
            outcome = "refused"
            raise
        finally:
            self._host.metrics.on_publish(outcome)
        _log.info("adapter_published", adapter=version.id, rank=version.rank, job=version.job, step=version.step)
        return version

    async def offer(self, name: str, job: str, folders: Mapping[int, Path]) -> None:
        """Let what a running job has so far be asked for: PEFT's files by step, those that are not among them no
        longer. Requests that run keep what they have in memory."""
        await self._release(await self._offers.replace(name, job, folders))

    # -- pointers ------------------------------------------------------------------------------

    @_exclusive
    async def load(self, name: str) -> Version:
        """Serve a name that was unloaded, and have its version in memory. Raises `NotFound`, `Conflict`."""
        return await self._serve(self._fitting(self._named(name), None))

    async def _serve(self, version: Version) -> Version:
        await self.ready(version)
        await self._change(lambda connection: store.set_served(connection, version.name, served=True))
        return version

    @_exclusive
    async def unload(self, name: str) -> None:
        """Serve a name no more, and free its memory once nobody uses it. Its versions stay. Raises `NotFound`."""
        record = self._named(name)
        await self._change(lambda connection: store.set_served(connection, name, served=False))
        await self._release(record.versions.values())

    @_exclusive
    async def promote(self, name: str, number: int) -> Version:
        """Point a name to another of its versions. Raises `NotFound`, `Conflict`, `AdapterUnavailable`."""
        version = self._fitting(self._named(name), number)
        await self._prepared(version)
        await self._change(lambda connection: store.move_pointer(connection, name, number))
        _log.info("adapter_promoted", adapter=version.id)
        return version

    @_exclusive
    async def rollback(self, name: str) -> Version:
        """Point a name to the version before. Raises `NotFound`, and `Conflict` where there is none."""
        record = self._named(name)
        number = await self._database.call(lambda connection: store.previous_number(connection, name))
        if number is None:
            raise Conflict(f"{record.version.id} has no version before it to go back to.", param="name")
        version = self._fitting(record, number)
        await self._prepared(version)
        await self._change(lambda connection: store.roll_back(connection, name, number))
        _log.info("adapter_rolled_back", adapter=version.id)
        return version

    @_exclusive
    async def set_alias(self, alias: str, name: str) -> None:
        """Let `alias` mean `name`, whatever it meant before. Raises `InvalidRequest`, `Conflict`, `NotFound`."""
        check_name(alias, base=self._host.model_name, param="alias")
        self._named(name)
        if alias in self._catalogue.adapters:
            raise Conflict(f"{alias!r} is an adapter's own name.", param="alias")
        await self._change(lambda connection: store.set_alias(connection, alias, name))

    @_exclusive
    async def delete_alias(self, alias: str, name: str) -> None:
        """Raises `NotFound` where `alias` does not mean `name`."""
        if self._catalogue.aliases.get(alias) != name:
            raise NotFound(f"{name[:200]!r} has no alias {alias[:200]!r}.", param="alias")
        await self._change(lambda connection: store.delete_alias(connection, alias))

    @_exclusive
    async def set_canary(self, name: str, number: int, weight: float) -> None:
        """Give a version a share of the requests for its name; 0 takes it back. Raises `NotFound`, `Conflict`."""
        record = self._named(name)
        if not 0.0 <= weight <= 1.0:
            raise InvalidRequest(f"weight must be from 0 to 1, got {weight:g}.", param="weight")
        version = self._fitting(record, number)
        if number == record.current:
            raise Conflict(f"{version.id} is the current version already.", param="version")
        canary = Canary(number, weight) if weight else None
        await self._prepared(version)
        await self._change(lambda connection: store.set_canary(connection, name, canary))

    # -- deleting ------------------------------------------------------------------------------

    @_exclusive
    async def delete(self, name: str, *, drain: bool = False) -> None:
        """Delete a name and all its versions. Requests that run keep what they have in memory.

        Raises `NotFound`, and `Conflict` while it is in use, unless `drain`.
        """
        record = self._named(name)
        self._refuse_if_used(record.versions.values(), drain=drain)
        await self._change(lambda connection: store.delete_adapter(connection, name))
        await self._discard(record.versions.values())
        _log.info("adapter_deleted", adapter=name)

    @_exclusive
    async def delete_version(self, name: str, number: int, *, drain: bool = False) -> None:
        """Delete one version that its name does not point to. Raises as `delete`."""
        record = self._named(name)
        version = self._version(record, number)
        if number == record.current:
            raise Conflict(f"{version.id} is the current version: promote another one first.", param="version")
        self._refuse_if_used([version], drain=drain)
        await self._change(lambda connection: store.delete_version(connection, name, number))
        await self._discard([version])

    # -- parts ---------------------------------------------------------------------------------

    def _check_free(self, name: str, param: str) -> None:
        check_name(name, base=self._host.model_name, param=param)
        if name in self._catalogue.aliases:
            raise Conflict(f"{name!r} is an alias of {self._catalogue.aliases[name]!r}.", param=param)

    def _named(self, name: str) -> AdapterRecord:
        """As `get`, but an alias does not count: what changes an adapter must name it."""
        if name not in self._catalogue.adapters:
            raise NotFound(f"There is no adapter {name[:200]!r}.", param="name")
        return self._catalogue.adapters[name]

    def _version(self, record: AdapterRecord, number: int) -> Version:
        if number not in record.versions:
            there = ", ".join(map(str, record.versions))
            raise NotFound(f"{record.name!r} has no version {number}; there are: {there}.", param="version")
        return record.versions[number]

    def _fitting(self, record: AdapterRecord, number: int | None) -> Version:
        version = self._version(record, record.current if number is None else number)
        if not self.fits(version):
            raise Conflict(f"{version.id} was made for another base model than the one that is served.")
        return version

    async def _prepared(self, version: Version) -> None:
        """In memory if there is room; surely readable."""
        with contextlib.suppress(AdaptersBusy):
            await self.ready(version)

    def _refuse_if_used(self, versions: Collection[Version], *, drain: bool) -> None:
        used = [version.id for version in versions if self._host.adapter_in_use(version.key)]
        if used and not drain:
            raise Conflict(f"{used[0]} is answering requests. Try again later, or with drain=1.", param="name")

    async def _release(self, versions: Collection[Version]) -> None:
        for version in versions:
            await self._loaded.release(version.key)

    async def _discard(self, versions: Collection[Version]) -> None:
        await self._release(versions)
        for version in versions:
            await asyncio.to_thread(shutil.rmtree, self.directory(version), ignore_errors=True)

    async def _load_published(self) -> None:
        served = [record.version for record in self.list() if record.served and self.fits(record.version)]
        for version in sorted(served, key=lambda version: -version.created)[: self._max_loaded]:
            with contextlib.suppress(AdapterUnavailable):  # logged; a request for it is told
                await self.ready(version)

    async def _change(self, work: Callable[[Connection], T]) -> T:
        """One transaction, and the catalogue as it is after it."""

        def transaction(connection: Connection) -> tuple[T, Catalogue]:
            result = work(connection)
            return result, store.read_catalogue(connection)

        result, self._catalogue = await self._database.call(transaction)
        return result
