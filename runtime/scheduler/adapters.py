"""Places in memory for adapter versions: which versions have one, which requests wait for one, which version is next.

A request whose version has no place waits aside, so that requests of loaded versions go on. A place is free once no
request of its version runs or is queued. A version that has waited longer than `max_wait` is promised the place of
another one: that takes no new requests, and gives the place up when its running ones have ended. All requests that
waited for a version are admitted before it can lose its place, so each load serves all of them, and none starves.

Versions that wait are read ahead, a few at a time, so that a load is one assignment and no step waits for it.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

from runtime.scheduler.request import Request
from runtime.support.counting import count_down

MAX_READ_AHEAD = 4
"""Versions that are being read, or were read and have no place yet."""


@dataclass(slots=True)
class AdapterWait:
    """The requests that wait for one version, by id."""

    since: float
    """Time since which the version waits."""
    requests: dict[int, Request] = field(default_factory=dict)


class AdapterPlaces:
    """Versions by key. Only those that were added are bounded: any other key has a place of its own."""

    def __init__(
        self, most: int, max_wait: float, *, clock: Callable[[], float], rank: Callable[[Request], float]
    ) -> None:
        """`most`: number of places; `max_wait`: seconds after which a version that waits is promised a place that is
        in use; `rank`: of a request, the lowest is served first (`Policy.rank`)."""
        self._most = most
        self._max_wait = max_wait
        self._clock = clock
        self._rank = rank
        self._added: set[str] = set()
        self._loaded: OrderedDict[str, None] = OrderedDict()
        """Least recently used first."""
        self._reading: set[str] = set()
        self._read: set[str] = set()
        """Versions that were read and have no place."""
        self._promised: dict[str, str] = {}
        """Loaded version that takes no new requests → version that gets its place."""
        self._waits: dict[str, AdapterWait] = {}
        """In order of their `since`."""
        self._recalled: dict[int, Request] = {}
        """Requests that can be queued now."""
        self._num_waiting = 0
        self._due: dict[str, set[int]] = {}
        """Requests of a loaded version that waited for it and were not admitted yet."""
        self._queued: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._lost: dict[str, str] = {}
        """Versions that cannot be loaded, with the error for requests that wait for them."""

    def __len__(self) -> int:
        """Requests that wait for a place. Callable from any thread."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        yield from self._recalled.values()
        for wait in self._waits.values():
            yield from wait.requests.values()

    # -- versions ------------------------------------------------------------------------------

    def add(self, key: str) -> None:
        """Let requests name a version, which is loaded when one does."""
        self._added.add(key)

    def remove(self, key: str) -> None:
        """Forget a version that no request needs. Unknown ones are fine."""
        self.forget_read(key)
        self._loaded.pop(key, None)
        self._promised.pop(key, None)
        self._added.discard(key)

    def holds(self, key: str) -> bool:
        """True for a version that was added and has a place. Callable from any thread."""
        return key in self._loaded

    def admits(self, key: str) -> bool:
        """True if requests of a version may be admitted."""
        return key not in self._added or (key in self._loaded and key not in self._promised)

    def lose(self, key: str, error: str) -> None:
        """A version without a place cannot be loaded: requests that wait for it end with `error`."""
        self.forget_read(key)
        self._break_promise(key)
        if key in self._waits:
            self._lost[key] = error

    def take_lost(self) -> list[tuple[Request, str]]:
        """Requests to be ended, each with its error."""
        lost, self._lost = self._lost, {}
        waits = [(self._waits[key], error) for key, error in lost.items() if key in self._waits]
        return [(request, error) for wait, error in waits for request in wait.requests.values()]

    # -- requests ------------------------------------------------------------------------------

    def wait(self, request: Request) -> None:
        """Keep a request until its version has a place."""
        key = request.submission.adapter
        if key not in self._waits:
            self._waits[key] = AdapterWait(self._clock())
        self._waits[key].requests[request.id] = request
        self._num_waiting += 1

    def take_recalled(self) -> list[Request]:
        """Requests whose version has a place, to be queued."""
        if not self._recalled:
            return []
        recalled, self._recalled = self._recalled, {}
        self._num_waiting -= len(recalled)
        return list(recalled.values())

    def discard(self, request: Request) -> bool:
        """Remove a request that ends while it waits; False when it does not wait here."""
        key = request.submission.adapter
        if self._recalled.pop(request.id, None) is not None:
            self._num_waiting -= 1
            self._settle(request)
            return True
        wait = self._waits.get(key)
        if wait is None or wait.requests.pop(request.id, None) is None:
            return False
        self._num_waiting -= 1
        if not wait.requests:
            del self._waits[key]
            self._break_promise(key)
        return True

    def on_queued(self, request: Request) -> None:
        """A request may be admitted as soon as there is a slot and blocks."""
        if key := request.submission.adapter:
            self._queued[key] += 1

    def on_dequeued(self, request: Request) -> None:
        """A request has left the queue: it is admitted, waits for a place, or has ended."""
        if key := request.submission.adapter:
            count_down(self._queued, key)
            self._settle(request)

    def on_admission(self, request: Request) -> None:
        if key := request.submission.adapter:
            self._running[key] += 1
            if key in self._loaded:
                self._loaded.move_to_end(key)

    def on_leave(self, request: Request) -> None:
        """A running request has ended or was preempted."""
        if key := request.submission.adapter:
            count_down(self._running, key)

    def stop_running(self) -> None:
        """No request runs any more."""
        self._running.clear()

    # -- reading ahead -------------------------------------------------------------------------

    def next_read(self) -> str | None:
        """A version to be read ahead; it counts as being read from now on."""
        if not self._waits or len(self._reading) + len(self._read) >= MAX_READ_AHEAD:
            return None
        there = self._loaded.keys() | self._read | self._reading | self._lost.keys()
        key = min((key for key in self._waits if key not in there), key=self._best_rank, default=None)
        if key is not None:
            self.begin_read(key)
        return key

    def begin_read(self, key: str) -> bool:
        """Note that a version is being read; False where it is loaded, read or being read already."""
        if key in self._loaded or key in self._read or key in self._reading:
            return False
        self._reading.add(key)
        return True

    def end_read(self, key: str) -> None:
        """A version was read."""
        self._reading.discard(key)
        if key in self._added:
            self._read.add(key)

    def forget_read(self, key: str) -> None:
        """Note that what was read of a version is lost: it is to be read again."""
        self._reading.discard(key)
        self._read.discard(key)

    @property
    def unwanted(self) -> list[str]:
        """Versions that were read and that no request waits for any more."""
        return [key for key in self._read if key not in self._waits]

    @property
    def reads(self) -> bool:
        """True while some version is being read, and until then none can be loaded."""
        return bool(self._reading) and not self._lost and not self._recalled and self.next_load() is None

    # -- loads ---------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """True if a version could be loaded now, into a free place or one that is not used."""
        return len(self._loaded) < self._most or self._unused() is not None

    def next_load(self) -> str | None:
        """The next version to be given a place, and there is one for it."""
        return next((key for key in self._by_rank(self._read) if self._has_place(key)), None)

    def make_room(self, key: str) -> str | None:
        """Free a place for `key`, which can have one, where none is free. Returns the version that has given it up."""
        if len(self._loaded) < self._most:
            return None
        victim = self._given_up(key) or self._unused()
        assert victim is not None, "there is no place"
        del self._loaded[victim]
        self._promised.pop(victim, None)
        return victim

    def load(self, key: str) -> None:
        """Give a version that was read a free place, and recall the requests that waited for it."""
        self._read.discard(key)
        self._loaded[key] = None
        self._break_promise(key)
        self._recall(key)

    def promise_places(self) -> list[str]:
        """Promise a place that is in use to each version that was read and has waited too long. Returns the versions
        that have them, whose queued requests must wait from now on."""
        if not self._read:
            return []
        late = self._clock() - self._max_wait
        found: list[str] = []
        for key in self._by_rank(self._read):
            if self._waits[key].since > late or key in self._promised.values():
                continue
            candidates = [one for one in self._loaded if self.may_lose(one)]
            if not candidates:
                break
            found.append(min(candidates, key=lambda one: self._running[one] + self._queued[one]))
            self.promise(found[-1], key)
        return found

    @property
    def first_without_place(self) -> Request | None:
        """The best ranked request whose version was read and has no place, nor a promise of one."""
        for key in self._by_rank(self._read):
            if key not in self._promised.values():
                return min(self._waits[key].requests.values(), key=self._rank)
        return None

    def may_lose(self, key: str) -> bool:
        """True if the place of a version may be promised to another one."""
        return key in self._loaded and key not in self._promised and key not in self._due

    def promise(self, key: str, heir: str) -> None:
        """Let `heir` have the place of `key` when nothing runs on it any more. Requests for `key` must wait from now
        on."""
        self._promised[key] = heir

    def _by_rank(self, keys: Container[str]) -> list[str]:
        """Those of the versions that requests wait for, by the best rank of their requests and then by age."""
        return sorted((key for key in self._waits if key in keys), key=self._best_rank) if keys else []

    def _best_rank(self, key: str) -> float:
        return min(map(self._rank, self._waits[key].requests.values()))

    def _has_place(self, key: str) -> bool:
        return len(self._loaded) < self._most or bool(self._given_up(key) or self._unused())

    def _given_up(self, key: str) -> str | None:
        """The version that `key` was promised the place of, if nothing runs on it any more."""
        return next((one for one, heir in self._promised.items() if heir == key and not self._running[one]), None)

    def _unused(self) -> str | None:
        """The version with a place that is unused for longest."""
        for key in self._loaded:
            if not (self._running[key] or self._queued[key] or key in self._due or key in self._promised):
                return key
        return None

    def _recall(self, key: str) -> None:
        """Let the requests that wait for a loaded version be queued."""
        if (wait := self._waits.pop(key, None)) is not None:
            self._recalled |= wait.requests
            self._due[key] = set(wait.requests)

    def _break_promise(self, key: str) -> None:
        """`key` does not need the place that it was promised: the version that has it goes on."""
        for loaded in [one for one, heir in self._promised.items() if heir == key]:
            del self._promised[loaded]
            self._recall(loaded)

    def _settle(self, request: Request) -> None:
        """A request that waited for its version is admitted, or has ended."""
        key = request.submission.adapter
        if (due := self._due.get(key)) is not None:
            due.discard(request.id)
            if not due:
                del self._due[key]

    def check_integrity(self) -> None:
        """Raise `AssertionError` when places and requests disagree."""
        assert len(self._loaded) <= self._most, "more versions are loaded than there are places"
        assert self._loaded.keys() <= self._added, "an unknown version has a place"
        assert not self._read & self._loaded.keys(), "a version is loaded twice"
        assert self._promised.keys() <= self._loaded.keys(), "a place is promised that is not there"
        assert all(wait.requests for wait in self._waits.values()), "a wait without requests"
        assert self._num_waiting == len([*self]), "requests that wait for a place are miscounted"
        lost = [key for key in self._waits if self.admits(key) and key not in self._lost]
        assert not lost, "a request waits for a version that is loaded"
