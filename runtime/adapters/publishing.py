"""Publishing of a version: a fresh folder, on the disk; the version in memory; one transaction that adds its row and
moves the name's pointer. After a failure before that transaction, the old version is still served."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import msgspec

from runtime.adapters import store
from runtime.adapters.store import CheckpointVersion, Version, checkpoint_name
from runtime.adapters.versions import NamedVersions, VersionSource, digest, stage
from runtime.checkpoints.peft import AdapterInvalid, read_files
from runtime.checkpoints.peft.config import parse_config
from runtime.model.lora_base import LoraBase
from runtime.support.durable import remove, storage_unavailable
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.peft_files import CONFIG
from runtime.support.threads import call_in_fresh_thread

Transaction = Callable[[Callable[[Connection], Any]], Awaitable[Any]]
"""Runs its argument with the connection, as one transaction."""


class VersionPublisher:
    """Writer of folders and rows. The library handles names and their pointers."""

    def __init__(
        self, root: Path, base: LoraBase, named: NamedVersions, *, max_rank: int, max_vocabulary: int | None = None
    ) -> None:
        """`max_vocabulary`: most bytes of an adapter's rows of embedding and head."""
        self._max_vocabulary = max_vocabulary
        self._root = root
        self._base = base
        self._named = named
        self._max_rank = max_rank

    def directory(self, name: str, number: int) -> Path:
        """The folder of a version's files."""
        return self._root / name / str(number)

    async def publish(self, name: str, source: VersionSource, transaction: Transaction, **details: Any) -> Version:
        """Publish a version from `source`. Raises `AdapterInvalid`, `StorageUnavailable`; nothing of the version is
        left then."""
        number: int = await transaction(lambda connection: store.reserve_number(connection, name))
        while self.directory(name, number).exists():  # from any database: an existing folder is never changed
            number = await transaction(lambda connection: store.reserve_number(connection, name))
        failpoint("publish.after_reserve", name)
        directory = self.directory(name, number)
        version = await call_in_fresh_thread(
            self._stage, source, directory, {"name": name, "number": number, **details}
        )
        try:
            failpoint("publish.before_load", name)
            await self._named.warm(version, directory)
            failpoint("publish.before_commit", name)
            await transaction(lambda connection: _commit(connection, version))
        except BaseException:
            await self._named.release(version.key)
            await asyncio.to_thread(remove, directory)
            raise
        failpoint("publish.after_commit", name)
        return version

    async def same(self, path: Path, version: Version) -> bool:
        """True if the files in `path` are the files of `version`."""

        def compare() -> bool:
            files = read_files(path, self._base, max_rank=self._max_rank)
            return all((self.directory(version.name, version.number) / n).read_bytes() == d for n, d in files.items())

        try:
            return await call_in_fresh_thread(compare)
        except OSError:
            return False

    def _stage(self, source: VersionSource, directory: Path, details: dict[str, Any]) -> Version:
        """Put the files in place, and return the version."""
        made: list[Version] = []

        def describe(rank: int, sha256: str) -> bytes:
            key = f"{details['name']}@{details['number']}:{sha256[:12]}"
            base = self._base.fingerprint
            made.append(Version(key=key, created=time.time(), rank=rank, base=base, sha256=sha256, **details))
            return msgspec.json.format(msgspec.json.encode(made[0]))

        try:
            stage(
                source,
                directory,
                self._base,
                describe,
                max_rank=self._max_rank,
                max_vocabulary=self._max_vocabulary,
            )
        except OSError as error:
            raise storage_unavailable("The adapter cannot be stored", error) from error
        try:
            failpoint("publish.after_stage", directory.name)
        except BaseException:
            remove(directory)
            raise
        return made[0]


def _commit(connection: Connection, version: Version) -> None:
    store.add_version(connection, version)
    failpoint("publish.in_transaction", version.id)


# -- offers ----------------------------------------------------------------------------------------
#
# Checkpoints of running jobs that requests can name: their adapters, as `name:ckpt-step-20`.
#
# They are in no catalogue and in the job's folder alone, and there are none when the process starts.

_log = get_logger("adapters")


class Offers:
    """The offered checkpoints. Event loop only; other threads read files."""

    def __init__(self, base: LoraBase, *, max_rank: int) -> None:
        self._base = base
        self._max_rank = max_rank
        self._offered: dict[str, tuple[CheckpointVersion, Path]] = {}
        """Name in requests → version and folder."""

    def list(self) -> list[CheckpointVersion]:
        """All checkpoints; a job's in the order of their steps."""
        return [version for version, _ in self._offered.values()]

    def find(self, model: str) -> CheckpointVersion | None:
        return self._offered[model][0] if model in self._offered else None

    def directory(self, name: str) -> Path | None:
        """The folder of the checkpoint of this name; None where there is none."""
        return self._offered[name][1] if name in self._offered else None

    async def replace(self, name: str, job: str, folders: Mapping[int, Path]) -> Sequence[CheckpointVersion]:
        """Offer these folders, by step, as the current checkpoints of the job that publishes as `name`. Returns the
        ones that are no longer offered. A folder that cannot be read is logged, and not offered."""
        known = {version.number: version for version in self.list() if version.job == job}
        now = {
            step: known.get(step) or await asyncio.to_thread(self._read, name, job, step, folder)
            for step, folder in sorted(folders.items())
        }
        for version in known.values():
            del self._offered[version.id]
        for step, found in now.items():
            if found is not None:
                self._offered[found.id] = found, folders[step]
        return [version for step, version in known.items() if step not in now]

    def _read(self, name: str, job: str, step: int, folder: Path) -> CheckpointVersion | None:
        try:
            config = parse_config(read_files(folder, self._base, max_rank=self._max_rank)[CONFIG])
            sha256 = digest(folder)
            created = folder.stat().st_mtime
        except (OSError, AdapterInvalid) as error:
            _log.warning("checkpoint_not_offered", checkpoint=checkpoint_name(name, step), reason=str(error))
            return None
        return CheckpointVersion(
            name=name,
            number=step,
            key=f"{name}@ckpt-step-{step}:{sha256[:12]}",
            created=created,
            rank=max([config.r, *config.rank_pattern.values()]),
            base=self._base.fingerprint,
            sha256=sha256,
            job=job,
            step=step,
        )
