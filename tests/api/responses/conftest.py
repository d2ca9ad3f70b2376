"""A store of responses for the app."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.responses import SCHEMA, ResponseStore
from runtime.support.database import Database
from settings.api import ResponseSettings


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await asyncio.to_thread(Database, tmp_path, [SCHEMA])
    yield database
    await asyncio.to_thread(database.close)


@pytest.fixture
def store(database: Database) -> ResponseStore:
    return ResponseStore(database, ResponseSettings(keep_responses=None))
