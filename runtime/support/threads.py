"""Heavy work outside the engine's thread, each piece on a thread of its own; processes that end with their parent.

The engine computes with a team of OpenMP threads as large as the machine. A second thread that uses torch gets a team
of its own, and as long as both exist there are more threads than cores: libgomp then puts waiting threads to sleep
instead of letting them spin, at every one of the hundreds of barriers of a step. A token of SmolLM2 takes 1.5 times
as long. So no pool's thread ever computes: a team is gone when its thread has ended. Such threads are daemons too,
which a pool's are not: a load or a large data set does not keep the process alive.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_fresh_thread(function: Callable[..., T], *args: Any) -> T:
    """The result of `function(*args)`, or its error. Blocks until then; a signal interrupts the wait alone."""
    found: list[Callable[[], T]] = []

    def work() -> None:
        found.append(_outcome(function, *args))

    thread = threading.Thread(target=work, name="apart", daemon=True)
    thread.start()
    thread.join()
    return found[0]()


async def call_in_fresh_thread(function: Callable[..., T], *args: Any) -> T:
    """As `run_in_fresh_thread`, from a coroutine. When the caller is cancelled, the function still runs to its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Callable[[], T]] = loop.create_future()

    def settle(outcome: Callable[[], T]) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        outcome = _outcome(function, *args)
        with contextlib.suppress(RuntimeError):  # the loop has ended in the meantime
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="apart", daemon=True).start()
    return (await future)()


def _outcome(function: Callable[..., T], *args: Any) -> Callable[[], T]:
    """Call the function; calling the returned one gives its result, or raises its error."""
    try:
        result = function(*args)
    except Exception as error:
        raised = error

        def fail() -> T:
            raise raised

        return fail
    return lambda: result


# -- worker thread ---------------------------------------------------------------------------------
#
# Blocking work off the event loop, in the order of the calls.


class WorkerThread:
    """Runs one call after the other, outside the event loop and the engine's thread."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Future[Any]] = set()

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`. When the caller is cancelled, the function still runs to its end, and later
        calls wait for it."""
        task = asyncio.ensure_future(self._in_turn(function, *args))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _in_turn(self, function: Callable[..., T], *args: Any) -> T:
        async with self._turn:
            return await call_in_fresh_thread(function, *args)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # callers that still wait get the error; asyncio must not log it


# -- processes -------------------------------------------------------------------------------------
#
# A process that ends when its parent does, however that ends, and whatever this one is doing.

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with(parent: int, *, ignoring: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Have the system kill this process when the thread of process `parent` that made it ends. Exits at once when it
    has ended already.

    `ignoring`: signals that are meant for the parent, which ends its work first. Elsewhere than on Linux nothing kills
    this process: it needs another sign, such as a link that is closed, which a stuck process does not read.
    """
    for number in ignoring:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def outlive_parent() -> None:
    """Take `die_with` back."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
