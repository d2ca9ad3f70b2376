"""Checkpoints of jobs: on disk first, then in the database, and no more of them than the recipe allows."""

import shutil
from pathlib import Path

from runtime.failpoints import failpoint
from runtime.trainer.jobs.directories import JobDirectories, write_snapshot
from runtime.trainer.jobs.ports import Snapshot
from runtime.trainer.jobs.records import Checkpoint, Job
from runtime.trainer.jobs.store import JobStore
from runtime.trainer.jobs.threads import Worker


class Checkpoints:
    """Writes, finds and prunes them. One thread does the writing, so that the database stays free."""

    def __init__(self, store: JobStore, directories: JobDirectories, disk: Worker) -> None:
        self._store = store
        self._directories = directories
        self._disk = disk

    async def has(self, job_id: str, step: int) -> bool:
        """Whether that step has one."""
        return any(known.step == step for known in await self._store.checkpoints(job_id))

    async def save(self, job_id: str, step: int, snapshot: Snapshot, *, best: bool, limit: int | None) -> None:
        """Write one and commit its row, then drop the oldest beyond `limit`: never the newest, never the best.

        Only for a step that has none. Raises `OSError` and `StorageUnavailable`; what was there before is there
        still.
        """
        await self._disk.call(write_snapshot, snapshot, self._directories.checkpoint(job_id, step))
        await self._store.add_checkpoint(job_id, step, best=best)
        failpoint("checkpoint.after_commit")
        await self._prune(job_id, limit)

    async def save_result(self, job_id: str, step: int, snapshot: Snapshot, reason: str) -> Job:
        """The same for what a finished run made; with the commit the job is evaluating."""
        await self._disk.call(write_snapshot, snapshot, self._directories.result(job_id))
        job = await self._store.set_result(job_id, step, reason)
        failpoint("checkpoint.after_commit")
        return job

    async def newest(self, job_id: str) -> Path | None:
        """The directory to resume from."""
        known = await self._store.checkpoints(job_id)
        return self._directories.checkpoint(job_id, known[-1].step) if known else None

    async def _prune(self, job_id: str, limit: int | None) -> None:
        known = await self._store.checkpoints(job_id)
        dropped = [] if limit is None else surplus(known, max(1, limit))
        if not dropped:
            return
        await self._store.drop_checkpoints(job_id, dropped)
        failpoint("checkpoint.after_drop")
        for step in dropped:
            await self._disk.call(shutil.rmtree, self._directories.checkpoint(job_id, step), True)


def surplus(known: list[Checkpoint], limit: int) -> list[int]:
    """The steps to drop, oldest first, so that `limit` are left: or one more, where the best is old."""
    droppable = [checkpoint.step for checkpoint in known[:-1] if not checkpoint.best]
    return droppable[: max(0, len(known) - limit)]
