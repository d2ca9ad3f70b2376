"""Upkeep of a state directory without a server: its usage, deleting old parts, making its database again."""

import asyncio
import contextlib
import os
import sqlite3
from pathlib import Path

from msgspec import Struct, field

from runtime.adapters import recovery as adapters
from runtime.adapters.versions import RECORD
from runtime.batches import recovery as batch_recovery
from runtime.batches.manager import BatchManager
from runtime.batches.records import RECORD as BATCH_RECORD
from runtime.engine.state import SCHEMAS, adapter_folders, job_folders
from runtime.feedback import FeedbackStore
from runtime.files import recovery as file_recovery
from runtime.files.library import FileLibrary
from runtime.files.store import RECORD as FILE_RECORD
from runtime.responses import ResponseStore
from runtime.support.database import FILE, Database, DatabaseCorrupt
from runtime.support.durable import PARTIAL, move, remove
from runtime.support.state_directory import LostFound
from runtime.support.state_directory import batches as finds_of
from runtime.support.threads import WorkerThread
from runtime.trainer.data.prepared import FOLDER as PREPARED_FOLDER
from runtime.trainer.data.prepared import PreparedCache
from runtime.trainer.jobs import recovery as jobs
from runtime.trainer.jobs.directories import PREPARED, JobDirectories
from runtime.trainer.jobs.retention import Due, Keep, Retention
from runtime.trainer.jobs.store import JobStore
from settings.schema import Settings


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


class KindUsage(Struct, kw_only=True):
    """Things of one kind, and their size."""

    count: int = 0
    bytes: int = 0


class DiskUsage(Struct, kw_only=True):
    """Bytes of a state directory on the disk."""

    directory: str
    database: int
    adapters: dict[str, int]
    """Bytes by adapter version."""
    jobs: list[JobUsage]
    """Jobs, the largest first."""
    files: KindUsage
    """Files of /v1/files; the output of batches counts as theirs."""
    batches: KindUsage
    responses: KindUsage | None
    """Stored responses, which are a part of the database; None where it cannot be read."""
    feedback: KindUsage | None
    """Stored feedback, as the responses are."""
    prepared: KindUsage
    """Tokenised data for later jobs; files that a job that has not ended has a name for too count here alone."""
    lost_found: int
    free: int


class Pruned(Struct, kw_only=True):
    """The deleted items; of a dry run, the items that it would delete."""

    jobs: list[Due]
    batches: list[str]
    files: list[str]
    responses: int
    feedback: int
    prepared: list[str]
    """Names of the files."""
    lost_found: list[Path]

    def __bool__(self) -> bool:
        lists = (self.jobs, self.batches, self.files, self.prepared, self.lost_found)
        return any(lists) or bool(self.responses or self.feedback)


class Rebuilt(Struct, kw_only=True):
    """The outcome of making a database again."""

    jobs: list[str]
    adapters: list[str]
    files: list[str]
    batches: list[str]
    problems: list[str]
    """Folders that could not be adopted, each with the reason. They stay in place."""
    moved_aside: list[str] = field(default_factory=list)


def usage(directory: Path) -> DiskUsage:
    """Sizes on the disk, whether a server is at work there or not. Raises `OSError`."""
    found = [_job_usage(folder) for folder in job_folders(directory)]
    count, size = PreparedCache(directory / PREPARED_FOLDER, 0, 0.0).usage()
    room = os.statvfs(directory)
    return DiskUsage(
        directory=str(directory),
        database=sum(path.stat().st_size for path in directory.glob(f"{FILE}*")),
        adapters={f"{path.parent.name}@{path.name}": _size(path) for path in adapter_folders(directory)},
        jobs=sorted(found, key=lambda job: -job.total),
        files=_held(directory / "files"),
        batches=_held(directory / "batches"),
        responses=_rows(directory / FILE, "responses", "length(input) + length(response)"),
        feedback=_rows(directory / FILE, "feedback", "length(data)"),
        prepared=KindUsage(count=count, bytes=size),
        lost_found=sum(_size(batch) for batch in finds_of(directory)),
        free=room.f_bavail * room.f_frsize,
    )


