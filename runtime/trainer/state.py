"""The state directory of a server: its database, its adapters and its jobs, opened together and closed in order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.trainer.adapters import store
from runtime.trainer.adapters.library import AdapterLibrary
from runtime.trainer.database import Database
from runtime.trainer.directory import state_directory
from runtime.trainer.engine_runs import EngineRuns
from runtime.trainer.host import TrainingHost
from runtime.trainer.jobs import schema
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.opening import running_jobs
from runtime.trainer.jobs.ports import Ports
from runtime.trainer.preparing import RecipePreparer
from runtime.trainer.publishing import LibraryPublisher
from runtime.trainer.share import Share
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService

SCHEMAS = (store.SCHEMA, schema.SCHEMA)
"""Every part's tables; one database has them all."""


@dataclass(frozen=True)
class State:
    """An opened state directory."""

    adapters: AdapterLibrary | None
    jobs: JobManager | None


@asynccontextmanager
async def open_state(service: "EngineService", settings: Settings) -> AsyncIterator[State]:
    """Open (and create) it for the model that `service`, started, serves; training goes on with what it finds.

    Raises `StateDirectoryInUse`, `OSError`, `StorageUnavailable`.
    """
    directory = state_directory(settings)
    database = await asyncio.to_thread(Database, directory, SCHEMAS)
    try:
        library = await AdapterLibrary.open(
            database,
            directory,
            service,
            max_loaded=settings.adapters.max_loaded,
            max_rank=settings.adapters.max_lora_rank,
        )
        try:
            ports = _ports(service, library, settings, directory)
            async with running_jobs(database, directory, ports, settings.trainer) as jobs:
                yield State(library, jobs)
        finally:
            await library.close()
    finally:
        await asyncio.to_thread(database.close)


def _ports(service: "EngineService", library: AdapterLibrary, settings: Settings, directory: Path) -> Ports:
    share = Share(tpot_target=settings.scheduler.tpot_target, min_share=settings.trainer.min_share)
    host = TrainingHost(share, service.metrics.on_slice)
    service.background = host
    runs = EngineRuns(service, host)
    preparer = RecipePreparer(service, settings, directory, tokens_per_second=lambda: runs.tokens_per_second)
    return Ports(preparer=preparer, runs=runs, publisher=LibraryPublisher(library), meters=service.metrics)
