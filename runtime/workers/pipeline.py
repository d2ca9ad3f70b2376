"""Plans on their way through the executor: in the caller's thread, or on one beside it while the caller plans on.

All that touches the worker goes through here in the order in which it comes, so that what a plan relies on
(blocks that others gave back, an adapter, a token that the plan before it samples) is there when it runs.
"""

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from runtime.messages import StepPlan, StepResult
from runtime.workers.executor import Executor

T = TypeVar("T")

Inbox = SimpleQueue[Callable[[], None] | None]


class Pipeline:
    """Executes plans in their order. Belongs to one thread."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._results: deque[Future[StepResult]] = deque()
        self._thread: ComputeThread | None = None

    def submit(self, plan: StepPlan, *, beside: bool) -> None:
        """Execute a plan: `beside` the caller, who goes on at once, or here and now when nothing is in flight."""
        self._results.append(self._run(partial(self._executor.execute, plan), beside=beside or bool(self._results)))

    def collect(self) -> StepResult:
        """The result of the oldest plan that was not collected yet; waits for it. Raises what the executor raises."""
        return self._results.popleft().result()

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
    """Runs tasks one after the other. Ends when nobody refers to it; never keeps the process from ending."""

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
    except BaseException as error:  # whoever waits for it is in another thread
        future.set_exception(error)
    else:
        future.set_result(result)
