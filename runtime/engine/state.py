"""The state directory of a server: its database, its adapters and its jobs, opened together and closed in order."""

import asyncio
import contextlib
import errno
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.adapters import recovery
from runtime.adapters.library import AdapterLibrary
from runtime.adapters.resolver import AdapterSources
from runtime.adapters.shared import SharedStore
from runtime.adapters.shared_objects import open_objects
from runtime.adapters.versions import versions
from runtime.batches import recovery as batch_recovery
from runtime.batches import store as batch_store
from runtime.batches.manager import BatchManager
from runtime.checkpoints.model_library import FOLDER as MODELS
from runtime.engine.jobs import EngineJobs
from runtime.errors import StorageUnavailable
from runtime.feedback import SCHEMA as FEEDBACK_SCHEMA
from runtime.feedback import FeedbackStore
from runtime.files import recovery as file_recovery
from runtime.files import store as file_store
from runtime.files.library import FileLibrary
from runtime.responses import SCHEMA as RESPONSE_SCHEMA
from runtime.responses import ResponseStore
from runtime.support.database import FILE, LOCK, Database, DatabaseUnusable, check, connect, migrate
from runtime.support.durable import DISK_FULL, PARTIAL, reason, tighten
from runtime.support.event_loop import running
from runtime.support.logs import get_logger
from runtime.support.state_directory import NAMES, state_directory
from runtime.trainer.host import TrainingHost
from runtime.trainer.jobs import rows
from runtime.trainer.jobs.manager import JobManager, running_jobs
from runtime.trainer.slices import LatencyTargets, TrainingShare
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

SCHEMAS = (*rows.SCHEMAS, file_store.SCHEMA, batch_store.SCHEMA, RESPONSE_SCHEMA, FEEDBACK_SCHEMA)
"""The tables of all parts that keep rows in the state directory's database."""

PRUNE_SECONDS = 60.0
"""Seconds between two looks for files, batches, responses and feedback that have been kept for long enough."""

_log = get_logger("state")


@dataclass
class OpenedState:
    """An opened state directory."""

    adapters: AdapterLibrary | None
    jobs: JobManager | None
    files: FileLibrary | None = None
    batches: BatchManager | None = None
    responses: ResponseStore | None = None
    feedback: FeedbackStore | None = None
    directory: Path | None = None
    """Path of the directory, for other files that are kept there."""
    problem: str | None = None
    """Reason why there are no jobs and adapters cannot be changed. Contains no path."""
    database: Database | None = None


@asynccontextmanager
async def open_state(service: "EngineService", settings: Settings) -> AsyncIterator[OpenedState]:
    """Open (and create) it for the model that `service`, started, serves; training resumes the jobs that it finds.

    Where it cannot be written, or its database cannot be used, what was published is served, and nothing is changed on
    the disk. Raises `StateDirectoryInUse`, and `OSError` where there can be no such directory.
    """
    directory, problem = state_directory(settings), None
    async with AsyncExitStack() as stack:
        try:
            library, database = await _open_library(service, settings, directory)
        except Exception as error:
            if not serves_frozen(directory, error):
                raise
            problem = explain(error)
            _log.error("state_not_usable", directory=str(directory), reason=str(error))
            library, database = await _open_library(service, settings, directory, frozen=problem)
        stack.push_async_callback(asyncio.to_thread, database.close)
        opened = OpenedState(library, None, directory=directory, database=database)
        stack.push_async_callback(_close_adapters, opened)
        jobs = files = batches = responses = feedback = None
        if problem is None:
            engine = _make_jobs_engine(service, library, settings, directory)
            running_manager = running_jobs(database, directory, engine, service.metrics, settings.trainer)
            try:
                jobs = await stack.enter_async_context(running_manager)
                files = FileLibrary(database, directory, settings.files)
                await files.start()
                batches = BatchManager(database, directory, files, settings.files, max_line=settings.server.max_body)
                stack.push_async_callback(batches.stop)
                responses = ResponseStore(database, settings.responses)
                feedback = FeedbackStore(database, settings.feedback)
                await stack.enter_async_context(running(_prune_regularly(batches, files, responses, feedback)))
            except (OSError, StorageUnavailable) as error:
                problem = explain(error)
                _log.error("jobs_not_usable", directory=str(directory), reason=str(error))
        if problem is not None:
            _log.warning("serving_read_only", adapters=[record.name for record in library.list() if record.served])
        opened.jobs, opened.files, opened.batches, opened.problem = jobs, files, batches, problem
        opened.responses, opened.feedback = responses, feedback
        yield opened


async def _close_adapters(opened: OpenedState) -> None:
    if opened.adapters is not None:
        await opened.adapters.close()


