"""All that a training run needs to continue from a step, apart from model, recipe and data. On disk without pickles.

A snapshot directory holds `state.json`, a safetensors file each for the parameters, the optimiser's state and the best
parameters so far, and `adapter_files/` in PEFT's format: what would be published. Nothing random is in it: every mask
and every order is made from the seed and the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct, field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.support.durable import TOO_MANY_FILES, read_with, reason, sync_directory, write_file, write_with
from runtime.support.failpoints import failpoint

STATE = "state.json"
ADAPTER = "adapter_files"
GROUPS = ("parameters", "optimizer", "best")
REFERENCE = "reference"
"""A further group, of losses with a reference."""


class RunProgress(Struct, kw_only=True):
    """State of a run. All numbers are after `step` steps."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = field(default=None, name="best_loss")
    """Best value of `metric_for_best_model` in the evaluations; None before the first."""
    worse_evals: int = 0
    """Evaluations in a row that were no better."""
    tokens: int = 0
    trained_tokens: int = 0
    steps_above: int = 0
    """Steps in a row with a loss above the watchdog's threshold."""
    evaluating: bool = False
    """The run was paused while it evaluated these weights: that is done again."""
    halved: bool = False
    """Memory ran out once: micro-batches are halved."""
    rates: dict[str, float] = {}
    """The pacer's rates: they decide where work is cut, and with that how it is rounded."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Captured on the engine thread, written on another: its tensors are copies."""

    progress: RunProgress
    parameters: Mapping[str, Tensor] = dataclass_field(repr=False)
    optimizer: Mapping[str, Tensor] = dataclass_field(repr=False)
    best: Mapping[str, Tensor] | None = dataclass_field(repr=False)
    """The parameters of `progress.best_step`, where those are not the current ones."""
    write_adapter: Callable[[Path, Mapping[str, Tensor]], None] = dataclass_field(repr=False)
    """Writes parameters in PEFT's format into a fresh directory, and syncs it."""
    reference: Mapping[str, Tensor] = dataclass_field(default_factory=dict, repr=False)
    """`ReferenceScores.capture` of what the run has computed so far."""

    def write(self, directory: Path) -> None:
        """Write everything into an existing empty directory, and sync it. Raises `OSError`."""
        failpoint("snapshot.write")
        for group, tensors in zip(
            GROUPS, (self.parameters, self.optimizer, self.best or {}), strict=True
        ):  # one file each: what is written is in memory twice meanwhile
            write_with(directory / _tensors(group), partial(save_file, dict(tensors)))
        if self.reference:
            write_with(directory / _tensors(REFERENCE), partial(save_file, dict(self.reference)))
        failpoint("snapshot.tensors_written")
        write_file(directory / STATE, msgspec.json.encode(self.progress))
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

    progress: RunProgress
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor] | None
    reference: Mapping[str, Tensor] = dataclass_field(default_factory=dict)


def read_snapshot(directory: Path) -> Restored:
    """Read a snapshot. Raises `ValueError` for an incomplete one, without its path, and `OSError` where the system
    cannot read it now."""
    name = STATE
    try:
        progress = msgspec.json.decode((directory / name).read_bytes(), type=RunProgress)
        groups = []
        for group in GROUPS:
            name = _tensors(group)
            groups.append(read_with(directory / name, load_file))
        name = _tensors(REFERENCE)
        reference = read_with(directory / name, load_file) if (directory / name).exists() else {}
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise ValueError(f"{directory.name} is no complete checkpoint: {name}: {reason(error)}") from error
    except (msgspec.MsgspecError, SafetensorError) as error:
        raise ValueError(f"{directory.name} is no complete checkpoint: {name} is damaged ({error})") from error
    parameters, optimizer, best = groups
    return Restored(progress, parameters, optimizer, best or None, reference)


def _tensors(group: str) -> str:
    return f"{group}.safetensors"
