"""What a training run reports: one struct an event, encoded with msgspec as they are.

Losses are in nats a token, times in seconds, learning rates as the optimiser uses them.
"""

from msgspec import Struct


class StepEvent(Struct, frozen=True, kw_only=True, tag="step"):
    """An optimiser step was taken."""

    step: int
    """From 1."""
    epoch: float
    loss: float
    """Mean over the trained tokens of the step."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens computed in this step."""
    trained_tokens: int
    accuracy: float
    """Share of the trained tokens that were the likeliest one."""
    seconds: float
    """From the end of the last step to the end of this one."""
    busy_seconds: float
    """Of these, spent in training's slices: the rest went to requests."""


class EvalEvent(Struct, frozen=True, kw_only=True, tag="eval"):
    """The held-out rows were scored."""

    step: int
    loss: float
    accuracy: float
    tokens: int


class CheckpointEvent(Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """Everything needed to go on from here was captured; `Run.take_snapshot` has it."""

    step: int
    best: bool
    """By the recipe's metric, the best so far."""


class PausedEvent(Struct, frozen=True, kw_only=True, tag="paused"):
    """The run stands still at a step's end; it goes on with `resume`."""

    step: int


class CancelledEvent(Struct, frozen=True, kw_only=True, tag="cancelled"):
    """The run ended because it was told to."""

    step: int


class FinishedEvent(Struct, frozen=True, kw_only=True, tag="finished"):
    """All steps are done (or it stopped early), and the weights to publish were captured."""

    step: int
    best_step: int
    """The step whose weights are the result."""
    reason: str = "done"
    """Or "early_stopping"."""


class FailedEvent(Struct, frozen=True, kw_only=True, tag="failed"):
    """The run ended, and must not be published."""

    step: int
    code: str
    """nan_loss, diverged, out_of_memory, internal_error"""
    message: str


RunEvent = StepEvent | EvalEvent | CheckpointEvent | PausedEvent | CancelledEvent | FinishedEvent | FailedEvent
