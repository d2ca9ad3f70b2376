"""Requests to a library in a child process, which reads and writes JSON lines (see `openvino_child`)."""

import asyncio
import itertools
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from benchmarks.peers.peer import Size
from benchmarks.peers.process import READY_TIMEOUT, not_ready, running
from runtime.cli.loadgen import Sample


class Event(Struct):
    """A line of the child's."""

    ready: bool = False
    tokens: dict[int, int] = {}
    """New ones of each request."""
    ended: list[int] = []


class LinesDriver:
    """Gives out the child's events to the requests that wait for them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._ids = itertools.count()
        self._samples: dict[int, tuple[Sample, asyncio.Event]] = {}
        self._ended = False

    async def complete(self, prompt: list[int], output_len: int) -> Sample:
        sample, done = Sample(started=time.perf_counter(), prompt_tokens=len(prompt)), asyncio.Event()
        id = next(self._ids)
        self._samples[id] = sample, done
        if self._ended:
            self._fail_all()
            return sample
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode({"id": id, "prompt": prompt, "output_len": output_len}) + b"\n")
        await done.wait()
        sample.finished = time.perf_counter()
        return sample

    async def listen(self) -> None:
        """Until the child ends, which fails all requests that run."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            event, now = msgspec.json.decode(line, type=Event), time.perf_counter()
            for id, tokens in event.tokens.items():
                sample, _ = self._samples[id]
                sample.output_tokens += tokens
                sample.arrivals.append(now)
            for id in event.ended:
                self._samples.pop(id)[1].set()
        self._ended = True
        self._fail_all()

    def _fail_all(self) -> None:
        for sample, done in self._samples.values():
            sample.error = "the child process ended"
            done.set()


@asynccontextmanager
async def child(command: Sequence[str | Path], size: Size) -> AsyncIterator[LinesDriver]:
    """A child that has said that it is ready. Raises `PeerFailed`."""
    async with running(command, size, lines=True) as (process, log):
        await _until_ready(process, log)
        driver = LinesDriver(process)
        listener = asyncio.create_task(driver.listen())
        try:
            yield driver
        finally:
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener


async def _until_ready(process: Process, log: IO[bytes]) -> None:
    """Libraries print what they like before it; that is skipped."""
    assert process.stdout is not None
    with suppress(TimeoutError):
        async with asyncio.timeout(READY_TIMEOUT):
            async for line in process.stdout:
                with suppress(msgspec.DecodeError):
                    if msgspec.json.decode(line, type=Event).ready:
                        return
            await process.wait()
    raise not_ready(process, log)
