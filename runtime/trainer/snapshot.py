"""All that a training run needs to go on from a step, apart from model, recipe and data. On disk without pickles.

A snapshot directory holds `state.json`, a safetensors file each for the parameters, the optimiser's state and the best
parameters so far, and `adapter_files/` in PEFT's format: what would be published. Nothing random is in it: every mask
and every order is made from the seed and the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.durable import sync_directory, sync_file
from runtime.failpoints import failpoint

STATE = "state.json"
ADAPTER = "adapter_files"
GROUPS = ("parameters", "optimizer", "best")


class Progress(Struct, kw_only=True):
    """Where a run is. All numbers are after `step` steps."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    """Of the evaluations; None before the first."""
    worse_evals: int = 0
    """Evaluations in a row that were no better."""
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Captured on the engine thread, written on another: its tensors are copies."""

    progress: Progress
    parameters: Mapping[str, Tensor] = field(repr=False)
    optimizer: Mapping[str, Tensor] = field(repr=False)
    best: Mapping[str, Tensor] | None = field(repr=False)
    """The parameters of `progress.best_step`, where those are not the current ones."""
    write_adapter: Callable[[Path, Mapping[str, Tensor]], None] = field(repr=False)
    """Writes parameters in PEFT's format into a fresh directory, and syncs it."""

    def write(self, directory: Path) -> None:
        """Write everything into an existing empty directory, and sync it. Raises `OSError`."""
        failpoint("snapshot.write")
        for group, tensors in zip(
            GROUPS, (self.parameters, self.optimizer, self.best or {}), strict=True
        ):  # one file each: what is written is in memory twice meanwhile
            path = directory / _tensors(group)
            save_file(dict(tensors), path)
            sync_file(path)
        failpoint("snapshot.tensors_written")
        (directory / STATE).write_bytes(msgspec.json.encode(self.progress))
        sync_file(directory / STATE)
        failpoint("snapshot.state_written")
        self.write_adapter(directory / ADAPTER, self.result)
        sync_directory(directory)

    @property
    def result(self) -> Mapping[str, Tensor]:
        """The parameters that the run would be judged by: the best ones, or without evaluations the last ones."""
        return self.parameters if self.best is None else self.best


@dataclass(frozen=True, eq=False)
class Restored:
    """A snapshot read back."""

    progress: Progress
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor] | None


def read_snapshot(directory: Path) -> Restored:
    """Raises `ValueError` for what is no complete snapshot."""
    try:
        progress = msgspec.json.decode((directory / STATE).read_bytes(), type=Progress)
        parameters, optimizer, best = (load_file(directory / _tensors(group)) for group in GROUPS)
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise ValueError(f"{directory.name} is no complete checkpoint: {error}") from error
    return Restored(progress, parameters, optimizer, best or None)


def _tensors(group: str) -> str:
    return f"{group}.safetensors"
