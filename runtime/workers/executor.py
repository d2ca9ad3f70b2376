"""Where a plan is executed: in this process, or by ranks in others (`runtime.ranks`), which take the same messages."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from runtime.messages import Row, StepPlan, StepResult
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.worker import Worker


class Executor(Protocol):
    """Runs step plans. A row that fails is in the result's `failed`; what it raises, nothing can go on after."""

    def execute(self, plan: StepPlan) -> StepResult: ...

    def prepare_adapter(self, key: str, directory: str) -> None:
        """Read an adapter version's files and check them. From any thread; changes nothing yet.
        Raises `AdapterInvalid`."""

    def load_adapter(self, key: str) -> None:
        """Serve what was prepared under `key`, from the next step on."""

    def unload_adapter(self, key: str) -> None:
        """Let its memory go. Nothing in a later plan may name it."""

    @property
    def lost(self) -> bool:
        """Whether the workers are gone: nothing can be done before `recover`. From any thread."""

    def recover(self) -> None:
        """Make new workers, with the adapters that were loaded and an empty cache. Raises `WorkersLost` where that is
        hopeless."""

    def on_loss(self, notify: Callable[[], None]) -> None:
        """Have `notify` called, from any thread, when the workers are lost while nobody asks for anything."""

    def close(self) -> None:
        """End the workers. Nothing may be asked for any more."""


class WorkersLost(RuntimeError):
    """A worker has died or hangs, and with it everything that is in the cache. The message names it."""


class AllRowsFailed(RuntimeError):
    """Not one row of a step could be computed, alone or together."""


class RowByRow(ABC):
    """One batch a step; when it raises, row by row, so that one bad row fails alone."""

    def __init__(self) -> None:
        self._behind: set[int] = set()
        """Slots whose sequence misses a token, as its row failed. A plan made before that was known may go on."""

    @abstractmethod
    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult:
        """Take in a plan and compute these of its rows, which may be none. Raises what they raise."""

    @abstractmethod
    def _row(self, step: int, row: Row) -> StepResult:
        """Compute a row of a plan that was taken in."""

    def execute(self, plan: StepPlan) -> StepResult:
        """See `Executor`. Raises `AllRowsFailed`, `WorkersLost`."""
        self._behind.difference_update(admission.slot for admission in plan.admitted)
        rows = [row for row in plan.rows if row.slot not in self._behind]
        behind = {row.slot: "An internal error ended this request." for row in plan.rows if row.slot in self._behind}
        try:
            result = self._batch(plan, rows)
        except WorkersLost:
            raise
        except Exception as error:
            if not rows:
                raise
            result = self._isolate(plan.step, rows, error)
        self._behind |= result.failed.keys()
        return replace(result, failed=result.failed | behind) if behind else result

    def _isolate(self, step: int, rows: list[Row], cause: Exception) -> StepResult:
        slots: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        logprobs: dict[int, float] = {}
        candidates: dict[int, list[tuple[int, float]]] = {}
        for row in rows:
            try:
                result = self._row(step, row)
            except WorkersLost:
                raise
            except Exception:
                failed[row.slot] = "An internal error ended this request; the others go on."
                continue
            slots += result.slots
            tokens += result.tokens
            failed |= result.failed
            logprobs |= result.logprobs
            candidates |= result.candidates
        if len(failed) == len(rows):
            self._behind |= failed.keys()
            raise AllRowsFailed(f"every row of step {step} failed") from cause
        return StepResult(
            step=step, slots=slots, tokens=tokens, failed=failed, logprobs=logprobs, candidates=candidates
        )


class InProcessExecutor(RowByRow):
    """The worker in this process."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult:
        self._worker.admit(plan)
        return self._worker.compute(plan.step, rows) if rows else StepResult(step=plan.step, slots=[], tokens=[])

    def _row(self, step: int, row: Row) -> StepResult:
        return self._worker.compute(step, [row])

    def prepare_adapter(self, key: str, directory: str) -> None:
        self._slots.prepare(key, directory)

    def load_adapter(self, key: str) -> None:
        self._slots.load(key)

    def unload_adapter(self, key: str) -> None:
        self._slots.unload(key)

    @property
    def _slots(self) -> AdapterSlots:
        if self._worker.adapters is None:
            raise RuntimeError("this worker was made without adapter slots")
        return self._worker.adapters

    @property
    def lost(self) -> bool:
        return False

    def recover(self) -> None:
        return

    def on_loss(self, notify: Callable[[], None]) -> None:
        return

    def close(self) -> None:
        return
