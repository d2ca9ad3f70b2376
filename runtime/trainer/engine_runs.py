"""Runs on the engine thread, seen from the event loop: `jobs.ports.Runs`.

A run is built on a thread of its own (it reads checkpoints and allocates), works on the engine thread, and reports
on the event loop.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.apart import call_apart
from runtime.logs import get_logger
from runtime.trainer.events import CancelledEvent, FailedEvent, RunEvent, StepEvent
from runtime.trainer.host import TrainingHost
from runtime.trainer.jobs.ports import PreparedJob
from runtime.trainer.plan import Plan, feed
from runtime.trainer.run_spec import run_spec
from runtime.trainer.sliced_run import SlicedRun
from runtime.trainer.snapshot import Restored, Snapshot, read_snapshot
from runtime.workers.loading.peft import write_adapter
from runtime.workers.lora import LoraLayers

if TYPE_CHECKING:
    from runtime.service import EngineService

SMOOTHING = 0.2

log = get_logger(__name__)


class EngineRuns:
    """Starts runs, one at a time."""

    def __init__(self, service: "EngineService", host: TrainingHost) -> None:
        self._service = service
        self._host = host
        self.tokens_per_second: float | None = None
        """What training makes when it has the machine, as far as runs have shown."""

    def start(
        self, job_id: str, prepared: PreparedJob, resume_from: Path | None, on_event: Callable[[RunEvent], None]
    ) -> "EngineRun":
        """See `jobs.ports.Runs`."""
        assert isinstance(prepared.plan, Plan)

        def note(event: RunEvent) -> None:
            if isinstance(event, StepEvent) and event.busy_seconds > 0:
                rate = event.tokens / event.busy_seconds
                known = self.tokens_per_second or rate
                self.tokens_per_second = known + SMOOTHING * (rate - known)
            on_event(event)

        return EngineRun(self._service, self._host, prepared.plan, resume_from, note)


class EngineRun:
    """`jobs.ports.RunHandle`. Event loop only."""

    def __init__(
        self,
        service: "EngineService",
        host: TrainingHost,
        plan: Plan,
        resume_from: Path | None,
        on_event: Callable[[RunEvent], None],
    ) -> None:
        self._service = service
        self._host = host
        self._plan = plan
        self._on_event = on_event
        self._run: SlicedRun | None = None
        self._paused = False
        self._cancelled = False
        self._closed = False
        self._building = asyncio.create_task(self._build(resume_from))

    # -- what is asked of it -------------------------------------------------------------------

    def pause(self) -> None:
        self._paused = True
        if self._run is not None:
            self._run.pause()

    def resume(self) -> None:
        self._paused = False
        if self._run is not None:
            self._run.resume()
            self._service.on_engine_thread(_wake)

    def cancel(self) -> None:
        self._cancelled = True
        if self._run is not None:
            self._run.cancel()
            self._service.on_engine_thread(_wake)

    async def take_snapshot(self, step: int) -> Snapshot:
        assert self._run is not None, "there was an event, so there is a run"
        return self._run.take_snapshot(step)

    def close(self) -> None:
        self._closed = True
        self._building.cancel()
        run = self._run
        if run is not None:
            self._service.on_engine_thread(lambda: self._host.detach(run))

    # -- its making ----------------------------------------------------------------------------

    async def _build(self, resume_from: Path | None) -> None:
        try:
            run = await call_apart(self._make, resume_from)
        except ValueError as error:
            self._report(FailedEvent(step=0, code="bad_checkpoint", message=f"The job cannot go on: {error}."))
            return
        except Exception:
            log.exception("cannot_build_run")
            message = "An internal error kept this job from starting; the server's log has it."
            self._report(FailedEvent(step=0, code="internal_error", message=message))
            return
        if self._cancelled:
            self._report(CancelledEvent(step=run.step))
            return
        if self._paused:
            run.pause()
        self._run = run
        self._service.on_engine_thread(lambda: self._host.attach(run, self._from_engine))

    def _make(self, resume_from: Path | None) -> SlicedRun:
        plan, service = self._plan, self._service
        restored: Restored | None = None if resume_from is None else read_snapshot(resume_from)
        spec = run_spec(plan, service.lora_base.places)

        def write(directory: Path, layers: LoraLayers) -> None:
            write_adapter(directory, layers, spec.shape, service.lora_base, dropout=spec.dropout)

        return service.make_run(spec, feed(plan), self._from_engine, write, restored)

    # -- its reports ---------------------------------------------------------------------------

    def _from_engine(self, event: RunEvent) -> None:
        self._service.on_event_loop(self._report, event)

    def _report(self, event: RunEvent) -> None:
        if not self._closed:
            self._on_event(event)


def _wake() -> None:
    """A message is enough: the engine thread looks at its background after it."""
