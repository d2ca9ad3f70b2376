"""One batch from its validation to its end. Where the process dies, the next one continues from the output files."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from runtime.batches.lines import NumberedLine, check_file, requests_of
from runtime.batches.output import ERRORS, OK, OUTPUT, BatchOutput, answer_line, error_line
from runtime.batches.records import (
    FOLDER,
    MAX_LISTED_ERRORS,
    RECORD,
    STAMPED,
    Answer,
    Ask,
    Batch,
    BatchRecord,
    BatchUsage,
    Counts,
    LineError,
    State,
)
from runtime.batches.store import BatchStore
from runtime.errors import Conflict, StorageUnavailable
from runtime.files.library import FileLibrary, new_file_id
from runtime.files.store import BATCH_OUTPUT, StoredFile
from runtime.support.durable import make_directory, remove, replace_file
from runtime.support.event_loop import cancel
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from settings.api import FileSettings

RETRY_SECONDS = 5.0
"""Seconds after which a batch continues that the disk or the database has stopped."""

TOO_MANY, UNAVAILABLE = 429, 503
MAX_UNAVAILABLE = 30
"""Tries of one request that is answered 503, over about a quarter of an hour. One that is answered 429 waits on."""
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
"""Bounds of the pause between two tries of a request."""

CHUNK_LINES, CHUNK_BYTES = 64, 1024 * 1024
"""Most lines, and bytes after which no more are added, of what is read from the input at once."""

INTERNAL_ERROR = LineError(code="internal_error", message="An internal error ended the batch.")

EXPIRED = LineError(
    code="batch_expired", message="This request could not be executed before the completion window expired."
)

_log = get_logger("batches")


class BatchRun:
    """The execution of one batch. Event loop only."""

    def __init__(
        self,
        batch: Batch,
        store: BatchStore,
        files: FileLibrary,
        directory: Path,
        settings: FileSettings,
        *,
        ask: Ask,
        slots: asyncio.Semaphore,
        max_line: int,
    ) -> None:
        """`directory`: the state directory. `slots`: shared by all batches, one for each request under way.
        `max_line`: bytes of one line."""
        self.batch = batch
        self._total = batch.total
        self._store = store
        self._files = files
        self._folder = directory / FOLDER / batch.id
        self._settings = settings
        self._ask = ask
        self._slots = slots
        self._max_line = max_line
        self._output = BatchOutput(self._folder)
        self._cancelled = asyncio.Event()

    @property
    def counts(self) -> Counts:
        """Requests of the batch, as answered so far."""
        counts = self._output.counts
        return Counts(total=self._total, completed=counts.completed, failed=counts.failed)

    @property
    def usage(self) -> BatchUsage:
        """Tokens of the answers so far."""
        return self._output.usage

    def cancel(self) -> None:
        """Stop answering: the row says `cancelling` already."""
        self._cancelled.set()

    async def run(self) -> None:
        """Run to the end of the batch. Cancelled when the server stops: then the rows and files say how to go on."""
        while True:
            pause = 0.0
            try:
                await self._run()
            except Conflict:  # it was cancelled meanwhile
                pass
            except (StorageUnavailable, OSError) as error:
                pause = RETRY_SECONDS
                _log.error("batch_waits_for_the_disk", batch=self.batch.id, reason=str(error))
            except Exception:
                _log.exception("batch_failed", batch=self.batch.id)
                self.batch = await self._end("failed", errors=[INTERNAL_ERROR])
            if self.batch.ended:
                return
            await asyncio.sleep(pause)
            self.batch = await self._store.get(self.batch.id, None)
            self._output = BatchOutput(self._folder)

    async def _run(self) -> None:
        await self._output.open()
        try:
            await self._write_record(self.batch)
            if self.batch.status == "validating":
                self.batch = await self._validate()
            if self.batch.status == "in_progress":
                await self._answer_in_time()
            if self.batch.status == "finalizing":
                self.batch = await self._end("completed")
            elif self.batch.status == "cancelling":
                self.batch = await self._end("cancelled")
        finally:
            await self._output.close()

    # -- validation ----------------------------------------------------------------------------

    async def _validate(self) -> Batch:
        """Check the input. The batch is in progress, or failed, or was cancelled meanwhile."""
        file = await self._store.input_file(self.batch)
        found = await asyncio.to_thread(
            check_file,
            self._files.path(file),
            endpoint=self.batch.endpoint,
            max_lines=self._settings.max_batch_lines,
            max_bytes=self._max_line,
        )
        current = await self._store.get(self.batch.id, None)
        if current.status != "validating":
            return current
        self._total = found.total
        if not found.errors:
            return await self._store.move(current.id, "in_progress", total=found.total, model=found.model)
        if not self._output.size(ERRORS):  # else it was written before the process died
            for error in found.errors:
                await self._output.add(ERRORS, None, error_line(None, error))
        return await self._end("failed", errors=found.errors[:MAX_LISTED_ERRORS])

    # -- answers -------------------------------------------------------------------------------

    async def _answer_in_time(self) -> None:
        """Answer what is not answered, until that is done, the time is up, or the batch is cancelled."""
        answering = asyncio.create_task(self._answer_all())
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            left = max(0.0, self.batch.expires_at - time.time())
            await asyncio.wait((answering, cancelled), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done = answering.done()
            await cancel(answering, cancelled)
        if done:
            answering.result()  # raises what it has raised
            self.batch = await self._store.move(self.batch.id, "finalizing")
        elif self._cancelled.is_set():
            await self._output.settle()
            self.batch = await self._store.get(self.batch.id, None)
        else:
            await self._write_off()
            self.batch = await self._end("expired")

    async def _answer_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as under_way:
                async for line in self._unanswered():
                    await self._slots.acquire()
                    under_way.create_task(self._answer(line)).add_done_callback(lambda _: self._slots.release())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _answer(self, line: NumberedLine) -> None:
        answer = await self._ask_patiently(line)
        failpoint("batches.before_answer", line.custom_id)
        name = OUTPUT if answer.status == OK else ERRORS
        await self._output.add(name, line.custom_id, answer_line(line.custom_id, answer))

    async def _ask_patiently(self, line: NumberedLine) -> Answer:
        """The answer to a line. Tries again while the server has no room for it."""
        tries, pause = 0, MIN_PAUSE_SECONDS
        while True:
            answer = await self._ask(self.batch.endpoint, line.body, owner=self.batch.owner)
            tries += answer.status == UNAVAILABLE
            if answer.status not in (TOO_MANY, UNAVAILABLE) or tries >= MAX_UNAVAILABLE:
                return answer
            await asyncio.sleep(max(pause, min(answer.retry_after or 0.0, MAX_PAUSE_SECONDS)))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    async def _unanswered(self) -> AsyncIterator[NumberedLine]:
        """The lines without an answer, each once."""
        before = frozenset(self._output.answered)
        file = await self._store.input_file(self.batch)
        lines = requests_of(self._files.path(file), max_bytes=self._max_line)
        while chunk := await asyncio.to_thread(_chunk, lines):
            for line in chunk:
                if line.custom_id not in before:
                    yield line

    async def _write_off(self) -> None:
        """Write an error for each line that was not answered in time."""
        await self._output.settle()
        try:
            async for line in self._unanswered():
                await self._output.add(ERRORS, line.custom_id, error_line(line.custom_id, EXPIRED))
        except OSError as error:
            _log.error("batch_input_not_read", batch=self.batch.id, reason=str(error))

    # -- the end -------------------------------------------------------------------------------

    async def _end(self, to: State, errors: list[LineError] | None = None) -> Batch:
        """Make the written files visible, and the batch ended, in one transaction."""
        made: dict[str, StoredFile] = {}
        for name, column in ((OUTPUT, "output_file_id"), (ERRORS, "error_file_id")):
            if self._output.size(name):
                made[column] = self._stored(name)
            else:
                await asyncio.to_thread(remove, self._folder / name)
        outputs = list(made.values())
        counts = self._output.counts
        columns: dict[str, Any] = {
            STAMPED[to]: int(time.time()),
            "total": self._total,
            "completed": counts.completed,
            "failed": counts.failed,
            "usage": self._output.usage,
            **{column: file.id for column, file in made.items()},
            **({} if errors is None else {"errors": errors}),
        }
        # Before the row: a record of a batch that has ended is never the older of the two.
        await self._write_record(replace(self.batch, status=to, **columns), outputs)
        failpoint("batches.before_end", self.batch.id)
        batch = await self._store.end(self.batch.id, to, outputs, **columns)
        self._files.adopted(*outputs)
        return batch

    async def _write_record(self, batch: Batch, outputs: Sequence[StoredFile] = ()) -> None:
        await asyncio.to_thread(write_record, self._folder, batch, outputs)

    def _stored(self, name: str) -> StoredFile:
        created = int(time.time())
        return StoredFile(
            id=new_file_id(),
            owner=self.batch.owner,
            purpose=BATCH_OUTPUT,
            filename=f"{self.batch.id}_{name}",
            bytes=self._output.size(name),
            created_at=created,
            expires_at=self._files.expiry(created, self.batch.output_lifetime),
            path=f"{FOLDER}/{self.batch.id}/{name}",
        )


def write_record(folder: Path, batch: Batch, outputs: Sequence[StoredFile] = ()) -> None:
    """Write a copy of a batch's row, and of those of its files, to its folder. Blocks. Raises `OSError`."""
    make_directory(folder)
    record = msgspec.json.encode(BatchRecord(batch=batch, outputs=list(outputs)))
    replace_file(folder / RECORD, msgspec.json.format(record))


def _chunk(lines: Iterator[NumberedLine]) -> list[NumberedLine]:
    """The next lines, as many as fit a chunk; none at the end."""
    found: list[NumberedLine] = []
    size = 0
    for line in lines:
        found.append(line)
        size += len(line.body)
        if len(found) >= CHUNK_LINES or size >= CHUNK_BYTES:
            break
    return found
