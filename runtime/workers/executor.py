"""Where a plan is executed. In this process for now; ranks over torch.distributed take the same messages."""

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


class AllRowsFailed(RuntimeError):
    """Not one row of a step could be computed, alone or together."""


class InProcessExecutor:
    """The worker in this very thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lost: set[int] = set()
        """Slots whose sequence misses a token, as its row failed. A plan made before that was known may go on."""

    def execute(self, plan: StepPlan) -> StepResult:
        """One batch; when it raises, row by row, so that one bad row fails alone. See `Executor`."""
        self._worker.admit(plan)
        self._lost.difference_update(admission.slot for admission in plan.admitted)
        rows = [row for row in plan.rows if row.slot not in self._lost]
        lost = {row.slot: "An internal error ended this request." for row in plan.rows if row.slot in self._lost}
        if not rows:
            return StepResult(step=plan.step, slots=[], tokens=[], failed=lost)
        try:
            result = self._worker.compute(plan.step, rows)
        except Exception as error:
            result = self._isolate(plan.step, rows, error)
        self._lost |= result.failed.keys()
        return replace(result, failed=result.failed | lost) if lost else result

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

    def _isolate(self, step: int, rows: list[Row], cause: Exception) -> StepResult:
        slots: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        logprobs: dict[int, float] = {}
        candidates: dict[int, list[tuple[int, float]]] = {}
        for row in rows:
            try:
                result = self._worker.compute(step, [row])
            except Exception:
                failed[row.slot] = "An internal error ended this request; the others go on."
                continue
            slots += result.slots
            tokens += result.tokens
            failed |= result.failed
            logprobs |= result.logprobs
            candidates |= result.candidates
        if len(failed) == len(rows):
            self._lost |= failed.keys()
            raise AllRowsFailed(f"every row of step {step} failed") from cause
        return StepResult(
            step=step, slots=slots, tokens=tokens, failed=failed, logprobs=logprobs, candidates=candidates
        )
