"""One training run: steps, evaluations, snapshots, from the first to the last, as one generator of slices.

Lives on the engine thread. Everything random is made from the seed and the step, so a run that continues from a
snapshot does what it would have done. Knows no job and no file.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from kernels.triton import training_ops
from runtime.events import (
    Activity,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    GenerateEvent,
    PausedEvent,
    ProgressEvent,
    RunEvent,
    StepEvent,
)
from runtime.model.decoder import Decoder
from runtime.model.model import Model
from runtime.support.failpoints import failpoint
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import TrainableLora, mix
from runtime.trainer.losses import Score, make_loss
from runtime.trainer.losses.loss import ReferenceScores
from runtime.trainer.optimizer import Optimizer
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.publish import higher_is_better, plain_metric
from runtime.trainer.schedule import ExampleFeed, rate_factor, step_groups, watchdog_threshold
from runtime.trainer.sliced_run import MakeRun, RunSpec, SlicedRun, WriteAdapter
from runtime.trainer.slices import Slice, Sliced, Slices, clock_of
from runtime.trainer.snapshot import Restored, RunProgress, Snapshot
from runtime.trainer.step import MicroStep

# -- micro-steps -----------------------------------------------------------------------------------
#
# The work on one micro-batch, for either kind of model: our decoder, or transformers' modules.


class Micro(Protocol):
    """See `MicroStep`."""

    score: Score
    fraction: float
    """Share of it that is done, from 0 to 1."""
    reference: Tensor | None

    def forward_backward(self, weight: float) -> Slices: ...

    def evaluate(self) -> Slices: ...


def micro_steps_of(model: Model) -> Callable[..., Micro]:
    """The class of the steps on this kind of model; its arguments are those of `MicroStep`."""
    if isinstance(model, Decoder):
        return MicroStep
    from runtime.trainer.fallback_step import FallbackStep  # imports transformers, as the model has

    return FallbackStep


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


# -- memory ----------------------------------------------------------------------------------------
#
# Out of memory: detect it, and halve the micro-batches.


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out. Torch's CPU allocator has no exception of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def halve(micro_batches: Sequence[Sequence[Example]], group_size: int = 1) -> list[Sequence[Example]]:
    """Every micro-batch in two, between groups of sequences; one of a single group stays as it is."""
    halves: list[Sequence[Example]] = []
    for examples in micro_batches:
        middle = (len(examples) // group_size + 1) // 2 * group_size
        halves += [part for part in (examples[:middle], examples[middle:]) if part]
    return halves


MicroBatches = Sequence[Sequence[Example]]


def is_better(recipe: Recipe, metrics: Mapping[str, float], progress: RunProgress) -> bool:
    """True if an evaluation is better than all before it, whose best value then is this one's."""
    name = plain_metric(recipe.metric_for_best_model)
    value = metrics.get(name, math.nan)
    rises = higher_is_better(name) if recipe.greater_is_better is None else recipe.greater_is_better
    best = progress.best_value
    if math.isnan(value) or not (best is None or (value > best if rises else value < best)):
        return False
    progress.best_value = value
    return True


MAX_EXPONENT = 700.0
"""Loss above which perplexity is the largest number that is shown."""