def prune(directory: Path, settings: Settings, *, lost_found: bool, dry_run: bool) -> Pruned:
    """Delete what has been kept for as long as the settings say, and with `lost_found` all that was moved there. With
    `dry_run` it is only named. Raises as `Database`."""
    database = Database(directory, SCHEMAS)
    try:
        pruned = asyncio.run(_prune(database, directory, settings, dry_run=dry_run))
        pruned.lost_found = finds_of(directory) if lost_found else []
        if not dry_run:
            for batch in pruned.lost_found:
                remove(batch)
            database.compact()
    finally:
        database.close()
    return pruned


async def _prune(database: Database, directory: Path, settings: Settings, *, dry_run: bool) -> Pruned:
    trainer = settings.trainer
    keep = Keep(jobs=trainer.keep_jobs, checkpoints=trainer.keep_checkpoints, uploads=trainer.keep_uploads)
    files = FileLibrary(database, directory, settings.files)
    batches = BatchManager(database, directory, files, settings.files, max_line=settings.server.max_body)
    responses = ResponseStore(database, settings.responses)
    feedback = FeedbackStore(database, settings.feedback)
    ended = await _prune_jobs(database, directory, keep, dry_run=dry_run)
    gone = await (batches.due() if dry_run else batches.prune())
    prepared = PreparedCache(directory / PREPARED_FOLDER, trainer.prepared_cache, trainer.keep_uploads)
    return Pruned(
        jobs=ended,
        batches=gone,
        files=[file.id for file in await (files.due() if dry_run else files.prune())],
        responses=await (responses.due() if dry_run else responses.prune()),
        feedback=await (feedback.due() if dry_run else feedback.prune()),
        prepared=prepared.prune(dry_run=dry_run),
        lost_found=[],
    )


async def _prune_jobs(database: Database, directory: Path, keep: Keep, *, dry_run: bool) -> list[Due]:
    directories, store = JobDirectories(directory), JobStore(database, lambda job_id, counts: None)

    async def forget(job_id: str) -> None:
        await asyncio.to_thread(directories.discard, job_id)

    retention = Retention(store, directories, WorkerThread(), keep, forget)
    return await (retention.due() if dry_run else retention.prune())


def rebuild(directory: Path, *, lost_found: bool) -> Rebuilt:
    """Make rows for the jobs, adapters, files and batches that have folders and no rows; existing rows stay.

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
            files, unread = file_recovery.adopt(connection, directory)
            batches, unfit = batch_recovery.adopt(connection, directory)
            return Rebuilt(
                jobs=made,
                adapters=versions.made,
                files=files,
                batches=batches,
                problems=[*problems, *wrong, *versions.problems, *unread, *unfit],
                moved_aside=aside,
            )

        return database.run(work).result()
    finally:
        database.close()


def _put_back(directory: Path) -> list[str]:
    """Move whole folders of jobs, versions, files and batches back from lost+found, where nothing has their place; the
    newest first. Returns problems."""
    problems = []
    records = ("jobs/*/job.json", f"adapters/*/*/{RECORD}", f"files/*/{FILE_RECORD}", f"batches/*/{BATCH_RECORD}")
    for batch in reversed(finds_of(directory)):
        for folder in [record.parent for pattern in records for record in batch.glob(pattern)]:
            place = folder.relative_to(batch)
            try:
                move(folder, directory / place)
            except OSError as error:
                problems.append(f"{place}: cannot be put back: {error.strerror}")
    return problems


def _job_usage(folder: Path) -> JobUsage:
    parts = {name: _size(folder / name) for name in ("uploads", "checkpoints", "result")}
    shared = 0
    with contextlib.suppress(FileNotFoundError):
        prepared = (folder / PREPARED).stat()
        shared = prepared.st_size if prepared.st_nlink > 1 else 0  # counted with the cache
    return JobUsage(id=folder.name, **parts, other=_size(folder) - sum(parts.values()) - shared)


def _held(root: Path) -> KindUsage:
    folders = [path for path in root.glob("*") if PARTIAL not in path.name]
    return KindUsage(count=len(folders), bytes=sum(_size(folder) for folder in folders))


def _rows(file: Path, table: str, size: str) -> KindUsage | None:
    """Rows of a table; `size`: the expression for the bytes of one. None where the database cannot be read."""
    query = f"SELECT count(*), coalesce(sum({size}), 0) FROM {table}"
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            count, total = connection.execute(query).fetchone()
    except sqlite3.Error:
        return None
    return KindUsage(count=count, bytes=total)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file() and not path.is_symlink():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path, followlinks=False):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a server may be at work
                total += (Path(folder) / name).lstat().st_size
    return total
