"""A rank's side of a training run."""

from pathlib import Path

import msgspec

from runtime.ranks.messages import Advance, Advanced, Captured, StartRun
from runtime.ranks.snapshots import pack, unpack
from runtime.trainer.events import RunEvent
from runtime.trainer.feed import Feed
from runtime.trainer.run import TrainingRun
from runtime.trainer.spec import RunSpec
from runtime.workers.decoder import Decoder
from runtime.workers.lora import LoraLayers


class RankTraining:
    """At most one run."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._run: TrainingRun | None = None
        self._events: list[RunEvent] = []

    def start(self, message: StartRun) -> Advanced:
        """Raises `ValueError` for a snapshot of another run."""
        self.close()
        feed = msgspec.msgpack.decode(message.feed, type=Feed)
        self._run = TrainingRun(
            self._decoder,
            msgspec.msgpack.decode(message.spec, type=RunSpec),
            feed.epoch,
            feed.test,
            self._events.append,
            _written_elsewhere,
            restored=None if message.restored is None else unpack(message.restored),
        )
        return self._state(self._run)

    def advance(self, message: Advance) -> Advanced:
        """Do one slice."""
        run = self._running
        if message.pause:
            run.pause()
        else:
            run.resume()
        wanted = run.pacer.peek()
        if wanted is not None:
            run.pacer.do(wanted.kind, message.granted)
        return self._state(run)

    def snapshot(self, step: int) -> Captured:
        """Raises `KeyError` for a step without."""
        snapshot = self._running.take_snapshot(step)
        return Captured(pack(snapshot) if self._decoder.group.rank == 0 else None)

    def close(self) -> None:
        """Let a run go."""
        if self._run is not None:
            self._run.pacer.close()
            self._run = None
        self._events.clear()

    @property
    def _running(self) -> TrainingRun:
        if self._run is None:
            raise RuntimeError("no run was started")
        return self._run

    def _state(self, run: TrainingRun) -> Advanced:
        wanted = run.pacer.peek()
        events, paused = list(self._events), run.paused
        self._events.clear()
        return Advanced(wanted=wanted, paused=paused, events=events)


def _written_elsewhere(directory: Path, layers: LoraLayers) -> None:
    raise AssertionError("adapters are written by the engine's process")
