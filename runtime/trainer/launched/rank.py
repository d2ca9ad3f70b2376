"""The run of a launched job on one rank: steps, evaluations and snapshots, as the embedded trainer's `TrainingRun`.

The same data in the same order, losses, schedule and optimisers. A step has `gradient_accumulation_steps` micro-batches
for each rank: of two ranks with one each, the losses are those of one rank with two.
"""

import errno
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from runtime.events import FailedEvent, PausedEvent, RunEvent
from runtime.support.durable import reason, remove, replacing
from runtime.support.failpoints import failpoint
from runtime.trainer.course import Course, Headway, Lost, MicroBatches, Watchdog
from runtime.trainer.data.example import Example
from runtime.trainer.launched.files import (
    BEST,
    PAUSE,
    JobFolder,
    LaunchSpec,
    RankReport,
    framed,
    newest_checkpoint,
    stating_room,
)
from runtime.trainer.launched.ranks import Ranks
from runtime.trainer.launched.scoring import ScoredModel, call, pad, score_of, value_of, without_adapters
from runtime.trainer.launched.spread import DdpModel, FsdpModel, LossScale, SpreadModel, trained_of
from runtime.trainer.launched.stall import PlaceFile
from runtime.trainer.launched.weights import (
    PARAMETERS,
    LaunchedProgress,
    compute_type,
    load,
    read_state,
    write_snapshot,
    write_tensors,
)
from runtime.trainer.losses import Score, make_loss
from runtime.trainer.schedule import step_groups
from runtime.trainer.sliced_run import LossSpec

DDP_TIMEOUT = 1800
"""Seconds that a rank waits for others, where the recipe does not say."""


class RankSums(Struct, frozen=True):
    """Message of a rank to the others after its share of a step or an evaluation."""

    score: Score
    paused: bool = False
    """True where the server asks for a pause; of rank 0."""


class RankReporter:
    """Rank 0's reports to the server, in the order in which they happen. Other ranks have none."""

    def __init__(self, file: FileIO | None) -> None:
        self._file = file

    def __call__(self, event: RunEvent, snapshot: str | None = None) -> None:
        if self._file is not None:
            rest = framed(RankReport(event, snapshot))
            with stating_room(Path(str(self._file.name)), len(rest)):
                while rest:
                    rest = rest[self._file.write(rest) :]


