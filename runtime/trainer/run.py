"""One training run: steps, evaluations, snapshots, from the first to the last, as one generator of slices.

Lives on the engine thread. Everything random is made from the seed and the step, so a run that goes on from a snapshot
does what it would have done. Knows no recipe, no job and no file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from torch import Tensor

from kernels.triton import training_ops
from runtime.failpoints import failpoint
from runtime.trainer.clock import clock_of
from runtime.trainer.events import (
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    PausedEvent,
    RunEvent,
    StepEvent,
)
from runtime.trainer.examples import Example
from runtime.trainer.feed import Feed
from runtime.trainer.lora import TrainableLora, mix
from runtime.trainer.loss import Score
from runtime.trainer.memory import halve, is_out_of_memory
from runtime.trainer.micro_step import micro_step
from runtime.trainer.microbatch import pack
from runtime.trainer.optimizer import Optimizer
from runtime.trainer.sliced_run import MakeRun, SlicedRun, WriteAdapter
from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.trainer.snapshot import Progress, Restored, Snapshot
from runtime.trainer.spec import RunSpec
from runtime.trainer.watchdog import Lost, Watchdog
from runtime.workers.model import Model

MicroBatches = Sequence[Sequence[Example]]


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
    ) -> None:
        """`batches` gives the micro-batches of an epoch (from 0), `test` are those to evaluate on; the default `clock`
        is that of the decoder's device. Raises `ValueError` when `restored` is from another run."""
        self._decoder = decoder
        self._spec = spec
        self._batches = batches
        self._test = test
        self._write_adapter = write_adapter
        self._clock = clock = clock or clock_of(decoder.device)
        self._ops = training_ops(decoder.ops)
        self._lora = TrainableLora(decoder, spec.targets, spec.shape, seed=spec.seed)
        self._optimizer = Optimizer(self._lora.parameters(), spec.optimizer, self._lora.shards)
        self._watchdog = Watchdog(spec.watchdog, decoder.spec.vocab_size)
        self._progress = Progress()
        self._best: Mapping[str, Tensor] | None = None
        self._halved = False
        if restored is not None:
            self._lora.restore(restored.parameters)
            self._optimizer.restore(restored.optimizer)
            self._progress = restored.progress
            self._best = restored.best or restored.parameters
        super().__init__(on_event, clock)

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def paused(self) -> bool:
        """Whether it stands still at a step's end."""
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
                    learning_rate=self._rate(progress.step),
                    grad_norm=norm,
                    tokens=tokens,
                    trained_tokens=score.tokens,
                    accuracy=score.accuracy,
                    seconds=now - began,
                    busy_seconds=now_busy - busy,
                )
            )
            began, busy = now, now_busy
            if (yield from self._after_step()):
                break
        yield from self._finish()

    def _groups(self) -> Iterator[tuple[float, MicroBatches]]:
        """The micro-batches of each step that is still to do, and the epoch that it ends at."""
        size, total = self._spec.accumulation, self._spec.schedule.total_steps
        step = epoch = 0
        while step < total:
            batches = self._batches(epoch)
            groups = [batches[first : first + size] for first in range(0, len(batches), size)]
            for index, group in enumerate(groups[: total - step], 1):
                if step + index > self._progress.step:
                    yield epoch + index / len(groups), group
            step += len(groups)
            epoch += 1

    def _step(self, group: MicroBatches) -> Sliced[tuple[Score, float]]:
        """One change of the parameters; the score of its tokens, and the gradient's norm."""
        step = self._progress.step + 1
        failpoint("train.step", step)
        score = yield from self._gradients(step, group)
        norm = yield from self._optimizer.step(self._spec.schedule.factor(step))
        self._watchdog.check(step, score.mean, norm)
        return score, norm

    def _gradients(self, step: int, group: MicroBatches) -> Sliced[Score]:
        """Where memory runs out, once in a run, all micro-batches are halved from there on."""
        try:
            return (yield from self._accumulate(step, halve(group) if self._halved else group))
        except Exception as error:
            if self._halved or not is_out_of_memory(error) or halve(group) == list(group):
                raise
        self._halved = True
        self._optimizer.zero_grad()
        return (yield from self._accumulate(step, halve(group)))

    def _accumulate(self, step: int, group: MicroBatches) -> Sliced[Score]:
        trained = sum(example.num_trained for micro in group for example in micro)
        total = Score()
        for index, examples in enumerate(group):
            micro = micro_step(
                self._decoder,
                self._ops,
                self._lora,
                pack(examples, self._decoder.device),
                dropout=self._spec.dropout,
                seed=mix(self._spec.seed, step, index),
                checkpointing=self._spec.checkpointing,
            )
            yield from micro.forward_backward(1 / max(1, trained))
            total.add(micro.score)
        return total

    def _after_step(self) -> Sliced[bool]:
        """Evaluate, capture and stand still where that is due; True when the run should end early."""
        spec, progress = self._spec, self._progress
        stop = False
        last = progress.step == spec.schedule.total_steps
        if self._test and spec.eval_every and (progress.step % spec.eval_every == 0 or last):
            stop = yield from self._evaluate()
        if spec.save_every and progress.step % spec.save_every == 0 and not last:
            self._capture()
            self._on_event(CheckpointEvent(step=progress.step, best=progress.best_step == progress.step))
        if self._pause_asked and not last:
            self._capture()
            self._paused = True
            self._on_event(PausedEvent(step=progress.step))
            yield Slice("pause", 1)
            self._paused = False
        return stop

    def _evaluate(self) -> Sliced[bool]:
        """Score the held-out rows, and remember the best parameters; True when it has not improved for too long."""
        total = Score()
        for examples in self._test:
            micro = micro_step(self._decoder, self._ops, self._lora, pack(examples, self._decoder.device))
            yield from micro.evaluate()
            total.add(micro.score)
        progress = self._progress
        better = progress.best_loss is None or total.mean < progress.best_loss
        if better:
            progress.best_loss, progress.best_step, progress.worse_evals = total.mean, progress.step, 0
            self._best = self._lora.capture()
        else:
            progress.worse_evals += 1
        self._on_event(EvalEvent(step=progress.step, loss=total.mean, accuracy=total.accuracy, tokens=total.tokens))
        patience = self._spec.early_stopping
        return patience is not None and progress.worse_evals >= patience

    def _finish(self) -> Slices:
        progress = self._progress
        if self._test and not self._spec.eval_every:
            yield from self._evaluate()
        done = progress.step == self._spec.schedule.total_steps
        self._capture(last=True)
        self._on_event(
            FinishedEvent(
                step=progress.step,
                best_step=progress.best_step or progress.step,
                reason="done" if done else "early_stopping",
            )
        )

    def _capture(self, *, last: bool = False) -> None:
        """`last`: nothing goes on from here, so the optimiser's state is left out."""
        progress = msgspec.structs.replace(self._progress)
        self._snapshots[progress.step] = Snapshot(
            progress=progress,
            parameters=self._lora.capture(),
            optimizer={} if last else self._optimizer.capture(),
            best=None if progress.best_step in (0, progress.step) else self._best,
            write_adapter=lambda path, captured: self._write_adapter(path, self._lora.layers_of(captured)),
        )

    def _rate(self, step: int) -> float:
        return self._spec.optimizer.learning_rate * self._spec.schedule.factor(step)


def make_run_on(decoder: Model) -> MakeRun:
    """Makes runs on a decoder in this process."""

    def make(
        spec: RunSpec,
        feed: Feed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> TrainingRun:
        return TrainingRun(decoder, spec, feed.epoch, feed.test, on_event, write_adapter, restored=restored)

    return make
