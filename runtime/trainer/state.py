"""The state directory: where it is, and what a server keeps in it. One process has it at a time."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from runtime.trainer.adapters.library import AdapterLibrary
from runtime.trainer.adapters.memory import AdapterHost
from runtime.trainer.adapters.store import SCHEMA
from runtime.trainer.database import Database
from runtime.trainer.directory import state_directory
from settings.schema import Settings

SCHEMAS = (SCHEMA,)
"""Every part's tables; one database has them all."""


@dataclass(frozen=True)
class State:
    """An opened state directory."""

    directory: Path
    database: Database
    adapters: AdapterLibrary

    async def close(self) -> None:
        await self.adapters.close()
        await asyncio.to_thread(self.database.close)


async def open_state(settings: Settings, host: AdapterHost) -> State:
    """Open (and create) it, for the model that `host` serves.

    Raises `StateDirectoryInUse`, `OSError`, `StorageUnavailable`.
    """
    directory = state_directory(settings)
    database = await asyncio.to_thread(Database, directory, SCHEMAS)
    try:
        library = await AdapterLibrary.open(
            database,
            directory,
            host,
            max_loaded=settings.adapters.max_loaded,
            max_rank=settings.adapters.max_lora_rank,
        )
    except BaseException:
        database.close()
        raise
    return State(directory, database, library)
