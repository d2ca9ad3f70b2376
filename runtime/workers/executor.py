"""Execution of plans: in this process, or by ranks in other processes (`runtime.workers.parallel`), which take the same
messages; in the caller's thread, or on one beside it while the caller plans on (`Pipeline`).
"""

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from msgspec.structs import replace

from runtime.messages import ROW_FAILED, Row, StepPlan, StepResult, TokenLogprob
from runtime.support.logs import get_logger
from runtime.trainer.riding import Ride
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.recorded_steps import LaunchedStep, RecordedSteps
from runtime.workers.worker import Worker

log = get_logger(__name__)


class Executor(Protocol):
    """Runs step plans. A row that fails is in the result's `failed`; nothing can continue after an exception."""

    def launch(self, plan: StepPlan) -> StepResult | LaunchedStep:
        """Execute a plan, or begin to, so that the next one can be launched before this one's tokens are read."""

    def prepare_adapter(self, key: str, directory: str) -> None:
        """Read an adapter version's files and check them. Callable from any thread; changes nothing yet.
        Raises `AdapterInvalid`."""

    def revive_adapter(self, key: str) -> bool:
        """Prepare a version that was unloaded from what is still in memory of it; False where nothing is. Callable from
        any thread."""

    def load_adapter(self, key: str) -> None:
        """Serve what was prepared under `key`, from the next step on."""

    def unload_adapter(self, key: str) -> None:
        """Release its memory. Nothing in a later plan may name it."""

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        """See `Worker.kept_widths`; None where tokens of training cannot ride, as between ranks."""

    def offer(self, ride: Ride) -> None:
        """Set what the riding tokens of the next plans are of, where there are `kept_widths`."""

    @property
    def lost(self) -> bool:
        """True if the workers are lost: nothing can be done before `recover`. Callable from any thread."""

    def recover(self) -> None:
        """Make new workers, with the adapters that were loaded and an empty cache. Raises `WorkersLost` where that is
        hopeless."""

    def on_loss(self, notify: Callable[[], None]) -> None:
        """Have `notify` called, from any thread, when the workers are lost while no call is under way."""

    def close(self) -> None:
        """End the workers. No other call may follow."""


class WorkersLost(RuntimeError):
    """A worker has died or hangs, and with it everything that is in the cache. The message names it."""


class AllRowsFailed(RuntimeError):
    """No row of a step could be computed, alone or in the batch."""


class RowByRow(ABC):
    """One batch a step; when it raises, row by row, so that one bad row fails alone."""

    def __init__(self) -> None:
        self._behind: set[int] = set()
        """Slots whose sequence misses a token, as its row failed. A plan made before the failure may still have rows
        for them."""

    @abstractmethod
    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult | LaunchedStep:
        """Take in a plan and compute these of its rows, which may be none. Raises what they raise."""

    @abstractmethod
    def _row(self, step: int, row: Row) -> StepResult:
        """Compute a row of a plan that was taken in."""

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        return None

    def offer(self, ride: Ride) -> None:
        raise RuntimeError("tokens of training do not ride here")

    def revive_adapter(self, key: str) -> bool:
        return False

    def unload(self) -> None:
        """Let go of weights and cache that this process holds, after `close`."""
        return

    @property
    def recorded(self) -> RecordedSteps | None:
        """The steps that run as recorded, where there are some in this process."""
        return None

    def execute(self, plan: StepPlan) -> StepResult:
        """Execute a plan to its end. Raises `AllRowsFailed`, `WorkersLost`."""
        launched = self.launch(plan)
        return launched.finish() if isinstance(launched, LaunchedStep) else launched

    def launch(self, plan: StepPlan) -> StepResult | LaunchedStep:
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
        if isinstance(result, LaunchedStep):
            return result.then(partial(self._note_failed, behind))
        return self._note_failed(behind, result)

    def _note_failed(self, behind: dict[int, str], result: StepResult) -> StepResult:
        self._behind |= result.failed.keys()
        return replace(result, failed=result.failed | behind) if behind else result

    def _isolate(self, step: int, rows: list[Row], cause: Exception) -> StepResult:
        slots: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        candidates: dict[int, list[tuple[int, float]]] = {}
        pooled: dict[int, list[float]] = {}
        forced: dict[int, list[int]] = {}
        for row in rows:
            try:
                result = self._row(step, row)
            except WorkersLost:
                raise
            except Exception:
                log.exception("row_failed", step=step, slot=row.slot)
                failed[row.slot] = ROW_FAILED
                continue
            slots += result.slots
            tokens += result.tokens
            failed |= result.failed
            logprobs |= result.logprobs
            prompt_logprobs |= result.prompt_logprobs
            candidates |= result.candidates
            pooled |= result.pooled
            forced |= result.forced
        if len(failed) == len(rows):
            self._behind |= failed.keys()
            raise AllRowsFailed(f"every row of step {step} failed") from cause
        return StepResult(
            step=step,
            slots=slots,
            tokens=tokens,
            failed=failed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            forced=forced,
            candidates=candidates,
            pooled=pooled,
        )