class LaunchedRank:
    """One rank's part of a run, from where the newest checkpoint left off to its end or a pause."""

    def __init__(
        self,
        folder: JobFolder,
        spec: LaunchSpec,
        ranks: Ranks,
        attempt: int,
        report: RankReporter,
        place: PlaceFile,
    ) -> None:
        self._place = place
        place.move("loads the model")
        self._folder, self._spec, self._ranks, self._report = folder, spec, ranks, report
        self._attempt = attempt
        self._recipe, self._schedule = spec.recipe, spec.schedule
        chosen = LossSpec.of(spec.recipe)
        self._loss = make_loss(chosen.name, chosen.options)
        self._feed = folder.read_feed()
        compute = compute_type(spec.launch.precision, ranks.device)
        self._compute = None if compute is torch.float32 else compute
        self._scored = ScoredModel(load(spec, folder, compute), self._compute if spec.launch.method == "ddp" else None)
        self._model = self._spread()
        self._progress = LaunchedProgress()
        self._restore()
        self._watchdog = Watchdog(spec.recipe, spec.vocab_size, above=self._progress.steps_above)
        self._course = Course(spec.recipe, spec.schedule, self._loss, self._progress, bool(self._feed.test))
        self._headway = Headway(spec.schedule.total_steps, report)
        self._asked = False
        self._captured = 0

    def _spread(self) -> SpreadModel:
        scored, ranks, recipe = self._scored, self._ranks, self._recipe
        method, scale = self._spec.launch.method, LossScale(enabled=self._compute is torch.float16)
        if method == "deepspeed":
            from runtime.trainer.launched.zero import ZeroModel

            compute = str(self._compute or torch.float32).removeprefix("torch.")
            return ZeroModel(scored, ranks, recipe, self._spec.deepspeed or {}, compute)
        if method == "fsdp":
            return FsdpModel(scored, ranks, scale, recipe, self._compute)
        return DdpModel(scored, trained_of(scored.model), ranks, scale, recipe)

    def _restore(self) -> None:
        source = newest_checkpoint(Path(self._spec.checkpoints))
        if source is None:
            return
        self._progress, parameters, state = read_state(source)
        self._model.restore(parameters, state)
        if self._progress.loss_scale:
            self._model.scale.value = self._progress.loss_scale
        if self._ranks.first and self._progress.best_step and self._recipe.load_best_model_at_end:
            earlier = self._progress.best_step != self._progress.step
            self._folder.take_best(source / (BEST if earlier else PARAMETERS))

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or to a pause."""
        try:
            self._train()
        except Lost as lost:  # on all ranks: they have the same numbers
            self._report(FailedEvent(step=self._progress.step, code=lost.code, message=str(lost)))

    def _train(self) -> None:
        recipe = self._recipe
        if self._course.measures_first:
            self._measure()
        began = time.monotonic()
        size = recipe.gradient_accumulation_steps * self._ranks.size
        total = self._schedule.total_steps
        for epoch, group in step_groups(self._feed.epoch, size, total=total, done=self._progress.step):
            failpoint("launched.step", self._progress.step + 1)
            score, norm = self._step(group)
            now = time.monotonic()
            seconds = now - began
            self._report(self._course.end_step(epoch, group, score, norm, seconds=seconds, busy_seconds=seconds))
            self._headway.end_step()
            began = now
            stop = self._after_step()
            if stop is None:
                return
            if stop:
                break
        self._finish()

    def _step(self, group: MicroBatches) -> tuple[Score, float]:
        step = self._progress.step + 1
        units = sum(self._loss.units([example.num_trained for example in micro]) for micro in group)
        own, most = self._ranks.share(len(group))
        score = Score()
        self._headway.begin("train", step - 1, [group[index] for index in own])
        for number in range(most):
            idle = number >= len(own)  # the others have one more: this one takes part, and counts for nothing
            examples = group[0 if idle else own[number]]
            found = self._learn(examples, 0.0 if idle else 1 / max(1, units), last=number == most - 1)
            if not idle:
                score.add(found)
                self._headway.add(examples)
        self._place.move(f"changes the weights in step {step}")
        norm = self._model.step(self._course.rate(step))
        total = self._sum(score)
        if not math.isfinite(norm):
            norm = self._overflown(norm)
        self._watchdog.check(step, total.mean, norm)
        self._progress.steps_above = self._watchdog.above
        return total, norm

    def _overflown(self, norm: float) -> float:
        """The norm of a step that was left out for its overflow: 0 where a smaller scale may help."""
        scale = self._model.scale
        return 0.0 if scale.enabled and not scale.exhausted else norm

    def _learn(self, examples: Sequence[Example], weight: float, *, last: bool) -> Score:
        """One micro-batch, forward and backward."""
        batch = pad(examples, self._ranks.device)
        step = self._progress.step + 1
        self._place.move(f"computes forward in step {step}")
        reference = self._reference(examples)
        with self._model.training(last=last):
            logprobs, correct = call(self._model.module, batch)
            self._place.move(f"computes backward in step {step}")
            failpoint("launched.backward", f"{self._ranks.rank}-{step}")
            value = value_of(self._loss, batch, logprobs, reference)
            self._model.backward(value.total * weight, last=last)
        return score_of(self._loss, batch, value, correct)

    @torch.no_grad()
    def _reference(self, examples: Sequence[Example]) -> Tensor | None:
        if not self._loss.needs_reference:
            return None
        with without_adapters(self._scored.model), self._evaluating():
            return call(self._model.plain, pad(examples, self._ranks.device))[0]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Context without dropout."""
        self._scored.eval()
        try:
            yield
        finally:
            self._scored.train()

    def _sum(self, score: Score) -> Score:
        """The score of all ranks together; rank 0's request comes along."""
        if self._ranks.first and not self._folder.path.exists():
            raise FileNotFoundError(errno.ENOENT, "the job's folder is gone, as that of a job which was ended")
        asked = self._ranks.first and self._folder.requested() == PAUSE
        self._place.move("adds up the losses")
        found = self._ranks.exchange(msgspec.msgpack.encode(RankSums(score, asked)))
        total = Score()
        for one in (msgspec.msgpack.decode(data, type=RankSums) for data in found):
            total.add(one.score)
            self._asked = self._asked or one.paused
        return total

    def _after_step(self) -> bool | None:
        """Evaluate and capture where that is due. True when the run should end early, None when it is paused."""
        course, stop = self._course, False
        if course.evaluates:
            stop = self._evaluate()
        if course.saves and not stop:
            self._report(course.checkpoint(), self._capture())
        if self._asked and not course.at_end and not stop:
            self._report(PausedEvent(step=self._progress.step), self._capture())
            return None
        return stop

    def _evaluate(self) -> bool:
        """Measure the parameters, and keep the best; True when they have not improved for too long."""
        if self._course.is_best(self._measure()) and self._recipe.load_best_model_at_end:
            self._keep_best()
        return self._course.stops_early

    def _keep_best(self) -> None:
        self._place.move("keeps the best weights")
        parameters = self._model.parameters()
        if self._ranks.first:
            with replacing(self._folder.best) as path:
                write_tensors(path, parameters, shown=self._folder.best)

    @torch.no_grad()
    def _measure(self) -> Mapping[str, float]:
        """Score the held-out rows; all metrics by name."""
        own, most = self._ranks.share(len(self._feed.test))
        score = Score()
        self._headway.begin("eval", self._progress.step, [self._feed.test[index] for index in own])
        for number in range(most):
            idle = number >= len(own)
            examples = self._feed.test[0 if idle else own[number]]
            self._place.move(f"evaluates after step {self._progress.step}")
            batch, reference = pad(examples, self._ranks.device), self._reference(examples)
            with self._evaluating():
                logprobs, correct = call(self._model.plain, batch)
            if not idle:
                score.add(score_of(self._loss, batch, value_of(self._loss, batch, logprobs, reference), correct))
                self._headway.add(examples)
        total = self._sum(score)
        event = self._course.evaluation(total, self._course.metrics_of(total))
        self._report(event)
        return event.named

    def _finish(self) -> None:
        if self._course.evaluates_last:
            self._evaluate()
        name = self._capture(last=True)
        self._report(self._course.finished(), name)

    def _capture(self, *, last: bool = False) -> str:
        """Write a snapshot; returns the name of its folder."""
        self._captured += 1
        name = f"{self._attempt}-{self._captured}"
        self._progress.loss_scale = self._model.scale.value if self._model.scale.enabled else 0.0
        step = self._progress.step
        self._place.move(f"gathers the checkpoint of step {step}")
        parameters, state = self._model.parameters(), {} if last else self._model.state()
        self._place.move(f"has rank 0 write the checkpoint of step {step}")
        if self._ranks.first:
            path = self._folder.snapshot(name)
            try:
                write_snapshot(path, self._spec, self._folder, self._progress, parameters, state, last=last)
            except OSError as error:
                remove(path)  # room, on a disk that is full
                below = path.relative_to(self._folder.path.parents[2])
                text = f"cannot write the checkpoint of step {step} to {below}: {reason(error)}"
                raise OSError(error.errno, text) from error
        return name
