"""Waiting for a condition that other threads, processes or tasks bring about."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

SECONDS = 60.0
"""Default time after which a condition is given up: far more than it takes."""


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait until it holds. Raises `AssertionError` where it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


async def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """As `wait_until`, while the event loop goes on."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.001)
