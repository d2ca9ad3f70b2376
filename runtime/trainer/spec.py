"""What a training run is made from, apart from the model and the data: numbers that a recipe was turned into."""

import math
from dataclasses import dataclass, field
from typing import Literal

from runtime.trainer.lora import Targets
from runtime.workers.lora import LoraShape

OptimizerName = Literal["adamw", "adamw_8bit", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """How gradients become changes. Names as in torch."""

    name: OptimizerName = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to this; None: none are."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """The learning rate over the steps: a linear warm-up, then what the name says."""

    name: ScheduleName = "cosine"
    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0
    """What a cosine ends at, as a share of the full rate."""

    def factor(self, step: int) -> float:
        """What step `step` (from 1) multiplies the full rate by. The values of transformers' `get_scheduler`."""
        done = step - 1
        if done < self.warmup_steps:
            return done / max(1, self.warmup_steps)
        progress = (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.name == "constant":
            return 1.0
        if self.name == "linear":
            return max(0.0, 1.0 - progress)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class WatchdogSpec:
    """When a loss is hopeless. A loss or gradient that is not a finite number always is."""

    threshold: float | None = None
    """Nats a token; None: a little more than guessing evenly among all tokens."""
    patience: int = 3
    """So many steps in a row above the threshold."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run."""

    targets: Targets = field(repr=False)
    shape: LoraShape
    dropout: float = 0.0
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    watchdog: WatchdogSpec = WatchdogSpec()
    accumulation: int = 1
    """Micro-batches to a step."""
    checkpointing: bool = False
    """Compute layers again in the backward pass, instead of keeping what they made."""
    seed: int = 42
    eval_every: int | None = None
    """Steps between evaluations; None: none. There is always one at the end if there are rows for it."""
    save_every: int | None = None
    early_stopping: int | None = None
    """Evaluations in a row that are no better than the best, and the run ends."""
