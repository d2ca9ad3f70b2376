"""Watches that nothing blocks an event loop: neither what runs on it, nor a thread that keeps Python's lock.

The limit is on what code does, not on how long it takes: a busy machine makes everything slow, so time counts only
while a thread was on a processor (its CPU time), and waiting for the lock only beyond the wait for a processor
(`schedstat`) and while another thread of the server was on one; and on a processor that is slower than usual, or whose
other half is busy, the limit is as much longer. The collector of garbage is off meanwhile: a server
freezes what is there when it is ready, and a test process, which has far more in it, does not.
"""

import asyncio
import asyncio.events
import contextlib
import functools
import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from litestar import Litestar

LIMIT = 0.1
"""Seconds, of a usual processor."""

USUAL = 0.015
"""Seconds that `_work` takes a usual processor (3 GHz)."""

BLOCKED = f"the event loop was blocked for over {LIMIT * 1000:.0f} ms"
"""Beginning of what a test that blocks it fails with."""

BEAT = 0.02
"""Seconds between two looks at a loop that is not asyncio's own."""

SERVER_THREADS = ("text_", "asyncio_", "engine", "apart", "compute", "database")
"""Beginnings of the names of threads that belong to a server, and not to a test."""


class Watch:
    """What blocked while it was on."""

    def __init__(self) -> None:
        self.blocked: list[str] = []

    def note(self, what: str, seconds: float) -> None:
        self.blocked.append(f"{what}: {seconds * 1000:.0f} ms")


_watches: list[Watch] = []
"""Those that are on: one for the test, and in tests of the watch itself another one."""


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Notes what blocks an event loop of this process meanwhile."""
    watch = Watch()
    _watches.append(watch)
    canary = _canary()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield watch
    finally:
        if enabled:
            gc.enable()
        canary.settle()
        _watches.remove(watch)


def _note(what: str, seconds: float) -> None:
    if _watches and seconds > LIMIT * slowness(int(time.monotonic() / 10)):
        _watches[-1].note(what, seconds)


@functools.lru_cache(maxsize=1)
def slowness(moment: int) -> float:
    """How many times as long as usual this processor takes, at least 1. With `moment` it is measured anew."""
    return max(1.0, min(_work() for _ in range(3)) / USUAL)


def _work() -> float:
    began = time.thread_time()
    sum(range(1_000_000))
    return time.thread_time() - began


# -- callbacks of asyncio's own loops --------------------------------------------------------------

_run = asyncio.events.Handle._run
_sleep = time.sleep
_make_app = Litestar.__init__


class _Own(threading.local):
    """Seconds that this thread has computed for the test itself, in callbacks that may be the app's too."""

    seconds = 0.0


_own = _Own()


@contextlib.contextmanager
def own_doing() -> Iterator[None]:
    """What is computed here is the test's, and not the app's."""
    began = time.thread_time()
    try:
        yield
    finally:
        _own.seconds += time.thread_time() - began


def _make_app_for_a_test(*arguments: Any, **options: Any) -> None:
    with own_doing():
        _make_app(*arguments, **options)


def _measured_run(handle: asyncio.Handle) -> None:
    began, own = time.thread_time(), _own.seconds
    _run(handle)
    spent = time.thread_time() - began
    if spent > LIMIT and (spent := spent - (_own.seconds - own)) > LIMIT:
        _note(f"{handle!r} on the event loop", spent)


def _measured_sleep(seconds: float) -> None:
    if seconds > LIMIT and asyncio._get_running_loop() is not None and _watches:
        _watches[-1].note("time.sleep on the event loop", seconds)  # as long on any processor
    _sleep(seconds)


def install() -> None:
    """Once for the process. Costs a microsecond a callback."""
    asyncio.events.Handle._run = _measured_run  # type: ignore[method-assign]
    time.sleep = _measured_sleep
    Litestar.__init__ = _make_app_for_a_test  # type: ignore[method-assign]


# -- other loops -----------------------------------------------------------------------------------


def watch_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Have a loop that runs in this thread looked at. What a turn of it computed shows at the next look."""
    last = time.thread_time()

    def beat() -> None:
        nonlocal last
        spent = time.thread_time() - last
        if spent > LIMIT:
            _note("a turn of the server's event loop", spent)
        last = time.thread_time()
        loop.call_later(BEAT, beat)

    loop.call_soon(beat)


# -- Python's lock ---------------------------------------------------------------------------------


def seconds_on_processor(native_id: int) -> float:
    """Of a thread so far; 0 of one that has ended. Keeps the lock, so that a look at all threads is one moment."""
    clock = (~native_id << 3) | 6  # the kernel's name of a thread's CPU clock, see clock_getcpuclockid(3)
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


class _Machine:
    """How long this thread could not run because of what else the machine does, its host included."""

    def __init__(self) -> None:
        self._files = [os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/schedstat", "/proc/stat")]

    def seconds(self) -> float:
        """So far: waiting for a processor, and taken from any of them by the host of this virtual machine."""
        schedstat, stat = (os.pread(file, 200, 0).split() for file in self._files)
        return int(schedstat[1]) / 1e9 + int(stat[8]) / os.sysconf("SC_CLK_TCK")


class _Canary(threading.Thread):
    """Needs the lock every few milliseconds, and notices when it does not get it."""

    def __init__(self) -> None:
        super().__init__(name="canary", daemon=True)
        self._began = time.monotonic()

    def settle(self) -> None:
        """Wait for a turn that is late: what is wrong with it belongs to what was done before this."""
        began = self._began
        while self._began == began and time.monotonic() - began > BEAT + LIMIT / 2:
            _sleep(BEAT / 10)

    def run(self) -> None:
        machine = _Machine()
        while True:
            began, before = time.monotonic(), self._threads()
            self._began = began
            elsewhere = machine.seconds()  # reading lets go of the lock too, which may not come back for long
            _sleep(BEAT)
            waited = time.monotonic() - began - BEAT
            if waited > LIMIT:
                after = self._threads()
                self._blame(waited - (machine.seconds() - elsewhere), before, after)

    def _blame(self, waited: float, before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> None:
        spent = {name: total - before.get(id, (name, 0.0))[1] for id, (name, total) in after.items()}
        busy = {name: seconds for name, seconds in spent.items() if seconds > LIMIT}
        # Where a thread of the test was busy too it may have been the one.
        if waited > LIMIT and busy and all(name.startswith(SERVER_THREADS) for name in busy):
            _note(f"Python's lock, kept by {' or '.join(busy)}", min(waited, max(busy.values())))

    def _threads(self) -> dict[int, tuple[str, float]]:
        """Id → name, and seconds on a processor so far."""
        ids = {thread.native_id: thread.name for thread in threading.enumerate() if thread is not self}
        return {id: (name, seconds_on_processor(id)) for id, name in ids.items() if id is not None}


@functools.cache
def _canary() -> _Canary:
    canary = _Canary()
    canary.start()
    return canary


def describe(watch: Watch) -> str:
    return f"{BLOCKED}: " + "; ".join(watch.blocked)
