"""Paths of the files of jobs, and directories that are created as a whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.support.durable import PARTIAL, PRIVATE_DIRECTORY, make_directory, move, remove, sync_directory, write_file
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.state_directory import LostFound
from runtime.trainer.launched.agent_process import AGENT_FILE, end_left_behind

CHECKPOINT_RECORD = "checkpoint.json"
"""File in a checkpoint's and a result's folder: a copy of its row, in case the row is lost."""

PREPARED = "examples.bin"
LAUNCHED = "launched"
"""Folder of the files that the server and the ranks of a job on devices of its own exchange."""
ORIGIN = "origin"
"""Folder with a copy of the adapter that the job goes on from, beside PREPARED and for as long."""

_PARTIAL = ".partial"
_REFUSED = f"{PARTIAL}refused"

_log = get_logger("jobs")


class JobDirectories:
    """The folders under one state directory. Paths are cheap; everything else blocks."""

    def __init__(self, state_directory: Path) -> None:
        self._state = state_directory
        self.root = state_directory / "jobs"

    def folder(self, job_id: str) -> Path:
        return self.root / job_id

    def incoming(self, job_id: str) -> Path:
        """Folder of uploads that are still arriving; after a crash it is deleted, for it was never a job's."""
        return self.root / f"{job_id}{PARTIAL}uploads"

    def uploads(self, job_id: str) -> Path:
        return self.root / job_id / "uploads"

    def prepared(self, job_id: str) -> Path:
        """File with the job's tokenised examples, from the reading of its recipe to its end."""
        return self.root / job_id / PREPARED

    def launched(self, job_id: str) -> Path:
        """Folder of what the ranks of a launched job read and write, to its end."""
        return self.root / job_id / LAUNCHED

    def record(self, job_id: str) -> Path:
        """A copy of the job's row, from which the row can be made again."""
        return self.root / job_id / "job.json"

    def log(self, job_id: str) -> Path:
        return self.root / job_id / "log.jsonl"

    def checkpoint(self, job_id: str, step: int) -> Path:
        return self.root / job_id / "checkpoints" / f"step-{step}"

    def result(self, job_id: str) -> Path:
        return self.root / job_id / "result"

    def relative(self, path: Path) -> str:
        """The path as it is stored: below the state directory."""
        return str(path.relative_to(self._state))

    def take_in(self, job_id: str) -> None:
        """Make the files that have arrived the uploads of the job. Raises `OSError`."""
        if self.incoming(job_id).is_dir():
            move(self.incoming(job_id), self.uploads(job_id))

    def copy_uploads(self, job_id: str, other: str, names: Iterable[str]) -> None:
        """Make a job's uploads those of another that is arriving. Files never change, so one that can be linked is.
        Raises `OSError`."""
        target = self.incoming(other)
        for name in names:
            make_directory(target)
            source = self.uploads(job_id) / name
            try:
                os.link(source, target / name)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(source, target / name)
        if target.is_dir():
            sync_directory(target)

    def refuse(self, job_id: str) -> None:
        """Mark a job whose row could not be deleted as refused, as far as the disk lets it: a full one takes another
        name of a folder where it takes nothing else."""
        with contextlib.suppress(OSError):
            (self.root / job_id).rename(self.root / f"{job_id}{_REFUSED}")
            sync_directory(self.root)

    def refused(self) -> list[str]:
        """Jobs that were refused and whose rows may still be there."""
        return [folder.name.removesuffix(_REFUSED) for folder in self.root.glob(f"*{_REFUSED}")]

    def discard(self, job_id: str) -> None:
        """Delete everything that the job has on disk."""
        for folder in (self.root / job_id, self.incoming(job_id), self.root / f"{job_id}{_REFUSED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def delete(self, stored: Iterable[str]) -> list[str]:
        """Delete these paths, named as `relative` names them; returns the ones that are gone."""
        gone = []
        for name in stored:
            path = self._state / name
            if path.is_relative_to(self.root) and ".." not in path.parts:
                self._end_left_behind(path)
                remove(path)
                if not path.exists():
                    gone.append(name)
        return gone

    def with_left_processes(self) -> list[str]:
        """Jobs whose folder names processes that an earlier server has left."""
        return [path.parent.parent.name for path in self.root.glob(f"*/{LAUNCHED}/{AGENT_FILE}")]

    def _end_left_behind(self, path: Path) -> None:
        """End the processes of a launched job of which this path, or the folder of it there, is about to go."""
        folder = path if path.name == LAUNCHED else path / LAUNCHED
        if (folder / AGENT_FILE).exists():
            end_left_behind(folder)

    def sweep(self, kept: dict[str, tuple[set[int], bool]]) -> dict[str, list[int]]:
        """Move what no row names to lost+found, and delete what by its name was never finished.

        `kept`: by job, the steps of its checkpoints, and whether it has a result. Returns, by job, the steps whose
        rows have no directory any more. Raises `OSError`.
        """
        make_directory(self.root)
        lost = LostFound(self._state)
        for folder in sorted(self.root.iterdir()):
            if PARTIAL in folder.name:
                _delete_leftover(folder)
            elif folder.name not in kept:
                self._end_left_behind(folder)
                lost.keep(folder)
        missing: dict[str, list[int]] = {}
        for job_id, (steps, has_result) in kept.items():
            self._sweep_job(job_id, {self.checkpoint(job_id, step).name for step in steps}, has_result, lost)
            gone = [step for step in sorted(steps) if not self.checkpoint(job_id, step).is_dir()]
            if gone:
                missing[job_id] = gone
        return missing

    def _sweep_job(self, job_id: str, wanted: set[str], has_result: bool, lost: LostFound) -> None:
        folder = self.root / job_id
        checkpoints = folder / "checkpoints"
        present = [*folder.iterdir()] if folder.is_dir() else []
        for path in present + ([*checkpoints.iterdir()] if checkpoints.is_dir() else []):
            if path.name.endswith(_PARTIAL) or PARTIAL in path.name:
                _delete_leftover(path)
            elif path.parent == checkpoints and path.name not in wanted:
                lost.keep(path)
        if not has_result and self.result(job_id).exists():
            lost.keep(self.result(job_id))

    def write_snapshot(self, write: Callable[[Path], None], directory: Path, record: bytes) -> None:
        """Write a snapshot as `directory`, so that what has that name is all there, even after a crash.

        A folder of that name, of a writer that came to no commit, is moved aside. Raises `OSError`.
        """
        partial = directory.with_name(directory.name + _PARTIAL)
        failpoint("checkpoint.before_write")
        remove(partial, strict=True)
        if directory.exists() and not LostFound(self._state).keep(directory):
            raise FileExistsError(errno.EEXIST, "there is a folder of this name that no row knows")
        make_directory(partial.parent)
        partial.mkdir(PRIVATE_DIRECTORY)
        made = partial
        try:
            write(partial)
            write_file(partial / CHECKPOINT_RECORD, record)
            failpoint("checkpoint.after_write")
            for folder, _, _ in os.walk(partial):
                sync_directory(Path(folder))
            failpoint("checkpoint.after_sync")
            made = partial.rename(directory)
            failpoint("checkpoint.after_rename")
            sync_directory(directory.parent)
            failpoint("checkpoint.after_parent_sync")
        except Exception:
            shutil.rmtree(made, ignore_errors=True)  # room, on a disk that is full
            raise


def _delete_leftover(path: Path) -> None:
    remove(path)
    _log.info("unfinished_write_deleted", path=str(path))
