"""The course of a run: what is due when, which evaluation is the best, how far it is, when it is lost, and the
snapshot that it continues from.

The same wherever the steps are computed: in slices between the steps of requests, or in processes of their own.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct, field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.events import (
    Activity,
    CheckpointEvent,
    EvalEvent,
    FinishedEvent,
    ProgressEvent,
    StepEvent,
)
from runtime.support.durable import TOO_MANY_FILES, read_with, reason, sync_directory, write_file, write_with
from runtime.support.failpoints import failpoint
from runtime.trainer.data.example import Example
from runtime.trainer.losses import Score
from runtime.trainer.losses.loss import Loss
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.publish import higher_is_better, plain_metric
from runtime.trainer.schedule import Schedule, rate_factor, watchdog_threshold
from runtime.trainer.slices import Slices
from runtime.trainer.step import Micro

MicroBatches = Sequence[Sequence[Example]]

# -- snapshot ------------------------------------------------------------------------------------
#
# All that a training run needs to continue from a step, apart from model, recipe and data. On disk without pickles.
#
# A snapshot directory holds `state.json`, a safetensors file each for the parameters, the optimiser's state and the
# best parameters so far, and `adapter_files/` in PEFT's format: what would be published. Nothing random is in it: every
# mask and every order is made from the seed and the step.

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


# -- course --------------------------------------------------------------------------------------

# -- course ----------------------------------------------------------------------------------------
#
# What is due when, which evaluation is the best, and what is reported: the same wherever the steps are computed.

MAX_EXPONENT = 700.0
"""Loss above which perplexity is the largest number that is shown."""


@dataclass(frozen=True, eq=False)
class Course:
    """Decisions and reports of a run by its recipe and schedule. Keeps `progress`."""

    recipe: Recipe
    schedule: Schedule
    loss: Loss
    progress: RunProgress
    has_test: bool
    """True if there are held-out rows."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 1."""
        return self.recipe.learning_rate * rate_factor(self.recipe, self.schedule, step)

    def end_step(
        self, epoch: float, group: MicroBatches, score: Score, norm: float, *, seconds: float, busy_seconds: float
    ) -> StepEvent:
        """Count a step that is done."""
        progress, tokens = self.progress, sum(len(example) for micro in group for example in micro)
        progress.step += 1
        progress.tokens += tokens
        progress.trained_tokens += score.tokens
        return StepEvent(
            step=progress.step,
            epoch=epoch,
            loss=score.mean,
            learning_rate=self.rate(progress.step),
            grad_norm=norm,
            tokens=tokens,
            trained_tokens=score.tokens,
            accuracy=score.accuracy,
            seconds=seconds,
            busy_seconds=busy_seconds,
            metrics=self.loss.summary(score.metrics),
        )

    @property
    def at_end(self) -> bool:
        """True after the last step."""
        return self.progress.step == self.schedule.total_steps

    @property
    def measures_first(self) -> bool:
        """True if the held-out rows are scored before the first step."""
        return not self.progress.step and self.has_test and self.recipe.measures_base

    @property
    def evaluates(self) -> bool:
        """True if an evaluation is due after this step."""
        every = self.schedule.eval_every
        return self.has_test and every is not None and (self.progress.step % every == 0 or self.at_end)

    @property
    def evaluates_last(self) -> bool:
        """True if the only evaluation is that at the end."""
        return self.has_test and not self.schedule.eval_every

    @property
    def saves(self) -> bool:
        """True if a checkpoint is due after this step, unless the run ends here."""
        every = self.schedule.save_every
        return every is not None and self.progress.step % every == 0 and not self.at_end

    def metrics_of(self, total: Score) -> dict[str, float]:
        """Metrics of an evaluation beside loss and accuracy."""
        metrics = dict(self.loss.summary(total.metrics))
        if self.recipe.rl is None:
            metrics["perplexity"] = math.exp(min(total.mean, MAX_EXPONENT))
        return metrics

    def evaluation(self, total: Score, metrics: dict[str, float]) -> EvalEvent:
        return EvalEvent(
            step=self.progress.step, loss=total.mean, accuracy=total.accuracy, tokens=total.tokens, metrics=metrics
        )

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation into account; True if it is better than all before it."""
        progress, name = self.progress, plain_metric(self.recipe.metric_for_best_model)
        value, best = metrics.get(name, math.nan), progress.best_value
        given = self.recipe.greater_is_better
        rises = higher_is_better(name) if given is None else given
        if math.isnan(value) or not (best is None or (value > best if rises else value < best)):
            progress.worse_evals += 1
            return False
        progress.best_value, progress.best_step, progress.worse_evals = value, progress.step, 0
        return True

    @property
    def stops_early(self) -> bool:
        """True once the evaluations have been no better for too long."""
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.progress.worse_evals >= patience

    def checkpoint(self) -> CheckpointEvent:
        return CheckpointEvent(step=self.progress.step, best=self.progress.best_step == self.progress.step)

    def finished(self) -> FinishedEvent:
        step, best = self.progress.step, self.recipe.load_best_model_at_end and self.progress.best_step
        return FinishedEvent(step=step, best_step=best or step, reason="done" if self.at_end else "early_stopping")


# -- watchdog --------------------------------------------------------------------------------------
#
# Distinguishes a run that learns from one that is lost.


class Lost(Exception):
    """The run cannot recover, and must not be published."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Watchdog:
    """Checks the loss and the gradient's norm of every step."""

    def __init__(self, recipe: Recipe, vocab_size: int, *, above: int = 0) -> None:
        """`above`: see the attribute; for a run that is continued."""
        self._threshold = watchdog_threshold(recipe, vocab_size)
        self._patience = recipe.loss_watchdog_patience
        self.above = above
        """Steps in a row with a loss above the threshold."""

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise `Lost` where the run cannot recover."""
        for name, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                raise Lost("nan_loss", f"The {name} of step {step} is not a finite number ({value}).")
        self.above = self.above + 1 if loss > self._threshold else 0
        if self.above >= self._patience:
            raise Lost(
                "diverged",
                f"The loss was above {self._threshold:.4g} for {self.above} steps in a row, "
                f"and {loss:.4g} in step {step}.",
            )


# -- progress --------------------------------------------------------------------------------------
#
# Progress inside a step or an evaluation: how far it is, and how long the run will still take at this pace.

# Without a step's end, progress is reported after this long, and again and again…
FIRST_SECONDS = 5.0
# …up to this far apart, in a run that takes long.
MOST_SECONDS = 30.0
# Steps over which their mean time is taken.
_RECENT_STEPS = 20


class Headway:
    """Belongs to one run. Waits, pauses and evaluations do not count as a step's time."""

    def __init__(
        self, total_steps: int, report: Callable[[ProgressEvent], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._report = report
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._started = self._said = self._began = clock()
        self._activity: Activity = "train"
        self._step = self._tokens = self._done = 0
        self.tokens = 0.0
        """Tokens of the step under way that are done, its pieces in part."""

    def begin(self, activity: Activity, step: int, micro_batches: Sequence[Sequence[Example]]) -> None:
        """Note that a step or an evaluation begins, after `step` steps."""
        self._activity, self._step, self._done = activity, step, 0
        self._tokens = sum(len(example) for examples in micro_batches for example in examples)
        self._began = self._clock()

    def end_step(self) -> None:
        """Note that a step ended, and was reported."""
        self._said = self._clock()
        self._recent.append(self._said - self._began)
        self.tokens = 0.0

    def add(self, examples: Sequence[Example]) -> None:
        """Note that a micro-batch is done, for a run that is not in slices."""
        self._done += sum(map(len, examples))
        self._look(self._done)

    def watch(self, slices: Slices, micro: Micro, examples: Sequence[Example]) -> Slices:
        """The slices of a micro-batch as they are, with reports in between where time has passed."""
        tokens = sum(map(len, examples))
        with closing(slices):
            wanted = next(slices, None)
            while wanted is not None:
                granted = yield wanted
                try:
                    wanted = slices.send(granted)
                except StopIteration:
                    break
                self._look(self._done + micro.fraction * tokens)
        self._done += tokens

    def _look(self, tokens: float) -> None:
        self.tokens = tokens if self._activity == "train" else 0.0
        now = self._clock()
        if now - self._said < min(MOST_SECONDS, max(FIRST_SECONDS, (now - self._started) / 10)):
            return
        self._said = now
        fraction = min(1.0, tokens / max(1, self._tokens))
        self._report(
            ProgressEvent(
                step=self._step,
                total_steps=self._total_steps,
                activity=self._activity,
                fraction=fraction,
                seconds=now - self._began,
                seconds_left=self._left(fraction, now - self._began),
            )
        )

    def _left(self, fraction: float, seconds: float) -> float | None:
        """Seconds that the run will still take; None while the time of a step is unknown."""
        training = self._activity == "train"
        if self._recent and training:  # the step that is under way counts too: it may be slower than all before it
            each = (sum(self._recent) + seconds) / (len(self._recent) + fraction)
        elif self._recent:
            each = sum(self._recent) / len(self._recent)
        elif training and fraction > 0:
            each = seconds / fraction
        else:
            return None
        steps = self._total_steps - self._step - (fraction if training else 0.0)
        rest = 0.0 if training or not fraction else seconds * (1 / fraction - 1)
        return max(0.0, steps * each + rest)
