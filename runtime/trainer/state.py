"""The state directory: where it is, and what a server keeps in it. One process has it at a time."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from runtime.trainer.adapters import SCHEMA, AdapterHost, AdapterLibrary
from runtime.trainer.database import Database
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
        await asyncio.to_thread(self.database.close)


def state_directory(settings: Settings) -> Path:
    """`trainer.state_dir`, else `eft` under XDG_STATE_HOME, else ~/.local/state/eft. Absolute."""
    if settings.trainer.state_dir is not None:
        return Path(settings.trainer.state_dir).expanduser().absolute()
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # the XDG specification has relative ones ignored
        home = Path.home() / ".local" / "state"
    return home / "eft"


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
