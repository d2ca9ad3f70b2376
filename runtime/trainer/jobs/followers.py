"""Followers of the stored events of jobs: clients that wait for them, and the log and record in a job's folder."""

import asyncio
import contextlib
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import msgspec

from runtime.errors import StorageUnavailable
from runtime.support.durable import PRIVATE_FILE, make_directory, replace_file
from runtime.support.threads import WorkerThread
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.records import Job, JobEvent, JobRecord
from runtime.trainer.jobs.rows import JobReader

# -- waiting clients -------------------------------------------------------------------------------
#
# Wakes the waiters for events of a job. Holds no events: those are in the store, in order and numbered.


class EventFeed:
    """Event loop only."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._changes: Counter[str] = Counter()
        self.count = 0
        """Changes of all jobs so far."""
        self.closed = False

    def touch(self, job_id: str) -> None:
        """Wake the waiters: something new of this job is stored."""
        self._changes[job_id] += 1
        self.count += 1
        for future in self._waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(None)

    def changes(self, job_id: str) -> int:
        """Number of changes of this job so far."""
        return self._changes[job_id]

    def close(self) -> None:
        """Wake all, for the last time."""
        self.closed = True
        for job_id in list(self._waiting):
            self.touch(job_id)

    def ticket(self, job_id: str) -> "asyncio.Future[None]":
        """Done with the first change from now on: taken before a look into the store, so that nothing is missed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.closed:
            future.set_result(None)
        else:
            self._waiting[job_id].add(future)
            future.add_done_callback(lambda _: self._drop(job_id, future))
        return future

    async def until(self, ticket: "asyncio.Future[None]", timeout: float) -> bool:
        """Wait for a ticket. False after `timeout` seconds without a change. The ticket is used up."""
        done, _ = await asyncio.wait((ticket,), timeout=timeout)
        ticket.cancel()
        return bool(done)

    def _drop(self, job_id: str, future: "asyncio.Future[None]") -> None:
        waiting = self._waiting.get(job_id)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._waiting[job_id]


# -- tail ------------------------------------------------------------------------------------------
#
# The newest events of the jobs that are followed: read once for all followers of a job.

MAX_JOBS = 16
"""Jobs whose newest events are kept at once."""
MAX_EVENTS = 1000
"""Most events of each that are kept: readers further behind query by themselves until they have caught up."""


@dataclass(eq=False)
class _Window:
    """The newest events of one job."""

    job: Job
    last: int
    """Number of the newest event that was read."""
    change: int
    """The job's changes that it includes, as the feed counts them."""
    events: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def holds(self, number: int) -> bool:
        """True where all events above `number` are in it."""
        return number >= (self.events[0].number - 1 if self.events else self.last)


class EventTail:
    """Event loop only."""

    def __init__(self, reader: JobReader, feed: EventFeed) -> None:
        self._reader = reader
        self._feed = feed
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    async def events(self, job_id: str, *, after: int, limit: int) -> tuple[Job, list[JobEvent]]:
        """As `JobReader.events`: one query for any number of readers that have read as far. Raises `NotFound`."""
        window = self._windows.get(job_id)
        if window is None or not window.holds(after):
            change = self._feed.changes(job_id)
            job, events = await self._reader.events(job_id, after=after, limit=limit)
            if len(events) < limit and job_id not in self._windows:
                last = events[-1].number if events else after
                self._keep(job_id, _Window(job, last, change, deque(events, MAX_EVENTS)))
            return job, events
        async with window.lock:
            while window.change != (change := self._feed.changes(job_id)):
                job, events = await self._reader.events(job_id, after=window.last, limit=limit)
                window.job = job
                window.events.extend(events)
                if events:
                    window.last = events[-1].number
                if len(events) < limit:
                    window.change = change
        self._keep(job_id, window)
        if not window.holds(after):  # more came at once than are kept
            return await self._reader.events(job_id, after=after, limit=limit)
        newer = takewhile(lambda event: event.number > after, reversed(window.events))
        return window.job, list(newer)[::-1][:limit]

    def forget(self, job_id: str) -> None:
        """Drop the events of a deleted job."""
        self._windows.pop(job_id, None)

    def _keep(self, job_id: str, window: _Window) -> None:
        self._windows[job_id] = window
        self._windows.move_to_end(job_id)
        while len(self._windows) > MAX_JOBS:
            self._windows.popitem(last=False)


# -- log and record --------------------------------------------------------------------------------
#
# In a job's folder: its events as JSON lines, for people and `tail -f`, and a copy of its row. Made from the stored
# rows, a little behind them. A disk that takes none now may get them later; the run continues.

MAX_TAIL = 1024 * 1024
"""Bytes of a log that one answer may have."""

_BATCH = 1000
"""Events that are written at once."""


