"""The engine thread's side of training: holds the run that is being trained, and gives it its share of the time."""

import threading
from collections.abc import Callable

from runtime.logs import get_logger
from runtime.trainer.events import FailedEvent, RunEvent
from runtime.trainer.share import Share
from runtime.trainer.sliced_run import SlicedRun
from runtime.workers.memory import give_back_memory

IDLE = 0.05
"""Seconds of training between two looks at the inbox, when nobody asks for anything."""
LONGEST = 0.2
"""Seconds that one slice may take then: what a first token may have to wait."""

log = get_logger(__name__)


class TrainingHost:
    """`runtime.background.Background` of at most one run. `attach` and `detach` are called on the engine thread."""

    def __init__(self, share: Share, on_slices: Callable[[float], None] = lambda seconds: None) -> None:
        """`on_slices` is told of the seconds of every stretch of training."""
        self._share = share
        self._on_slices = on_slices
        self._run: SlicedRun | None = None
        self._on_event: Callable[[RunEvent], None] | None = None

    @property
    def ready(self) -> bool:
        run = self._run
        return run is not None and run.ready

    def attach(self, run: SlicedRun, on_event: Callable[[RunEvent], None]) -> None:
        """`on_event` gets what goes wrong outside of the run's own care."""
        assert self._run is None or self._run.pacer.done, "one run at a time"
        self._run, self._on_event = run, on_event

    def detach(self, run: SlicedRun) -> None:
        """Forget a run, wherever it is. One that is not attached is fine."""
        if self._run is run:
            run.pacer.close()
            self._run = self._on_event = None

    def idle(self) -> None:
        self._work(IDLE, longest=LONGEST)

    def between_steps(self, step_seconds: float, *, decoding: bool, first_tokens_due: bool) -> None:
        if not self.ready:
            return
        budget = self._share.budget(step_seconds, decoding=decoding, first_tokens_due=first_tokens_due)
        self._share.settle(budget, self._work(budget) if budget > 0 else 0.0)

    def _work(self, seconds: float, *, longest: float | None = None) -> float:
        run, on_event = self._run, self._on_event
        if run is None or on_event is None:
            return 0.0
        try:
            spent = run.work(seconds, longest=longest)
        except Exception:
            log.exception("training_failed")
            run.pacer.close()
            message = "An internal error ended this job; the server's log has it."
            on_event(FailedEvent(step=run.step, code="internal_error", message=message))
            return 0.0
        if spent:
            self._on_slices(spent)
        if run.pacer.done:
            threading.Thread(target=give_back_memory, name="trim", daemon=True).start()
        return spent