class InProcessExecutor(RowByRow):
    """The worker in this process."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def unload(self) -> None:
        vars(self._worker).clear()

    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult | LaunchedStep:
        self._worker.admit(plan)
        if not rows:
            return StepResult(step=plan.step, slots=[], tokens=[])
        return self._worker.launch(plan.step, rows, plan.riding)

    def _row(self, step: int, row: Row) -> StepResult:
        return self._worker.compute(step, [row])

    @property
    def recorded(self) -> RecordedSteps | None:
        return self._worker.recorded

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        return self._worker.kept_widths

    def offer(self, ride: Ride) -> None:
        self._worker.offer(ride)

    def prepare_adapter(self, key: str, directory: str) -> None:
        self._slots.prepare(key, directory)

    def revive_adapter(self, key: str) -> bool:
        return self._slots.revive(key)

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


# -- pipeline --------------------------------------------------------------------------------------
#
# Plans on their way through the executor: in the caller's thread, or on one beside it while the caller plans on.
#
# All that touches the worker goes through here in the order in which it comes, so that what a plan relies on
# (blocks that others gave back, an adapter, a token that the plan before it samples) is there when it runs.


T = TypeVar("T")

Inbox = SimpleQueue[Callable[[], None] | None]


class Pipeline:
    """Executes plans in their order. Belongs to one thread."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._results: deque[Future[StepResult | LaunchedStep]] = deque()
        self._thread: ComputeThread | None = None

    def submit(self, plan: StepPlan, *, beside: bool) -> None:
        """Execute a plan: `beside` the caller, which continues at once, or in place when nothing is in flight."""
        self._results.append(self._run(partial(self._executor.launch, plan), beside=beside or bool(self._results)))

    def collect(self) -> StepResult:
        """The result of the oldest plan that was not collected yet; waits for it. Raises what the executor raises."""
        result = self._results.popleft().result()
        return self.in_order(result.finish) if isinstance(result, LaunchedStep) else result

    def discard(self) -> None:
        """Wait for what is in flight and drop its results."""
        while self._results:
            with suppress(Exception):
                self.collect()

    def in_order(self, work: Callable[[], T]) -> T:
        """The result of `work`, done after all plans that were submitted before. Raises what it raises."""
        return self._run(work, beside=bool(self._results)).result()

    def _run(self, work: Callable[[], T], *, beside: bool) -> Future[T]:
        future: Future[T] = Future()
        task = partial(_settle, future, work)
        if beside:
            self._thread = self._thread or ComputeThread()
            self._thread.run(task)
        else:
            task()
        return future


class ComputeThread:
    """Runs tasks one after the other. Ends when no reference to it is left; never keeps the process from ending."""

    def __init__(self) -> None:
        self._inbox: Inbox = SimpleQueue()
        Thread(target=_serve, args=(self._inbox,), name="compute", daemon=True).start()
        weakref.finalize(self, self._inbox.put, None)

    def run(self, task: Callable[[], None]) -> None:
        self._inbox.put(task)


def _serve(inbox: Inbox) -> None:
    while (task := inbox.get()) is not None:
        task()
        del task  # it holds the worker, and the next one may never come


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # the caller that waits for it is in another thread
        future.set_exception(error)
    else:
        future.set_result(result)
