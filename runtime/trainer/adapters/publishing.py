"""How a version comes to be: a fresh folder, on the disk; the version in memory; one transaction that adds its
row and moves the name's pointer. Whatever fails before that transaction leaves the old version serving."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from runtime.apart import call_apart
from runtime.errors import AdaptersBusy, StorageUnavailable
from runtime.failpoints import failpoint
from runtime.trainer.adapters import store
from runtime.trainer.adapters.files import Source, digest, stage
from runtime.trainer.adapters.memory import LoadedVersions
from runtime.trainer.adapters.records import Version
from runtime.workers.loading.peft import read_files
from runtime.workers.lora_base import LoraBase

Transaction = Callable[[Callable[[Connection], Any]], Awaitable[Any]]
"""Does its argument with the connection, as one transaction."""


class Publisher:
    """Knows folders and rows; names and what they point to are the library's."""

    def __init__(self, root: Path, base: LoraBase, loaded: LoadedVersions, *, max_rank: int) -> None:
        self._root = root
        self._base = base
        self._loaded = loaded
        self._max_rank = max_rank

    def directory(self, name: str, number: int) -> Path:
        """Where a version's files are."""
        return self._root / name / str(number)

    async def publish(self, name: str, source: Source, transaction: Transaction, **details: Any) -> Version:
        """Raises `AdapterInvalid`, `StorageUnavailable`; nothing of the version is left then."""
        number: int = await transaction(lambda connection: store.reserve_number(connection, name))
        failpoint("publish.after_reserve", name)
        directory = self.directory(name, number)
        version = None
        try:
            rank, sha256 = await call_apart(self._stage, source, directory)
            version = Version(
                name=name,
                number=number,
                key=f"{name}@{number}:{sha256[:12]}",
                created=time.time(),
                rank=rank,
                base=self._base.fingerprint,
                sha256=sha256,
                **details,
            )
            failpoint("publish.before_load", name)
            with contextlib.suppress(AdaptersBusy):  # it will be loaded when there is room
                await self._loaded.ensure(version, directory)
            failpoint("publish.before_commit", name)
            await transaction(lambda connection: _commit(connection, version))
        except BaseException:
            if version is not None:
                await self._loaded.release(version.key)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            raise
        failpoint("publish.after_commit", name)
        return version

    async def same(self, path: Path, version: Version) -> bool:
        """Are the files in `path` those of `version`?"""

        def compare() -> bool:
            files = read_files(path, self._base, max_rank=self._max_rank)
            return all((self.directory(version.name, version.number) / n).read_bytes() == d for n, d in files.items())

        try:
            return await call_apart(compare)
        except OSError:
            return False

    def _stage(self, source: Source, directory: Path) -> tuple[int, str]:
        try:
            rank = stage(source, directory, self._base, max_rank=self._max_rank)
            failpoint("publish.after_stage", directory.name)
            return rank, digest(directory)
        except OSError as error:
            raise StorageUnavailable(f"The adapter cannot be stored: {error.strerror or 'disk error'}.") from error


def _commit(connection: Connection, version: Version) -> None:
    store.add_version(connection, version)
    failpoint("publish.in_transaction", version.id)