def _make_jobs_engine(
    service: "EngineService", library: AdapterLibrary, settings: Settings, directory: Path
) -> EngineJobs:
    """The engine as jobs reach it, which trains between the steps of `service` from now on."""
    metrics = service.metrics
    share = TrainingShare(
        LatencyTargets.of(settings.scheduler), min_share=settings.trainer.min_share, on_miss=metrics.on_target_miss
    )
    host = TrainingHost(
        share,
        metrics.on_slice,
        lambda: service.has_messages,
        riding_rows=settings.trainer.riding_rows,
        kept_widths=lambda: service.engine.kept_widths,
        on_ride=metrics.on_ride,
    )
    service.background = host
    return EngineJobs(service, library, settings, directory, host)


class MovingState:
    """A state directory on its way to another model: nothing in it changes until `finish` or `cancel`. Event loop only.

    What was open stays open. The adapters are opened a second time over the same rows, for the other model; requests
    that began before go on with the first ones.
    """

    def __init__(self, state: OpenedState) -> None:
        self._state = state

    async def hold(self, why: str) -> None:
        """Refuse changes of adapters, and new jobs, with `why`. Raises `Conflict` while there are jobs that have not
        ended."""
        if self._state.jobs is not None:
            await self._state.jobs.hold(why)
        if self._state.adapters is not None:
            await self._state.adapters.hold(why)

    async def open_for(self, service: "EngineService", settings: Settings) -> AdapterLibrary | None:
        """The adapters for another model, those that fit it loaded. Raises `StorageUnavailable`."""
        opened = self._state
        if opened.adapters is None or opened.database is None or opened.directory is None:
            return None
        return await _make_library(service, settings, opened.directory, opened.database, clears_up=False)

    async def finish(self, service: "EngineService", settings: Settings, library: AdapterLibrary | None) -> None:
        """Have what is open be that of `service`, before the next await; then close the adapters of the model
        before."""
        opened, before = self._state, self._state.adapters
        opened.adapters = library
        service.set_adapters(library)
        if opened.jobs is not None and library is not None and opened.directory is not None:
            opened.jobs.release(_make_jobs_engine(service, library, settings, opened.directory))
        if before is not None:
            await before.close()

    async def cancel(self) -> None:
        """Take changes and jobs again, for the model before."""
        if self._state.adapters is not None:
            await self._state.adapters.hold(None)
        if self._state.jobs is not None:
            self._state.jobs.release()


async def _prune_regularly(*parts: BatchManager | FileLibrary | ResponseStore | FeedbackStore) -> None:
    """Delete what the settings say, until cancelled. Jobs are pruned by their own manager."""
    while True:
        for part in parts:
            try:
                await part.prune()
            except (StorageUnavailable, OSError) as error:
                _log.warning("cannot_prune", part=type(part).__name__, reason=str(error))
            except Exception:
                _log.exception("cannot_prune", part=type(part).__name__)
        await asyncio.sleep(PRUNE_SECONDS)


async def _open_library(
    service: "EngineService", settings: Settings, directory: Path, *, frozen: str | None = None
) -> tuple[AdapterLibrary, Database]:
    """Open the adapter library and its database. `frozen`: reason why nothing in the directory may be changed."""
    if frozen is None:
        database = await asyncio.to_thread(open_database, directory)
    else:
        database = await asyncio.to_thread(frozen_database, directory, frozen)
    try:
        if frozen is None:
            await asyncio.to_thread(_make_private, directory)
        return await _make_library(service, settings, directory, database, clears_up=True), database
    except BaseException:
        await asyncio.to_thread(database.close)
        raise


async def _make_library(
    service: "EngineService", settings: Settings, directory: Path, database: Database, *, clears_up: bool
) -> AdapterLibrary:
    adapters = settings.adapters
    return await AdapterLibrary.open(
        database,
        directory,
        service,
        max_loaded=adapters.max_loaded,
        max_rank=adapters.max_lora_rank,
        max_vocabulary=adapters.max_vocabulary_bytes,
        sources=AdapterSources.of(adapters),
        shared=None if adapters.shared_store is None else SharedStore(open_objects(adapters.shared_store)),
        clears_up=clears_up,
    )


def _make_private(directory: Path) -> None:
    """Remove other users' permissions from the state. A directory that holds other things too stays as it is."""
    ours = {FILE, LOCK, "jobs", "adapters", MODELS, "data", "files", "batches", "admin-token", *NAMES}
    for path in (directory / "jobs", directory / "adapters", directory / MODELS):
        if path.is_dir() and not tighten(path):
            _log.warning("state_is_readable_by_others", path=str(path))
    mode = directory.stat().st_mode
    foreign = [path.name for path in directory.iterdir() if path.name not in ours and not path.name.startswith(FILE)]
    if mode & 0o077 and (mode & stat.S_ISVTX or foreign or not tighten(directory)):
        _log.warning("state_is_readable_by_others", path=str(directory), advice="chmod 700")


# -- read-only -------------------------------------------------------------------------------------
#
# Serving from a state directory that cannot be written, or whose database cannot be used.
#
# What was published is served: from a copy of the database where it can be read, else from what the adapters' folders
# say of themselves. Nothing on the disk is touched.

_MEMORY = Path("/dev/shm")


