"""Upkeep of a state directory without a server: its usage, deleting old parts, making its database again."""

import asyncio
import contextlib
import os
import sqlite3
from pathlib import Path

from msgspec import Struct, field

from runtime.adapters import recovery as adapters
from runtime.adapters.versions import RECORD
from runtime.engine.state import SCHEMAS, adapter_folders, job_folders
from runtime.support.database import FILE, Database, DatabaseCorrupt
from runtime.support.durable import move, remove
from runtime.support.state_directory import LostFound, batches
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs import recovery as jobs
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.retention import Due, Keep, Retention
from runtime.trainer.jobs.store import JobStore


class JobUsage(Struct, kw_only=True):
    """Bytes of one job on the disk."""

    id: str
    uploads: int
    checkpoints: int
    result: int
    other: int

    @property
    def total(self) -> int:
        return self.uploads + self.checkpoints + self.result + self.other


class DiskUsage(Struct, kw_only=True):
    """Bytes of a state directory on the disk."""

    directory: str
    database: int
    adapters: dict[str, int]
    """Bytes by adapter version."""
    jobs: list[JobUsage]
    """Jobs, the largest first."""
    lost_found: int
    free: int


class Rebuilt(Struct, kw_only=True):
    """The outcome of making a database again."""

    jobs: list[str]
    adapters: list[str]
    problems: list[str]
    """Folders that could not be adopted, each with the reason. They stay in place."""
    moved_aside: list[str] = field(default_factory=list)


def usage(directory: Path) -> DiskUsage:
    """Sizes on the disk, whether a server is at work there or not. Raises `OSError`."""
    found = [_job_usage(folder) for folder in job_folders(directory)]
    room = os.statvfs(directory)
    return DiskUsage(
        directory=str(directory),
        database=sum(path.stat().st_size for path in directory.glob(f"{FILE}*")),
        adapters={f"{path.parent.name}@{path.name}": _size(path) for path in adapter_folders(directory)},
        jobs=sorted(found, key=lambda job: -job.total),
        lost_found=sum(_size(batch) for batch in batches(directory)),
        free=room.f_bavail * room.f_frsize,
    )


def prune(directory: Path, keep: Keep, *, lost_found: bool, dry_run: bool) -> tuple[list[Due], list[Path]]:
    """Delete what has been kept for long enough, and with `lost_found` all that was moved there. With `dry_run` it is
    only named. Raises as `Database`."""
    database = Database(directory, SCHEMAS)
    try:
        due = asyncio.run(_prune(database, directory, keep, dry_run=dry_run))
        finds = batches(directory) if lost_found else []
        if not dry_run:
            for batch in finds:
                remove(batch)
            database.compact()
    finally:
        database.close()
    return due, finds


async def _prune(database: Database, directory: Path, keep: Keep, *, dry_run: bool) -> list[Due]:
    directories, store = JobDirectories(directory), JobStore(database, lambda job_id, counts: None)

    async def forget(job_id: str) -> None:
        await asyncio.to_thread(directories.discard, job_id)

    retention = Retention(store, directories, WorkerThread(), keep, forget)
    return await (retention.due() if dry_run else retention.prune())


def rebuild(directory: Path, *, lost_found: bool) -> Rebuilt:
    """Make rows for the jobs and adapters that have folders and no rows; existing rows stay as they are.

    A damaged database is moved aside before. With `lost_found`, what was moved there is put back where it was. Raises
    as `Database`, but for `DatabaseCorrupt`.
    """
    aside: list[str] = []
    try:
        database = Database(directory, SCHEMAS)
    except DatabaseCorrupt:
        lost = LostFound(directory)
        aside = [path.name for path in sorted(directory.glob(f"{FILE}*")) if lost.keep(path)]
        database = Database(directory, SCHEMAS)
    try:
        problems = _put_back(directory) if lost_found else []

        def work(connection: sqlite3.Connection) -> Rebuilt:
            made, wrong = jobs.adopt(connection, JobDirectories(directory))
            versions = adapters.adopt(connection, directory / "adapters", verify=True)
            wrong = [*problems, *wrong, *versions.problems]
            return Rebuilt(jobs=made, adapters=versions.made, problems=wrong, moved_aside=aside)

        return database.run(work).result()
    finally:
        database.close()


def _put_back(directory: Path) -> list[str]:
    """Whole jobs and versions from lost+found, where nothing has their place; the newest first. Returns problems."""
    problems = []
    for batch in reversed(batches(directory)):
        whole = [*batch.glob("jobs/*/job.json"), *batch.glob(f"adapters/*/*/{RECORD}")]
        for folder in (record.parent for record in whole):
            place = folder.relative_to(batch)
            try:
                move(folder, directory / place)
            except OSError as error:
                problems.append(f"{place}: cannot be put back: {error.strerror}")
    return problems


def _job_usage(folder: Path) -> JobUsage:
    parts = {name: _size(folder / name) for name in ("uploads", "checkpoints", "result")}
    return JobUsage(id=folder.name, **parts, other=_size(folder) - sum(parts.values()))


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path, followlinks=False):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a server may be at work
                total += (Path(folder) / name).lstat().st_size
    return total
