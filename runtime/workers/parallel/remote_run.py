"""A training run on ranks: all of them do the same slices; the engine's process says how much of each.

When the ranks are lost, the run continues from its newest snapshot with the next ones.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import msgspec

from runtime.events import CheckpointEvent, FailedEvent, FinishedEvent, GenerateEvent, PausedEvent, RunEvent
from runtime.trainer.course import Restored, Snapshot
from runtime.trainer.schedule import ExampleFeed
from runtime.trainer.sliced_run import MakeRun, RunSpec, SlicedRun, WriteAdapter
from runtime.trainer.slices import Slice, Slices
from runtime.workers.executor import WorkersLost
from runtime.workers.parallel.executor import AllFailed, DistributedExecutor
from runtime.workers.parallel.messages import (
    Advance,
    Advanced,
    Captured,
    CloseRun,
    RankMessage,
    StartRun,
    TakeSnapshot,
    Tensors,
    pack,
    unpack,
)


def make_run_on_ranks(executor: DistributedExecutor) -> MakeRun:
    """Makes runs on a group of ranks."""
    numbers = count()

    def make(
        spec: RunSpec,
        feed: ExampleFeed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> RemoteRun:
        return RemoteRun(next(numbers), executor, spec, feed, on_event, write_adapter, restored)

    return make


class RemoteRun(SlicedRun):
    """Lives on the engine's thread, as a run in this process does; the ranks build it with its first slice."""

    def __init__(
        self,
        number: int,
        executor: DistributedExecutor,
        spec: RunSpec,
        feed: ExampleFeed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> None:
        """`number`: by which the ranks tell it from other runs."""
        self._number = number
        self._executor = executor
        self._spec = spec
        self._start = StartRun(
            run=number,
            spec=msgspec.msgpack.encode(spec),
            feed=msgspec.msgpack.encode(feed),
            restored=None if restored is None else pack(restored),
        )
        self._write_adapter = write_adapter
        self._step = 0 if restored is None else restored.progress.step
        super().__init__(on_event, time.monotonic)
        if restored is not None:
            self.pacer.learn(restored.progress.rates)
        # Only the ranks keep the time of the next snapshot: they pause while too many snapshots are not taken yet.
        self._waits_for_disk = True

    @property
    def step(self) -> int:
        return self._step

    @property
    def ready(self) -> bool:
        return super().ready and not self._executor.lost

    def _slices(self) -> Slices:
        while True:
            try:
                yield from self._run()
            except WorkersLost:
                yield Slice("new_ranks", 1)
                continue
            return

    def _run(self) -> Slices:
        ranks, self._awaits_answers = self._executor.ranks, False
        with self._closing():
            try:
                at = self._ask(self._start)
            except AllFailed as error:
                code = "internal_error" if self._start.restored is None else "bad_checkpoint"
                self._on_event(FailedEvent(step=self._step, code=code, message=f"The job cannot go on: {error}."))
                return
            while at.wanted is not None:
                granted = yield at.wanted
                if self._executor.ranks is not ranks:
                    raise WorkersLost("these are other ranks than the run began on")
                at = self._ask(Advance(self._number, granted, self._pause_asked, self._take_answers()))

    def _ask(self, message: RankMessage) -> Advanced:
        reply = self._executor.ask_alike(message, lambda reply: isinstance(reply, Advanced) and reply.wanted)
        if not isinstance(reply, Advanced):
            raise TypeError(f"a rank answered {type(reply).__name__} to {type(message).__name__}")
        self._paused = reply.paused
        for event in reply.events:
            self._take(event)
        return reply

    def _take(self, event: RunEvent) -> None:
        self._step = event.step
        if isinstance(event, GenerateEvent | PausedEvent):
            self._awaits_answers, self._answers = isinstance(event, GenerateEvent), None
        if isinstance(event, CheckpointEvent | PausedEvent | FinishedEvent | GenerateEvent):
            reply = self._executor.ask_alike(TakeSnapshot(self._number, event.step), type)
            if not isinstance(reply, Captured) or reply.snapshot is None:
                raise TypeError("the first rank has no snapshot")
            self._snapshots.append(self._unpacked(reply.snapshot))
            if not isinstance(event, FinishedEvent | GenerateEvent):
                self._start = msgspec.structs.replace(self._start, restored=reply.snapshot)
        self._on_event(event)

    def _take_answers(self) -> dict[str, float] | None:
        """The metrics that the ranks wait for, once."""
        if not self._awaits_answers or self._answers is None:
            return None
        self._awaits_answers = False
        return dict(self._answers)

    def _unpacked(self, tensors: Tensors) -> Snapshot:
        restored = unpack(tensors)
        return Snapshot(
            progress=msgspec.structs.replace(restored.progress, rates=self.pacer.rates),
            parameters=restored.parameters,
            optimizer=restored.optimizer,
            best=restored.best,
            reference=restored.reference,
            write_adapter=lambda path, captured: self._write_adapter(path, self._spec.adapter_of(captured)),
        )

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            with suppress(WorkersLost, AllFailed):
                self._executor.ask_alike(CloseRun(self._number), type)
