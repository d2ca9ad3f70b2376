"""Events of a training run: one struct an event, encoded with msgspec as they are.

Losses are in nats a token, times in seconds, learning rates as the optimiser uses them.
"""

from typing import Literal

from msgspec import Struct

LatencyTarget = Literal["tpot", "ttft"]
"""Target of requests that training may miss: time per output token, and time to first token."""

Activity = Literal["train", "eval"]


class StepEvent(Struct, frozen=True, kw_only=True, tag="step"):
    """An optimiser step was taken."""

    step: int
    """Number of the step, from 1."""
    epoch: float
    loss: float
    """Mean over the trained tokens of the step."""
    learning_rate: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    tokens: int
    """Tokens computed in this step."""
    trained_tokens: int
    accuracy: float
    """Share of the trained tokens that were the likeliest one."""
    seconds: float
    """Seconds from the end of the last step to the end of this one."""
    busy_seconds: float
    """Part of `seconds` spent in training's slices: the rest went to requests."""
    metrics: dict[str, float] = {}
    """Further metrics of the loss, by name: means over the step."""

    @property
    def named(self) -> dict[str, float]:
        """All metrics by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.metrics}


class ProgressEvent(Struct, frozen=True, kw_only=True, tag="progress"):
    """A step or an evaluation is under way, and takes longer than some seconds."""

    step: int
    """Steps that are done."""
    total_steps: int
    activity: Activity
    """Activity that is under way."""
    fraction: float
    """Done share of the activity, from 0 to 1."""
    seconds: float
    """Seconds since the activity began."""
    seconds_left: float | None
    """Seconds left for the whole run at the pace so far; None before the first measurement."""


class ReadingEvent(Struct, frozen=True, kw_only=True, tag="reading"):
    """The data of a job is being read and tokenised, which takes longer than some seconds."""

    rows: int
    """Rows so far, of all files."""
    tokens: int
    """Tokens of the rows so far that are used."""
    seconds: float
    """Seconds since the reading began."""


class EvalEvent(Struct, frozen=True, kw_only=True, tag="eval"):
    """The held-out rows were scored."""

    step: int
    loss: float
    accuracy: float
    tokens: int
    metrics: dict[str, float] = {}
    """Further metrics of the loss, by name: means over the held-out rows."""

    @property
    def named(self) -> dict[str, float]:
        """All metrics by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, **self.metrics}


class AnswerSample(Struct, frozen=True, kw_only=True):
    """A generated answer that people are shown, and what the row has. Long texts are cut."""

    prompt: str
    reference: str
    answer: str


class AnswersEvent(Struct, frozen=True, kw_only=True, tag="answers"):
    """Answers to rows of the evaluation were generated; the `EvalEvent` that follows has their metrics."""

    step: int
    rows: int
    tokens: int
    """Generated tokens."""
    seconds: float
    samples: list[AnswerSample] = []
    problems: list[str] = []
    """Rows that failed, and metrics that could not be computed."""


class GenerateEvent(Struct, frozen=True, kw_only=True, tag="generate"):
    """The run waits for the metrics of answers that are generated with the adapter of its newest snapshot, which is of
    this step: `SlicedRun.take_snapshot`, then `answer`."""

    step: int


class CheckpointEvent(Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """Everything needed to continue from here was captured; `Run.take_snapshot` has it."""

    step: int
    best: bool
    """True if it is the best so far, by the recipe's metric."""


class PausedEvent(Struct, frozen=True, kw_only=True, tag="paused"):
    """The run is paused at a step's end; it continues with `resume`."""

    step: int


class RestartEvent(Struct, frozen=True, kw_only=True, tag="restart"):
    """The processes of a run of its own were killed or hung, and are started again."""

    step: int
    """Steps that were done."""
    message: str
    """Sentence that says why."""


class CancelledEvent(Struct, frozen=True, kw_only=True, tag="cancelled"):
    """The run was cancelled, and has ended."""

    step: int


class FinishedEvent(Struct, frozen=True, kw_only=True, tag="finished"):
    """All steps are done (or it stopped early), and the weights to publish were captured."""

    step: int
    best_step: int
    """The step whose weights are the result."""
    reason: str = "done"
    """Reason of the end: "done" or "early_stopping"."""


class FailedEvent(Struct, frozen=True, kw_only=True, tag="failed"):
    """The run ended, and must not be published."""

    step: int
    code: str
    """nan_loss, diverged, out_of_memory, internal_error"""
    message: str


Report = StepEvent | ProgressEvent | EvalEvent | AnswersEvent
"""Events that are stored, and need no other action."""
RunEvent = (
    Report | GenerateEvent | CheckpointEvent | RestartEvent | PausedEvent | CancelledEvent | FinishedEvent | FailedEvent
)