class TrainingRun(SlicedRun):
    """A run on a decoder in this process. On ranks, all of them do the same slices of the same run."""

    def __init__(
        self,
        decoder: Model,
        spec: RunSpec,
        batches: Callable[[int], MicroBatches],
        test: MicroBatches,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        *,
        restored: Restored | None = None,
        clock: Callable[[], float] | None = None,
        whole: bool = False,
    ) -> None:
        """`batches` gives the micro-batches of an epoch (from 0), `test` are those to evaluate on; the default `clock`
        is that of the decoder's device. Raises `ValueError` when `restored` is from another run, or the spec's loss
        is unknown."""
        self._decoder = decoder
        self._spec = spec
        self._loss = make_loss(spec.loss.name, spec.loss.options)
        self._batches = batches
        self._test = test
        self._write_adapter = write_adapter
        self._clock = clock = clock or clock_of(decoder.device)
        self._headway = Headway(spec.schedule.total_steps, on_event)
        self._ops = training_ops(decoder.ops)
        self._make_micro_step = micro_steps_of(decoder)
        self._lora = TrainableLora(
            decoder,
            spec.targets,
            spec.shape,
            seed=spec.recipe.seed,
            rows=spec.rows,
            initial=spec.recipe.first_weights,
            start="none" if spec.start == "reference" and not self._loss.needs_reference else spec.start,
        )
        self._optimizer = Optimizer(self._lora.parameters(), spec.recipe, self._lora.shards)
        self._progress = RunProgress()
        self._reference = ReferenceScores()
        self._best: Mapping[str, Tensor] | None = None
        if restored is not None:
            self._lora.restore(restored.parameters)
            self._optimizer.restore(restored.optimizer)
            self._progress = msgspec.structs.replace(restored.progress)
            self._best = restored.best or restored.parameters
            self._reference.restore(restored.reference)
        if spec.recipe.neftune_noise_alpha and not getattr(decoder, "separable", True):
            raise ValueError("neftune_noise_alpha is not possible with this model: its embeddings cannot be told apart")
        self._watchdog = Watchdog(spec.recipe, decoder.spec.vocab_size, above=self._progress.steps_above)
        super().__init__(on_event, clock, whole=whole)
        self.pacer.learn(self._progress.rates)

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def tokens_done(self) -> float:
        """Tokens trained on so far, those of the step under way in part. From any thread."""
        return self._progress.tokens + self._headway.tokens

    @property
    def paused(self) -> bool:
        """True if it stands still at a step's end."""
        return self._paused

    # -- the run -------------------------------------------------------------------------------

    def _slices(self) -> Slices:
        try:
            yield from self._train()
        except Lost as lost:
            self._on_event(FailedEvent(step=self._progress.step, code=lost.code, message=str(lost)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = "There is not enough memory for this job: lower micro_batch_size or sequence_len."
            self._on_event(FailedEvent(step=self._progress.step, code="out_of_memory", message=message))
        finally:
            self._optimizer.release()

    def _train(self) -> Slices:
        if not (yield from self._before_steps()):
            yield from self._train_steps()
        yield from self._finish()

    def _before_steps(self) -> Sliced[bool]:
        """Evaluate what training begins with, or finish an evaluation that a pause interrupted; True when the run
        should end early."""
        again, self._progress.evaluating = self._progress.evaluating, False
        if self._progress.step and again:
            return (yield from self._after_step())
        if not self._progress.step and self._test and self._spec.recipe.measures_base:
            yield from self._measure()
        return False

    def _train_steps(self) -> Slices:
        began, busy = self._clock(), self.pacer.busy_seconds
        for epoch, group in self._groups():
            score, norm = yield from self._step(group)
            progress = self._progress
            progress.step += 1
            now, now_busy = self._clock(), self.pacer.busy_seconds
            tokens = sum(len(example) for micro in group for example in micro)
            progress.tokens += tokens
            progress.trained_tokens += score.tokens
            self._on_event(
                StepEvent(
                    step=progress.step,
                    epoch=epoch,
                    loss=score.mean,
                    learning_rate=self._spec.learning_rate(progress.step),
                    grad_norm=norm,
                    tokens=tokens,
                    trained_tokens=score.tokens,
                    accuracy=score.accuracy,
                    seconds=now - began,
                    busy_seconds=now_busy - busy,
                    metrics=self._loss.summary(score.metrics),
                )
            )
            self._headway.end_step()
            began, busy = now, now_busy
            if (yield from self._after_step()):
                break

    def _groups(self) -> Iterator[tuple[float, MicroBatches]]:
        """The micro-batches of each step that is still to do, and the epoch that it ends at."""
        size, total = self._spec.recipe.gradient_accumulation_steps, self._spec.schedule.total_steps
        return step_groups(self._batches, size, total=total, done=self._progress.step)

    def _step(self, group: MicroBatches) -> Sliced[tuple[Score, float]]:
        """One change of the parameters; the score of its tokens, and the gradient's norm."""
        step = self._progress.step + 1
        failpoint("train.step", step)
        score = yield from self._gradients(step, group)
        norm = yield from self._optimizer.step(rate_factor(self._spec.recipe, self._spec.schedule, step))
        self._lora.changed()
        self._watchdog.check(step, score.mean, norm)
        self._progress.steps_above = self._watchdog.above
        return score, norm

    def _gradients(self, step: int, group: MicroBatches) -> Sliced[Score]:
        """Compute a step's gradients. Once memory has run out, all micro-batches are halved for the rest of the run."""
        halves = halve(group, self._loss.group_size)
        try:
            return (yield from self._accumulate(step, halves if self._progress.halved else group))
        except Exception as error:
            if self._progress.halved or not is_out_of_memory(error) or halves == list(group):
                raise
        self._progress.halved = True
        self._optimizer.zero_grad()
        return (yield from self._accumulate(step, halves))

    def _accumulate(self, step: int, group: MicroBatches) -> Sliced[Score]:
        units = sum(self._loss.units([example.num_trained for example in micro]) for micro in group)
        total, recipe = Score(), self._spec.recipe
        self._headway.begin("train", step - 1, group)
        for index, examples in enumerate(group):
            micro = self._make_micro_step(
                self._decoder,
                self._ops,
                self._lora,
                collate(examples, self._decoder.device),
                loss=self._loss,
                dropout=recipe.lora_dropout,
                seed=mix(recipe.seed, step, index),
                checkpointing=recipe.gradient_checkpointing,
                reference=self._known_reference(examples),
                noise=recipe.neftune_noise_alpha,
            )
            yield from self._headway.watch(micro.forward_backward(1 / max(1, units)), micro, examples)
            self._keep_reference(examples, micro)
            total.add(micro.score)
        return total

    def _known_reference(self, examples: Sequence[Example]) -> Tensor | None:
        return self._reference.find(examples, self._decoder.device) if self._loss.needs_reference else None

    def _keep_reference(self, examples: Sequence[Example], micro: Micro) -> None:
        if micro.reference is not None:
            self._reference.add(examples, micro.reference)

    def _after_step(self) -> Sliced[bool]:
        """Evaluate, capture and stand still where that is due; True when the run should end early."""
        schedule, progress = self._spec.schedule, self._progress
        stop = False
        last = progress.step == schedule.total_steps
        if self._test and schedule.eval_every and (progress.step % schedule.eval_every == 0 or last):
            stop = yield from self._evaluate()
        if schedule.save_every and progress.step % schedule.save_every == 0 and not last and not stop:
            yield from self._capture()
            self._on_event(CheckpointEvent(step=progress.step, best=progress.best_step == progress.step))
        if self._pause_asked and not last and not stop:
            yield from self._stand_still()
        return stop

    def _stand_still(self) -> Slices:
        yield from self._capture()
        self._paused = True
        self._on_event(PausedEvent(step=self._progress.step))
        yield Slice("pause", 1)
        self._paused = False

    def _evaluate(self) -> Sliced[bool]:
        """Measure the parameters, and remember the best; True when they have not improved for too long."""
        metrics = yield from self._measure()
        progress, recipe = self._progress, self._spec.recipe
        if is_better(recipe, metrics, progress):
            progress.best_step, progress.worse_evals = progress.step, 0
            self._best = self._lora.capture() if recipe.load_best_model_at_end else None
        else:
            progress.worse_evals += 1
        patience = recipe.early_stopping_patience
        return patience is not None and progress.worse_evals >= patience

    def _measure(self) -> Sliced[Mapping[str, float]]:
        """Score the held-out rows, and have answers generated where the recipe asks for them; all metrics by name."""
        total = Score()
        self._headway.begin("eval", self._progress.step, self._test)
        for examples in self._test:
            batch = collate(examples, self._decoder.device)
            reference = self._known_reference(examples)
            micro = self._make_micro_step(
                self._decoder, self._ops, self._lora, batch, loss=self._loss, reference=reference
            )
            yield from self._headway.watch(micro.evaluate(), micro, examples)
            self._keep_reference(examples, micro)
            total.add(micro.score)
        metrics = dict(self._loss.summary(total.metrics))
        if self._spec.recipe.rl is None:
            metrics["perplexity"] = math.exp(min(total.mean, MAX_EXPONENT))
        if self._spec.recipe.num_generated:
            metrics |= yield from self._generated()
        event = EvalEvent(
            step=self._progress.step, loss=total.mean, accuracy=total.accuracy, tokens=total.tokens, metrics=metrics
        )
        self._on_event(event)
        return event.named

    def _generated(self) -> Sliced[Mapping[str, float]]:
        """Metrics of answers that are generated with the current parameters, outside. A pause may come in between;
        then they are generated anew."""
        while True:
            self._answers, self._awaits_answers = None, True
            yield from self._capture(adapter_only=True)
            self._on_event(GenerateEvent(step=self._progress.step))
            while self._given_answers() is None and not self._pause_asked:
                yield Slice("answers", 1)
            self._awaits_answers = False
            if (given := self._given_answers()) is not None:
                return given
            self._progress.evaluating = True
            yield from self._stand_still()
            self._progress.evaluating = False

    def _finish(self) -> Slices:
        progress = self._progress
        if self._test and not self._spec.schedule.eval_every:
            yield from self._evaluate()
        done = progress.step == self._spec.schedule.total_steps
        yield from self._capture(last=True)
        self._on_event(
            FinishedEvent(
                step=progress.step,
                best_step=(self._spec.recipe.load_best_model_at_end and progress.best_step) or progress.step,
                reason="done" if done else "early_stopping",
            )
        )

    def _capture(self, *, last: bool = False, adapter_only: bool = False) -> Slices:
        """Add a snapshot, once there is room for it (`bound_untaken`). `last`: nothing continues from here, so the
        optimiser's state is left out. `adapter_only`: of the current parameters alone."""
        while self._backlogged:
            self._waits_for_disk = True
            yield Slice("disk", 1)
        self._waits_for_disk = False
        progress = msgspec.structs.replace(self._progress, rates=self.pacer.rates)
        keeps_best = (
            not adapter_only
            and self._spec.recipe.load_best_model_at_end
            and progress.best_step not in (0, progress.step)
        )
        last = last or adapter_only
        self._snapshots.append(
            Snapshot(
                progress=progress,
                parameters=self._lora.capture(),
                optimizer={} if last else self._optimizer.capture(),
                reference={} if last else self._reference.capture(),
                best=self._best if keeps_best else None,
                write_adapter=lambda path, captured: self._write_adapter(path, self._spec.adapter_of(captured)),
            )
        )


def make_run_on(decoder: Model, *, whole: bool = False) -> MakeRun:
    """Makes runs on a decoder in this process. `whole`: see `Pacer`."""

    def make(
        spec: RunSpec,
        feed: ExampleFeed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> TrainingRun:
        return TrainingRun(
            decoder, spec, feed.epoch, feed.test, on_event, write_adapter, restored=restored, whole=whole
        )

    return make
