"""A job's log: its events as a file of JSON lines, for people and `tail -f`.

Made from what is stored, a little behind it. A disk that takes no lines now may get them later; the run goes on.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from runtime.errors import StorageUnavailable
from runtime.trainer.jobs.directories import JobDirectories
from runtime.trainer.jobs.reading import JobReader
from runtime.trainer.jobs.records import JobEvent
from runtime.trainer.jobs.threads import Worker

MAX_TAIL = 1024 * 1024
"""Bytes of a log that one answer may have."""

_BATCH = 1000
"""Events that are written at once."""


class Journal:
    """Writes the logs of the jobs that it is told of. Event loop only."""

    def __init__(self, reader: JobReader, directories: JobDirectories, disk: Worker) -> None:
        self._reader = reader
        self._directories = directories
        self._disk = disk
        self._written: dict[str, int] = {}
        """Job → number of the last event in its log."""
        self._dirty: set[str] = set()
        self._at_work: str | None = None
        """The job whose events are being read, unless it was discarded meanwhile."""
        self._wake = asyncio.Event()

    def touch(self, job_id: str) -> None:
        """There are new events of this job."""
        self._dirty.add(job_id)
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
            path = self._directories.log(job_id)
            if job_id not in self._written:
                self._written[job_id] = await self._disk.call(last_number, path)
            events = await self._reader.events_after(job_id, self._written[job_id], _BATCH)
            wanted = bool(events) and self._at_work == job_id
            if wanted and await self._disk.call(append, path, events):
                self._written[job_id] = events[-1].number
                self._dirty.add(job_id)  # there may be more than a batch

    async def discard(self, job_id: str) -> None:
        """Delete whatever a job has on disk whose row is gone, after what is being written of it."""
        self._dirty.discard(job_id)
        self._written.pop(job_id, None)
        if self._at_work == job_id:
            self._at_work = None
        await self._disk.call(self._directories.discard, job_id)


def append(path: Path, events: Iterable[JobEvent]) -> bool:
    """Add a line for each event. False where the disk does not take them."""
    text = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text)
    except OSError:
        return False
    return True


def tail(path: Path, lines: int) -> bytes:
    """The last `lines` whole lines, and of them no more than `MAX_TAIL` bytes. Nothing where there is no log."""
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - MAX_TAIL)
            file.seek(start)
            text = file.read(MAX_TAIL)
    except FileNotFoundError:
        return b""
    if start:
        text = text.partition(b"\n")[2]
    text = text[: text.rfind(b"\n") + 1]  # a line may be being written
    return b"".join(text.splitlines(keepends=True)[-lines:])


def last_number(path: Path) -> int:
    """Of the last event in a log; 0 where there is none."""
    last = tail(path, 1)
    try:
        return int(msgspec.json.decode(last)["number"]) if last else 0
    except (msgspec.DecodeError, KeyError, TypeError):  # half a line, from a disk that was full
        return 0
