"""Waiting for a condition."""

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it holds within seconds. What happens on the engine's thread is not there at once."""
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False
