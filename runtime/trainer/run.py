"""One training run: steps, evaluations, snapshots, from the first to the last, as one generator of slices.

Lives on the engine thread. Everything random is made from the seed and the step, so a run that continues from a
snapshot does what it would have done. Knows no job and no file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from kernels import training_ops
from runtime.events import (
    FailedEvent,
    GenerateEvent,
    PausedEvent,
    RunEvent,
)
from runtime.model.decoder import Decoder
from runtime.model.model import Model
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.trainer.course import Course, Headway, Lost, MicroBatches, Restored, RunProgress, Snapshot, Watchdog
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import TrainableLora, mix
from runtime.trainer.losses import Score, make_loss
from runtime.trainer.losses.loss import ReferenceScores
from runtime.trainer.optimizer import Optimizer
from runtime.trainer.riding import LEAST_MEMORY_BYTES, MEMORY_PART, KeptMemory, MicroPiece, Ride, Rides, cut
from runtime.trainer.schedule import ExampleFeed, rate_factor, step_groups
from runtime.trainer.sliced_run import MakeRun, RunSpec, SlicedRun, WriteAdapter
from runtime.trainer.slices import Slice, Sliced, Slices, clock_of
from runtime.trainer.step import BrokenPass, Micro, MicroStep, OfferedMicro

log = get_logger(__name__)

# -- micro-steps -----------------------------------------------------------------------------------
#
# The work on one micro-batch, for either kind of model: our decoder, or transformers' modules.


def micro_steps_of(model: Model) -> Callable[..., Micro]:
    """The class of the steps on this kind of model; its arguments are those of `MicroStep`."""
    if isinstance(model, Decoder):
        return MicroStep
    from runtime.trainer.fallback_step import FallbackStep  # imports transformers, as the model has

    return FallbackStep


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


def most_kept_bytes(decoder: Decoder) -> int:
    """Bytes that all rides of a run keep, at the most."""
    weights = sum(parameter.num_bytes for parameter in decoder.parameters().values())
    return max(LEAST_MEMORY_BYTES, weights // MEMORY_PART)


# Passes with other jobs in a row that may fail, before a run goes through the base by itself for good.
MOST_BROKEN_PASSES = 3

# Kinds of slices of a layer's forward pass, whose units are tokens.
FORWARD_KINDS = ("project", "mix", "expand", "contract")


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
            sizes=spec.sizes,
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
        self._offered: OfferedMicro | None = None
        self._alone = False
        """True while a step is done by itself, after a pass with other jobs that failed."""
        self._broken_passes = 0
        """Passes with other jobs in a row that failed."""
        self._kept_widths: tuple[int, int, int, int] | None = None
        self._rides: Rides[Micro] | None = None
        self._watchdog = Watchdog(spec.recipe, decoder.spec.vocab_size, above=self._progress.steps_above)
        self._course = Course(spec.recipe, spec.schedule, self._loss, self._progress, bool(test))
        super().__init__(on_event, clock, whole=whole)
        self.pacer.learn(self._progress.rates)

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def tokens_done(self) -> float:
        """Tokens trained on so far, those of the step under way in part. From any thread."""
        offered = self._offered
        others = offered.micro.fraction * offered.tokens if offered is not None and offered.waits else 0.0
        return self._progress.tokens + self._headway.tokens + others

    @property
    def paused(self) -> bool:
        """True if it stands still at a step's end."""
        return self._paused

    # -- riding --------------------------------------------------------------------------------

    def ride_with(self, widths: tuple[int, int, int, int]) -> None:
        suits = isinstance(self._decoder, Decoder) and self._lora.is_plain
        self._kept_widths = widths if suits and not self._spec.recipe.neftune_noise_alpha else None

    def _find_rides(self) -> Rides[Micro] | None:
        """The rides of this run; None where nothing is to ride now."""
        widths, decoder = self._kept_widths, self._decoder
        if widths is None or not self.beside_requests or not isinstance(decoder, Decoder):
            return None
        if self._rides is None:
            memory = KeptMemory(decoder.spec.num_layers, widths, decoder.dtype, most_kept_bytes(decoder))
            self._rides = Rides(self._lora, decoder.ops, memory)
        return self._rides

    def next_ride(self) -> Ride | None:
        return None if self._rides is None else self._rides.next()

    def stop_riding(self) -> None:
        if self._rides is not None:
            self._rides.stop()

    @property
    def waits_for_ride(self) -> bool:
        return self._rides is not None and self._rides.waits

    @property
    def forward_seconds(self) -> float | None:
        rates, total = self.pacer.rates, 0.0
        for name in FORWARD_KINDS:
            rate = rates.get(f"{name}_kept", rates.get(name))
            if rate is None:
                return None
            total += rate
        return self._decoder.spec.num_layers * total

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
        if self._course.measures_first:
            yield from self._measure()
        return False

    def _train_steps(self) -> Slices:
        began, busy = self._clock(), self.pacer.busy_seconds
        for epoch, group in self._groups():
            score, norm = yield from self._step(group)
            now, now_busy = self._clock(), self.pacer.busy_seconds
            seconds, busy_seconds = now - began, now_busy - busy
            event = self._course.end_step(epoch, group, score, norm, seconds=seconds, busy_seconds=busy_seconds)
            self._on_event(event)
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
        """Compute a step's gradients. Once memory has run out, all micro-batches are halved for the rest of the run.
        After a broken pass with other jobs it is done by itself."""
        halves = halve(group, self._loss.group_size)
        try:
            return (yield from self._accumulate(step, halves if self._progress.halved else group))
        except BrokenPass as broken:
            log.warning("joint_pass_broken", step=step, exc_info=broken.__cause__)  # the run that computed it has one
            self._broken_passes += 1
            self._optimizer.zero_grad()
            self._alone = True
            try:
                return (yield from self._gradients(step, group))
            finally:
                self._alone = False
        except Exception as error:
            if self._progress.halved or not is_out_of_memory(error) or halves == list(group):
                raise
        self._progress.halved = True
        self._optimizer.zero_grad()
        return (yield from self._gradients(step, group))

    def _accumulate(self, step: int, group: MicroBatches) -> Sliced[Score]:
        units = sum(self._loss.units([example.num_trained for example in micro]) for micro in group)
        total, rides = Score(), self._find_rides()
        self._headway.begin("train", step - 1, group)
        parts = [[(0, examples)] if rides is None else [*cut(examples, self._loss.group_size)] for examples in group]
        if rides is None or sum(map(len, parts)) == 1:  # a single piece has nothing to ride beside
            for index, examples in enumerate(group):
                total.add((yield from self._work_on(self._piece(step, index, 0, examples), units)))
            return total
        pieces = [self._piece(step, index, *part) for index, several in enumerate(parts) for part in several]
        try:
            yield from rides.open(pieces)
            while pieces:
                piece = yield from rides.choose(pieces)
                pieces.remove(piece)
                try:
                    total.add((yield from self._work_on(piece, units)))
                finally:
                    if piece.work.ride is not None:
                        piece.work.ride.drop()
        finally:
            rides.close()
        return total

    def _piece(self, step: int, index: int, first_row: int, examples: Sequence[Example]) -> MicroPiece[Micro]:
        """Examples of micro-batch `index` of a step, before which it has `first_row` tokens."""
        recipe = self._spec.recipe
        place = {"first_row": first_row} if first_row else {}
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
            **place,
        )
        return MicroPiece(examples, micro)

    def _work_on(self, piece: MicroPiece[Micro], units: int) -> Sliced[Score]:
        """Add a piece's gradients, in a step of this number of units."""
        micro, examples = piece.work, piece.examples
        self._offered = offered = OfferedMicro(micro, 1 / max(1, units), sum(map(len, examples)))
        if not self.offers:
            offered.begin()
        try:
            yield from self._headway.watch(offered.slices(), micro, examples)
        finally:
            self._offered = None
        if offered.joint:
            self._broken_passes = 0
        self._keep_reference(examples, micro)
        return micro.score

    @property
    def offered(self) -> OfferedMicro | None:
        return self._offered

    @property
    def joins(self) -> bool:
        able = not self._alone and self._broken_passes < MOST_BROKEN_PASSES
        return able and self._offered is not None and self._offered.micro.joins

    def _known_reference(self, examples: Sequence[Example]) -> Tensor | None:
        return self._reference.find(examples, self._decoder.device) if self._loss.needs_reference else None

    def _keep_reference(self, examples: Sequence[Example], micro: Micro) -> None:
        if micro.reference is not None:
            self._reference.add(examples, micro.reference)

    def _after_step(self) -> Sliced[bool]:
        """Evaluate, capture and stand still where that is due; True when the run should end early."""
        course, stop = self._course, False
        if course.evaluates:
            stop = yield from self._evaluate()
        if course.saves and not stop:
            yield from self._capture()
            self._on_event(course.checkpoint())
        if self._pause_asked and not course.at_end and not stop:
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
        if self._course.is_best((yield from self._measure())):
            self._best = self._weights() if self._spec.recipe.load_best_model_at_end else None
        return self._course.stops_early

    def _measure(self) -> Sliced[Mapping[str, float]]:
        """Score the held-out rows, and have answers generated where the recipe asks for them; all metrics by name."""
        with self._optimizer.result_shown(self._lora.changed):
            return (yield from self._measure_shown())

    def _measure_shown(self) -> Sliced[Mapping[str, float]]:
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
        metrics = self._course.metrics_of(total)
        if self._spec.recipe.num_generated:
            metrics |= yield from self._generated()
        event = self._course.evaluation(total, metrics)
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

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the parameters as they are judged and published."""
        with self._optimizer.result_shown(self._lora.changed):
            return self._lora.capture()

    def _finish(self) -> Slices:
        if self._course.evaluates_last:
            yield from self._evaluate()
        yield from self._capture(last=True)
        self._on_event(self._course.finished())

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
                parameters=self._weights(),
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
