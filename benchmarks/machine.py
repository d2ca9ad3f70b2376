"""What the measurements ran on, and whether something else ran there too."""

import gc
import platform
from typing import Any

import psutil
import torch
import transformers

BUSY_PERCENT = 15.0


def describe() -> dict[str, Any]:
    """For the JSON output: what two results must have in common to be compared."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def busy() -> str | None:
    """A warning where other work takes part of the machine now. Takes a second."""
    percent = psutil.cpu_percent(interval=1.0)
    if percent < BUSY_PERCENT:
        return None
    return f"other work takes {percent:.0f} % of the CPU: the numbers below are worth little"


def settle() -> None:
    """Have the collector skip what is loaded by now, as in a server that is ready: a full collection stops every stream
    for a tenth of a second."""
    gc.collect()
    gc.freeze()
