"""Managers of jobs over fakes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.trainer.jobs.fakes import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Jobs that run by themselves."""
    world = World(tmp_path)
    await world.start()
    yield world
    await world.stop()


@pytest.fixture
async def by_hand(tmp_path: Path) -> AsyncIterator[World]:
    """Jobs that step when a test says so."""
    world = World(tmp_path, steps_itself=False)
    await world.start()
    yield world
    await world.stop(0.0)
