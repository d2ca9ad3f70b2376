"""A run of slices, seen by who drives it and by who asks things of it; what the slices do is a subclass's.

`pause`, `resume` and `cancel` may be called from any thread; a pause takes effect at the end of a step, where there is
something to go on from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from runtime.trainer.events import CancelledEvent, RunEvent
from runtime.trainer.feed import Feed
from runtime.trainer.slices import Pacer, Slices
from runtime.trainer.snapshot import Restored, Snapshot
from runtime.trainer.spec import RunSpec
from runtime.workers.lora import LoraLayers

WriteAdapter = Callable[[Path, LoraLayers], None]
"""Writes an adapter in PEFT's format into a fresh directory, and syncs it."""


class SlicedRun(ABC):
    """`pacer` drives it. Reports through `on_event`, on the thread that drives it."""

    def __init__(self, on_event: Callable[[RunEvent], None], clock: Callable[[], float]) -> None:
        self._on_event = on_event
        self._snapshots: dict[int, Snapshot] = {}
        self._pause_asked = False
        self._cancel_asked = False
        self._paused = False
        self.pacer = Pacer(self._slices(), clock)

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps done."""

    @abstractmethod
    def _slices(self) -> Slices:
        """All of the run, from here to its last event."""

    # -- from any thread -----------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Is there anything to do now?"""
        return not self.pacer.done and (self._cancel_asked or not (self._paused and self._pause_asked))

    def work(self, seconds: float, *, longest: float | None = None) -> float:
        """Train for about so long; returns how long it was. On the engine thread. `longest`: see `Pacer.run`."""
        if self._cancel_asked and not self.pacer.done:
            self.pacer.close()
            self._on_event(CancelledEvent(step=self.step))
        return self.pacer.run(seconds, self._may_go_on, longest=longest)

    def _may_go_on(self) -> bool:
        return self.ready and not self._cancel_asked

    def pause(self) -> None:
        """Stand still at the end of this step, with a snapshot."""
        self._pause_asked = True

    def resume(self) -> None:
        self._pause_asked = False

    def cancel(self) -> None:
        """End before the next slice."""
        self._cancel_asked = True

    def take_snapshot(self, step: int) -> Snapshot:
        """What was captured at `step`, once. Raises `KeyError` for a step without."""
        return self._snapshots.pop(step)


class MakeRun(Protocol):
    """Makes runs on the model that is served, wherever that is. Raises `ValueError` when `restored` is from another
    run."""

    def __call__(
        self,
        spec: RunSpec,
        feed: Feed,
        on_event: Callable[[RunEvent], None],
        write_adapter: WriteAdapter,
        restored: Restored | None,
    ) -> SlicedRun: ...