class Journal:
    """Writes the logs and records of jobs that were touched. Event loop only."""

    def __init__(
        self,
        reader: JobReader,
        directories: JobDirectories,
        disk: WorkerThread,
        on_event: Callable[[str, JobEvent], None] = lambda job_id, event: None,
    ) -> None:
        """`on_event` gets the id of its job and each event that is not in the log yet, in order and once."""
        self._reader = reader
        self._directories = directories
        self._disk = disk
        self._on_event = on_event
        self._written: dict[str, int] = {}
        """Job → number of the last event in its log."""
        self._told: dict[str, int] = {}
        """Job → number of the last event that `on_event` got, or that was in the log before."""
        self._dirty: set[str] = set()
        self._outdated: set[str] = set()
        """Jobs whose records differ from their rows."""
        self._at_work: str | None = None
        """The job whose events are being read, unless it was discarded meanwhile."""
        self._wake = asyncio.Event()

    def touch(self, job_id: str, *, record: bool = False) -> None:
        """Note that there are new events of this job; with `record`, its row may have changed too."""
        self._dirty.add(job_id)
        if record:
            self._outdated.add(job_id)
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            with contextlib.suppress(StorageUnavailable):
                await self.flush()

    async def flush(self) -> None:
        """Write what is new, as far as the disk takes it."""
        while self._dirty:
            job_id = self._at_work = self._dirty.pop()
            try:
                await self._write_log(job_id)
                if job_id in self._outdated:
                    await self._write_record(job_id)
            except BaseException:  # the next flush looks into the log, behind the write that may be under way
                if self._at_work == job_id:
                    self._written.pop(job_id, None)
                    self._dirty.add(job_id)
                    self._outdated.add(job_id)
                raise

    async def _write_log(self, job_id: str) -> None:
        path = self._directories.log(job_id)
        if job_id not in self._written:
            self._written[job_id] = await self._disk.call(mend, path)
            self._told.setdefault(job_id, self._written[job_id])
        events = await self._reader.events_after(job_id, self._written[job_id], _BATCH)
        wanted = bool(events) and self._at_work == job_id
        if wanted:
            for event in events:  # before the write, after which this may be cancelled
                if event.number > self._told[job_id]:
                    self._told[job_id] = event.number
                    self._on_event(job_id, event)
        if wanted and await self._disk.call(append, path, events):
            self._written[job_id] = events[-1].number
            self._dirty.add(job_id)  # there may be more than a batch

    async def _write_record(self, job_id: str) -> None:
        self._outdated.discard(job_id)
        record = await self._reader.record(job_id)
        if record is None or self._at_work != job_id:
            return
        if not await self._disk.call(write_record, self._directories.record(job_id), record):
            self._outdated.add(job_id)

    async def discard(self, job_id: str) -> None:
        """Delete all that a job without a row has on disk, after the write that is under way."""
        self._leave(job_id)
        await self._disk.call(self._directories.discard, job_id)

    async def refuse(self, job_id: str) -> None:
        """Mark a job as refused whose row cannot be deleted now: the next process is not to take it for one."""
        self._leave(job_id)
        await self._disk.call(self._directories.refuse, job_id)

    def _leave(self, job_id: str) -> None:
        self._dirty.discard(job_id)
        self._outdated.discard(job_id)
        self._written.pop(job_id, None)
        self._told.pop(job_id, None)
        if self._at_work == job_id:
            self._at_work = None


def write_record(path: Path, record: JobRecord) -> bool:
    """Write a job's record. False where the disk does not take it."""
    try:
        make_directory(path.parent)
        replace_file(path, msgspec.json.encode(record))
    except OSError:
        return False
    return True


def append(path: Path, events: Iterable[JobEvent]) -> bool:
    """Add a line for each event. False where the disk does not take them: none of them is there then."""
    text = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    try:
        make_directory(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError:
        return False
    with open(descriptor, "ab", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        try:
            written = file.write(text)
        except OSError:
            written = 0
        if written != len(text):
            file.truncate(size)
    return written == len(text)


def tail(path: Path, lines: int) -> bytes:
    """The last `lines` whole lines, and of them no more than `MAX_TAIL` bytes. Nothing where there is no log."""
    text, _ = _last_lines(path)
    return b"".join(text.splitlines(keepends=True)[-lines:])


def mend(path: Path) -> int:
    """The number of the last whole event in a log, 0 where there is none; what is behind it, from a disk that was full
    or a process that was killed, is cut off."""
    text, start = _last_lines(path)
    while text:
        line_start = text.rfind(b"\n", 0, -1) + 1
        try:
            number = int(msgspec.json.decode(text[line_start:])["number"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            text = text[:line_start]
        else:
            _cut(path, start + len(text))
            return number
    _cut(path, 0)
    return 0


def _last_lines(path: Path) -> tuple[bytes, int]:
    """The whole lines at the end of a log, at most `MAX_TAIL` bytes, and where in the file they start."""
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - MAX_TAIL)
            file.seek(start)
            text = file.read(MAX_TAIL)
    except FileNotFoundError:
        return b"", 0
    if start:
        first = text.find(b"\n") + 1
        text, start = text[first:], start + first
    return text[: text.rfind(b"\n") + 1], start  # the last line may be being written


def _cut(path: Path, size: int) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size > size:
            os.truncate(path, size)
