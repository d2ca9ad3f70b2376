"""Loads of adapter versions as requests need them: read ahead on another thread, given a place between two steps."""

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable

import torch

from runtime.checkpoints.peft import AdapterInvalid
from runtime.messages import ADAPTER_UNLOADED, ADAPTER_UNREADABLE
from runtime.metrics import Metrics
from runtime.scheduler.adapters import AdapterPlaces
from runtime.support.logs import get_logger
from runtime.workers.executor import Executor, Pipeline, WorkersLost

AdapterFiles = Callable[[], str]
"""Checks the files of a version and returns their folder. Raises `AdapterInvalid`, `OSError`. Called on any thread."""

READER_NICENESS = 5
"""Of the thread that reads: steps come first on a machine without a core to spare."""

log = get_logger("adapters")


class AdapterLoads:
    """Keeps versions in the places that the scheduler gives them. Belongs to the engine's thread, except `read`."""

    def __init__(self, places: AdapterPlaces, executor: Executor, pipeline: Pipeline, metrics: Metrics) -> None:
        self.notify: Callable[[], None] = lambda: None
        """Called, on any thread, when a version was read."""
        self.num_loads = 0
        """Versions that were given a place so far."""
        self._places = places
        self._executor = executor
        self._pipeline = pipeline
        self._metrics = metrics
        self._files: dict[str, AdapterFiles] = {}
        self._reader_busy = False
        self._ended: deque[tuple[str, Exception | None]] = deque()
        """Reads that have ended and were not taken in."""

    @property
    def has_ended(self) -> bool:
        """True if a read has ended that was not taken in."""
        return bool(self._ended)

    def add(self, key: str, files: AdapterFiles) -> None:
        """Let requests name a version: the first one has it loaded."""
        self._files[key] = files
        self._places.add(key)

    def remove(self, key: str) -> None:
        """Free the place of a version that no request needs. Unknown ones are fine."""
        if self._files.pop(key, None) is not None:
            self._places.remove(key)

    def advance(self) -> None:
        """Load what was read as far as there are places, and begin to read what comes next."""
        goes_on = True
        while goes_on:
            while self._ended:
                self._take_in(*self._ended.popleft())
            for unwanted in self._places.unwanted:
                self._drop(unwanted)
            while (key := self._places.next_load()) is not None:
                with contextlib.suppress(Exception):  # its requests end with it
                    self.load(key)
            goes_on = not self._reader_busy and (key := self._places.next_read()) is not None and self._begin(key)

    def load(self, key: str) -> None:
        """Give a version that was read a place, which must be there. Raises what loading it does."""
        if (victim := self._places.make_room(key)) is not None:
            self._pipeline.in_order(lambda: self._executor.unload_adapter(victim))
            self._metrics.on_adapter_unloaded(victim)
        try:
            self._pipeline.in_order(lambda: self._executor.load_adapter(key))
        except WorkersLost:
            self._places.forget_read(key)  # it is read again for those that come in their place
            raise
        except Exception as error:
            self._fail(key, error)
            raise
        self._places.load(key)
        self.num_loads += 1
        self._metrics.on_adapter_loaded(key)

    def warm(self, key: str, error: Exception | None) -> None:
        """A version was read before any request named it: load it if there is room. `error`: it could not be read.
        Raises what loading it does."""
        self._take_in(key, error)
        if key in self._files and error is None and self._places.has_room:
            self.load(key)

    def read(self, key: str) -> None:
        """Read a version. On a fresh thread. Raises `AdapterInvalid`, `OSError`."""
        _yield_to_steps()
        if (files := self._files.get(key)) is None:
            raise AdapterInvalid(ADAPTER_UNLOADED)
        if not self._executor.revive_adapter(key):
            self._executor.prepare_adapter(key, files())

    def _begin(self, key: str) -> bool:
        """Begin to read a version. True if that has ended already: it was still in memory."""
        if self._executor.revive_adapter(key):
            self._ended.append((key, None))
            return True
        self._reader_busy = True
        threading.Thread(target=self._read, args=(key,), name="adapters", daemon=True).start()
        return False

    def _read(self, key: str) -> None:
        failure: Exception | None = None
        try:
            self.read(key)
        except Exception as error:
            failure = error
        self._reader_busy = False
        self._ended.append((key, failure))
        self.notify()

    def _take_in(self, key: str, error: Exception | None) -> None:
        if error is not None:
            self._fail(key, error)
            return
        self._places.end_read(key)
        if key not in self._files:
            self._drop(key)

    def _drop(self, key: str) -> None:
        """Let go of a version that was read; the executor may keep it for its next use."""
        self._places.lose(key, ADAPTER_UNLOADED)
        self._executor.unload_adapter(key)

    def _fail(self, key: str, error: Exception) -> None:
        log.error("adapter_unavailable", adapter=key.partition(":")[0], reason=str(error))
        self._places.lose(key, ADAPTER_UNREADABLE)


def _yield_to_steps() -> None:
    """Let the calling thread, which must be a fresh one, compute at a lower priority than steps, and without a team of
    OpenMP threads: where all cores are busy, a team waits milliseconds in each operation for a member that does not
    run."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux has priorities of threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICENESS)
    torch.get_num_threads()  # sets the thread's number, which is overwritten then
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)
