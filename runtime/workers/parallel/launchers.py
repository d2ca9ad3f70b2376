"""Launchers of ranks: this process, or torchrun."""

import os
from typing import Protocol

from runtime.model.config import ModelLoadError
from runtime.workers.parallel.launch import NodeLauncher
from runtime.workers.parallel.rank_group import RankProcess
from runtime.workers.parallel.torchrun import Torchrun, TorchrunLauncher
from settings.schema import Settings

PATIENCE = 1800.0
"""Seconds that a rank waits for others beyond the timeout, since some load their weights faster; the engine's process
ends ranks that hang long before."""


class Launcher(Protocol):
    """Starts a group of ranks, as often as one is needed."""

    size: int
    per_node: int
    """Ranks of one node, which on CPUs share its memory."""
    restarts: bool
    """True if it can be called again, after a group was lost."""

    def __call__(self) -> list[RankProcess]:
        """Start the ranks, in a thread that must live as long as they do. Raises `ModelLoadError`."""

    def clean(self) -> None:
        """Remove what ranks needed to meet. Called when they have, and at the end."""


def launcher(settings: Settings, size: int) -> Launcher:
    """Starts `size` ranks as the settings say, or waits for those of torchrun. Raises `ModelLoadError`."""
    model, parallel = settings.model, settings.parallel
    if ":" in model.device:
        raise ModelLoadError(
            f"model.device is {model.device!r}, but {size} ranks need a GPU each: name none, and set "
            "CUDA_VISIBLE_DEVICES to choose."
        )
    torchrun = Torchrun.here()
    threads = model.threads or max(1, usable_cores() // (torchrun.local_size if torchrun else size))
    patience, observability = PATIENCE + parallel.rank_timeout, settings.observability
    if torchrun is not None:
        if torchrun.rank != 0:
            raise ModelLoadError("under torchrun a model is shared by the ranks of `serve`, and by no other command.")
        return TorchrunLauncher(torchrun, parallel, threads=threads, patience=patience, observability=observability)
    return NodeLauncher(
        size, threads=threads, interface=parallel.interface, patience=patience, observability=observability
    )


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
