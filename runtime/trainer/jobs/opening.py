"""Jobs from a database and the ports, for as long as a block lasts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.trainer.database import Database
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.manager import JobManager
from runtime.trainer.jobs.ports import Ports
from settings.schema import TrainerSettings


@asynccontextmanager
async def running_jobs(
    database: Database, directory: Path, ports: Ports, settings: TrainerSettings
) -> AsyncIterator[JobManager]:
    """A started manager over the state `directory`, whose database has the tables of `jobs.schema`.

    Who leaves the block without having called `stop` interrupts the job at work. Raises `StorageUnavailable` and
    `OSError` where the state cannot be read.
    """
    manager = JobManager(database, JobDirectories(directory), ports, max_waiting=settings.max_queued_jobs)
    try:
        await manager.start()
        yield manager
    finally:
        await manager.stop(0.0)
