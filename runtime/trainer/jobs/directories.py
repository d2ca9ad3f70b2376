"""Where the files of jobs are, and how a directory comes into being whole or not at all."""

import os
import shutil
from pathlib import Path

from runtime.durable import sync_directory
from runtime.failpoints import failpoint
from runtime.trainer.jobs.ports import Snapshot

_PARTIAL = ".partial"


class JobDirectories:
    """The folders under one state directory. Paths are cheap; everything else blocks."""

    def __init__(self, state_directory: Path) -> None:
        self.root = state_directory / "jobs"

    def uploads(self, job_id: str) -> Path:
        return self.root / job_id / "uploads"

    def log(self, job_id: str) -> Path:
        return self.root / job_id / "log.jsonl"

    def checkpoint(self, job_id: str, step: int) -> Path:
        return self.root / job_id / "checkpoints" / f"step-{step}"

    def result(self, job_id: str) -> Path:
        return self.root / job_id / "result"

    def discard(self, job_id: str) -> None:
        """Delete whatever the job has on disk."""
        shutil.rmtree(self.root / job_id, ignore_errors=True)

    def sweep(self, kept: dict[str, tuple[set[int], bool]]) -> dict[str, list[int]]:
        """Delete what no row tells of: jobs, checkpoints and results that were begun and never committed.

        Returns, by job, the steps whose rows have no directory any more.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in self.root.iterdir():
            if folder.name not in kept:
                _delete(folder)
        missing: dict[str, list[int]] = {}
        for job_id, (steps, has_result) in kept.items():
            wanted = {self.checkpoint(job_id, step).name for step in steps}
            present = self.root / job_id / "checkpoints"
            for folder in present.iterdir() if present.is_dir() else ():
                if folder.name not in wanted:
                    _delete(folder)
            for leftover in (self.root / job_id).glob(f"*{_PARTIAL}"):
                _delete(leftover)
            if not has_result:
                _delete(self.result(job_id))
            lost = [step for step in sorted(steps) if not self.checkpoint(job_id, step).is_dir()]
            if lost:
                missing[job_id] = lost
        return missing


def write_snapshot(snapshot: Snapshot, directory: Path) -> None:
    """Write a snapshot as `directory`, so that whoever finds that name finds all of it, even after a crash.

    What was there under that name, of a writer that came to no commit, is replaced. Raises `OSError`.
    """
    partial = directory.with_name(directory.name + _PARTIAL)
    failpoint("checkpoint.before_write")
    _delete(partial)
    _delete(directory)
    partial.mkdir(parents=True)
    try:
        snapshot.write(partial)
        failpoint("checkpoint.after_write")
        for folder, _, _ in os.walk(partial):
            sync_directory(Path(folder))
        failpoint("checkpoint.after_sync")
        partial.rename(directory)
        failpoint("checkpoint.after_rename")
        sync_directory(directory.parent)
        sync_directory(directory.parent.parent)
        failpoint("checkpoint.after_parent_sync")
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # room, on a disk that is full
        raise


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