class DatabaseMissing(DatabaseUnusable):
    """There are folders of jobs, adapters, files or batches, but no database that lists them."""


def open_database(directory: Path) -> Database:
    """The database of a state directory, made where there is nothing yet.

    Raises as `Database`, and `DatabaseMissing`: a new one would list nothing of what is there.
    """
    if _knows_nothing(directory / FILE):
        found = {
            "jobs": sum(_had_a_row(folder) for folder in job_folders(directory)),
            "versions of adapters": len(adapter_folders(directory)),
            "files": len(file_recovery.folders(directory)),
            "batches": len(batch_recovery.folders(directory)),
        }
        if any(found.values()):
            listed = ", ".join(f"{count} {what}" for what, count in found.items() if count)
            raise DatabaseMissing(
                f"The database {FILE} is missing or empty, but there are folders of {listed}. Put back a backup of it, "
                "or run `eft state rebuild`, which makes it again from them, and start the server again. To begin with "
                "nothing, move `jobs`, `adapters`, `files` and `batches` out of the state directory."
            )
    return Database(directory, SCHEMAS)


def _knows_nothing(file: Path) -> bool:
    """True for no database, and for one in which there never was a row; False for one that cannot be read."""
    wal = file.with_name(f"{file.name}-wal")
    if not file.exists() or file.stat().st_size == 0:
        return True
    if wal.exists() and wal.stat().st_size > 0:
        return False
    try:
        with contextlib.closing(_unchanging(file)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            asked = tables & {"jobs", "adapters", "sqlite_sequence"}  # the last one remembers what was deleted
            return all(connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() is None for name in asked)
    except sqlite3.Error:
        return False


def _had_a_row(folder: Path) -> bool:
    """True where a job's folder holds more than uploads: the rest is written once the job has a row."""
    return any((folder / name).exists() for name in ("log.jsonl", "checkpoints", "result"))


def job_folders(directory: Path) -> list[Path]:
    """Folders of jobs in a state directory, unfinished ones left out."""
    return [path for path in (directory / "jobs").glob("*") if path.is_dir() and PARTIAL not in path.name]


def adapter_folders(directory: Path) -> list[Path]:
    """Folders of versions in a state directory, unfinished ones left out."""
    return [path for path in versions(directory / "adapters") if PARTIAL not in path.name]


def serves_frozen(directory: Path, error: Exception) -> bool:
    """True where the state in `directory` is to be served read-only in spite of this error. False where there can be no
    state directory at all, or another process has it."""
    if isinstance(error, OSError):
        return directory.is_dir() or error.errno in DISK_FULL | {errno.EROFS}
    return isinstance(error, DatabaseUnusable | StorageUnavailable)


def explain(error: Exception) -> str:
    """Message for clients: the reason why nothing can be stored, and a remedy. Contains no path."""
    if isinstance(error, DatabaseUnusable):
        return f"Training and changes of adapters are not available. {error}"
    if isinstance(error, StorageUnavailable):
        text = error.message
    else:
        text = f"{reason(error) if isinstance(error, OSError) else error}."
    return (
        "Training and changes of adapters are not available: the server's state directory could not be written when it "
        f"started ({text.rstrip('.')}). Make room or make it writable, and start the server again."
    )


def frozen_database(directory: Path, why: str) -> Database:
    """A database in memory: a copy of the one on the disk, else rows made from the folders of the adapters."""

    def load(connection: sqlite3.Connection) -> None:
        if not _copy(directory / FILE, connection):
            for schema in SCHEMAS:
                connection.executescript(schema)
            with connection:
                recovery.adopt(connection, directory / "adapters", verify=False)

    return Database.in_memory(load, why)


def _copy(file: Path, target: sqlite3.Connection) -> bool:
    """Copy the database into an empty connection. False where it cannot be read, or there is nothing in it."""
    for source in _readable(file):
        try:
            with contextlib.closing(source):
                version = check(source, file.name)
                if source.execute("SELECT 1 FROM adapters LIMIT 1").fetchone() is None:
                    continue
                source.backup(target)
            for schema in SCHEMAS:
                target.executescript(schema)
            migrate(target, version)
        except (sqlite3.Error, DatabaseUnusable):
            continue
        return True
    return False


def _readable(file: Path) -> Iterator[sqlite3.Connection]:
    """Ways to read a database in a folder in which SQLite may make no files: a copy elsewhere, with its WAL; or the
    file alone, without what was not moved into it yet."""
    if not file.exists():
        return
    for place in (_MEMORY, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, sqlite3.Error), tempfile.TemporaryDirectory(dir=place) as folder:
            for source in (file, file.with_name(f"{file.name}-wal")):
                if source.exists():
                    shutil.copyfile(source, Path(folder) / source.name)
            yield connect(Path(folder) / file.name)
    with contextlib.suppress(sqlite3.Error):
        yield _unchanging(file)


def _unchanging(file: Path) -> sqlite3.Connection:
    """The file as it is, without its WAL, and without any file that SQLite would make beside it."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)
