"""All batches of a server: created, listed, cancelled, and run until they have ended. Event loop only."""

import asyncio
import copy
import secrets
import time
from pathlib import Path

from msgspec.structs import replace

from runtime.batches.records import FOLDER, Ask, Batch
from runtime.batches.run import BatchRun, write_record
from runtime.batches.store import BatchStore
from runtime.files.library import FileLibrary
from runtime.support.database import Database
from runtime.support.durable import make_directory, reason
from runtime.support.event_loop import cancel
from runtime.support.logs import get_logger
from runtime.support.state_directory import LostFound
from settings.api import FileSettings

_log = get_logger("batches")


def new_batch_id() -> str:
    """A new random id of a batch."""
    return f"batch_{secrets.token_hex(12)}"


class BatchManager:
    """Owns the runs. Batches begin in the order in which they were created, and take turns at the slots."""

    def __init__(
        self, database: Database, directory: Path, files: FileLibrary, settings: FileSettings, *, max_line: int
    ) -> None:
        """`directory`: the state directory. `max_line`: bytes of a line, those of the largest request body."""
        self.store = BatchStore(database)
        self._directory = directory
        self._files = files
        self._settings = settings
        self._max_line = max_line
        self._slots = asyncio.Semaphore(settings.batch_concurrency)
        self._ask: Ask | None = None
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}

    # -- life ----------------------------------------------------------------------------------

    async def start(self, ask: Ask) -> None:
        """Continue what the last process left, by asking `ask`. Raises `OSError`, `StorageUnavailable`."""
        self._ask = ask
        await asyncio.to_thread(self._sweep, await self.store.ids())
        for batch in await self.store.unfinished():
            self._begin(batch)

    async def stop(self) -> None:
        """Stop all runs; the next process continues them. Any number of times."""
        self._ask = None
        await cancel(*(task for _, task in self._runs.values()))

    def _sweep(self, known: set[str]) -> None:
        """Move folders without a row to lost+found."""
        folder, lost = self._directory / FOLDER, LostFound(self._directory)
        make_directory(folder)
        for path in sorted(folder.iterdir()):
            if path.name not in known:
                lost.keep(path)

    def _begin(self, batch: Batch) -> None:
        if self._ask is None:  # the server is stopping: the next process begins it
            return
        run = BatchRun(
            batch,
            self.store,
            self._files,
            self._directory,
            self._settings,
            ask=self._ask,
            slots=self._slots,
            max_line=self._max_line,
        )
        task = asyncio.create_task(run.run())
        self._runs[batch.id] = run, task
        task.add_done_callback(lambda task: self._ended(batch.id, task))

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._runs.pop(batch_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("batch_run_failed", batch=batch_id, exc_info=error)

    # -- requests ------------------------------------------------------------------------------

    async def create(
        self,
        *,
        owner: str,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_seconds: int,
        metadata: dict[str, str] | None,
        output_lifetime: int | None,
    ) -> Batch:
        """Store a batch, and begin to check its input. Raises `NotFound`, `Conflict`, `TooManyRequests`,
        `PayloadTooLarge` where there is no room for output, `StorageUnavailable`."""
        self._files.require_room()
        created = int(time.time())
        batch = Batch(
            id=new_batch_id(),
            owner=owner,
            status="validating",
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            metadata=metadata,
            output_lifetime=output_lifetime,
            created_at=created,
            expires_at=created + window_seconds,
        )
        await self.store.create(batch, max_unfinished=self._settings.max_batches)
        try:
            await asyncio.to_thread(write_record, self._directory / FOLDER / batch.id, batch)
        except OSError as error:  # the run writes it once the disk takes it
            _log.warning("batch_record_not_written", batch=batch.id, reason=reason(error))
        self._begin(batch)
        return batch

    async def cancel(self, batch_id: str, owner: str | None) -> Batch:
        """Stop a batch; what is answered stays. Raises `NotFound`, and `Conflict` for one that cannot be cancelled."""
        batch = await self.store.cancel(batch_id, owner)
        if batch_id in self._runs:
            self._runs[batch_id][0].cancel()
        return self.current(batch)

    async def due(self) -> list[str]:
        """Ids of the batches that `prune` would delete."""
        keep = self._settings.keep_batches
        return [] if keep is None else await self.store.due(keep)

    async def prune(self) -> list[str]:
        """Delete the batches that ended longer ago than the setting says, with the files that they wrote. Raises
        `StorageUnavailable`."""
        keep = self._settings.keep_batches
        if keep is None:
            return []
        ids, gone = await self.store.prune(keep)
        self._files.dropped(*gone)
        await self._files.finish_deleting()
        return ids

    def current(self, batch: Batch) -> Batch:
        """The row with the counts and the usage of now."""
        if batch.id not in self._runs or batch.ended:
            return batch
        run = self._runs[batch.id][0]
        counts = run.counts
        return replace(
            batch, total=counts.total, completed=counts.completed, failed=counts.failed, usage=copy.deepcopy(run.usage)
        )
