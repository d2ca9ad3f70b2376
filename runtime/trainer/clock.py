"""Time as training spends it, whatever device it computes on."""

import time
from collections.abc import Callable

import torch


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, monotonic, with all that was asked of the device before done.

    A GPU works on what was launched long after the launches have returned. By a plain clock every slice would cost
    next to nothing, but the one that waits for a result; so far more would be launched between two steps of requests
    than they allow, and they wait behind it in the same stream.
    """
    if device.type != "cuda":
        return time.monotonic

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.monotonic()

    return clock
