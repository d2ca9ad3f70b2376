"""The files that a batch writes: a line for each answer, appended and synced, read again after a crash.

The files are the only record of which requests were answered. A line counts once it is whole on the disk; a torn one
at the end is cut off when the files are opened again, and its request is answered anew.
"""

import asyncio
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from runtime.batches.records import Answer, BatchUsage, Counts, LineError
from runtime.support.durable import PRIVATE_FILE, make_directory, sync_directory
from runtime.support.event_loop import is_set_within
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger

RETRY_SECONDS = 5.0
"""Seconds between two tries to write, while the disk refuses."""

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
"""Names of the two files: of answers with a status of 200, and of all others."""

OK = 200

_log = get_logger("batches")


class LineResponse(Struct, frozen=True, kw_only=True):
    """`response` of an output line."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class OutputLine(Struct, frozen=True, kw_only=True):
    """One line of an output file, in OpenAI's form."""

    id: str
    custom_id: str | None
    response: LineResponse | None
    error: LineError | None


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(Struct):
    """The usage of an answer of any endpoint: responses have other names than the rest."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(Struct):
    usage: _Usage | None = None


class _Response(Struct):
    body: _Body


class _Answered(Struct):
    custom_id: str | None
    response: _Response | None = None


_answered = msgspec.json.Decoder(_Answered)


def answer_line(custom_id: str, answer: Answer) -> bytes:
    """Output line of a request that was answered, whatever its status."""
    response = LineResponse(
        status_code=answer.status, request_id=answer.request_id, body=msgspec.Raw(answer.body.strip())
    )
    return _encode(OutputLine(id=_new_id(), custom_id=custom_id, response=response, error=None))


def error_line(custom_id: str | None, error: LineError) -> bytes:
    """Output line of a request that could not be asked."""
    return _encode(OutputLine(id=_new_id(), custom_id=custom_id, response=None, error=error))


def _encode(line: OutputLine) -> bytes:
    encoded = msgspec.json.encode(line)
    # Line breaks between values, which JSON allows, would end the line.
    return (msgspec.json.format(encoded, indent=-1) if b"\n" in encoded else encoded) + b"\n"


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


class AppendedFile:
    """One file, appended to. Blocks; for threads."""

    def __init__(self, path: Path) -> None:
        """Open or create it, and cut off a torn line. Raises `OSError`."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        self.size = 0
        """Bytes that are whole and synced."""
        self.custom_ids: list[str] = []
        """Ids of the requests that were answered before."""
        self.usage = BatchUsage()
        """Tokens of all answers."""
        self._read()

    def append(self, lines: list[bytes]) -> None:
        """Append lines, and sync them. Raises `OSError`: then none of them is there."""
        data = b"".join(lines)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self.size + written)
            failpoint("batches.before_sync", self.path.name)
            os.fsync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)
        for line in lines:
            _add_usage(self.usage, _answered.decode(line))

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self) -> None:
        for line in self._lines():
            try:
                answered = _answered.decode(line)
            except msgspec.MsgspecError:  # written in part when the power failed
                break
            if answered.custom_id is not None:
                self.custom_ids.append(answered.custom_id)
            _add_usage(self.usage, answered)
            self.size += len(line)
        os.ftruncate(self._descriptor, self.size)

    def _lines(self) -> Iterator[bytes]:
        """The whole lines, with their ends."""
        with open(self.path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line


def _add_usage(total: BatchUsage, answered: _Answered) -> None:
    if answered.response is None or (usage := answered.response.body.usage) is None:
        return
    total.input_tokens += usage.prompt_tokens + usage.input_tokens
    total.output_tokens += usage.completion_tokens + usage.output_tokens
    total.total_tokens = total.input_tokens + total.output_tokens
    for read in (usage.prompt_tokens_details, usage.input_tokens_details):
        total.input_tokens_details.cached_tokens += (read and read.cached_tokens) or 0
    for written in (usage.completion_tokens_details, usage.output_tokens_details):
        total.output_tokens_details.reasoning_tokens += (written and written.reasoning_tokens) or 0


class _Waiting(NamedTuple):
    custom_id: str | None
    line: bytes
    synced: asyncio.Future[None]


class BatchOutput:
    """Both files of a batch. Lines that arrive together are synced together. Event loop only."""

    def __init__(self, folder: Path) -> None:
        self.answered: set[str] = set()
        """Custom ids of the requests whose answers are on the disk."""
        self.counts = Counts()
        """Numbers of these requests; the total is the caller's."""
        self._folder = folder
        self._files: dict[str, AppendedFile] = {}
        self._waiting: dict[str, list[_Waiting]] = {OUTPUT: [], ERRORS: []}
        self._writing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def open(self) -> None:
        """Open the files, and take in what was answered before. Raises `OSError`."""
        await asyncio.to_thread(self._open)
        for name, file in self._files.items():
            self._count(name, *file.custom_ids)

    def _open(self) -> None:
        make_directory(self._folder)
        for name in (OUTPUT, ERRORS):
            self._files[name] = AppendedFile(self._folder / name)
        sync_directory(self._folder)

    @property
    def usage(self) -> BatchUsage:
        """Tokens of the answers on the disk."""
        return self._files[OUTPUT].usage if OUTPUT in self._files else BatchUsage()

    def size(self, name: str) -> int:
        return self._files[name].size

    async def add(self, name: str, custom_id: str | None, line: bytes) -> None:
        """Append a line to the file `name`, which answers the request `custom_id`, and return once it is synced.

        Tries again while the disk refuses. Where the caller is cancelled the line is written all the same, unless the
        output is closed before.
        """
        synced = asyncio.get_running_loop().create_future()
        self._waiting[name].append(_Waiting(custom_id, line, synced))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        await synced

    async def _write(self) -> None:
        while any(self._waiting.values()):
            for name, waiting in self._waiting.items():
                if not waiting:
                    continue
                self._waiting[name] = []
                try:
                    await asyncio.to_thread(self._files[name].append, [one.line for one in waiting])
                except OSError as error:
                    self._waiting[name] = waiting + self._waiting[name]
                    _log.error("batch_output_not_written", file=name, reason=error.strerror)
                    if await is_set_within(self._closing, RETRY_SECONDS):
                        return
                    continue
                self._count(name, *(one.custom_id for one in waiting if one.custom_id is not None))
                for one in waiting:
                    if not one.synced.done():
                        one.synced.set_result(None)

    async def settle(self) -> None:
        """Return when nothing is waiting to be written."""
        if self._writing is not None:
            await asyncio.gather(self._writing)

    def _count(self, name: str, *custom_ids: str) -> None:
        self.answered.update(custom_ids)
        if name == OUTPUT:
            self.counts.completed += len(custom_ids)
        else:
            self.counts.failed += len(custom_ids)

    async def close(self) -> None:
        """Write what is waiting, unless the disk refuses, and close the files."""
        self._closing.set()
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        for file in self._files.values():
            file.close()
