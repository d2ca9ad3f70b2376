"""Path of the state directory: jobs, checkpoints, uploaded files and adapters. Imports nothing heavy."""

import os
import time
import uuid
from pathlib import Path

from runtime.support.durable import move, reason
from runtime.support.logs import get_logger
from settings.schema import Settings


def state_directory(settings: Settings) -> Path:
    """`trainer.state_dir`, else `eft` under XDG_STATE_HOME, else ~/.local/state/eft. Absolute."""
    if settings.trainer.state_dir is not None:
        return Path(settings.trainer.state_dir).expanduser().absolute()
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # the XDG specification requires that relative paths are ignored
        home = Path.home() / ".local" / "state"
    return home / "eft"


# -- lost found ------------------------------------------------------------------------------------
#
# `lost+found/` in the state directory: files without a row are moved there, never deleted.
#
# A row may be missing because a process died before the commit; then nothing of value was lost. Or the database is not
# the one that the files were made with; then the files are all that is left.

NAMES = ("lost+found", "lost+found.eft")
"""Names of the folder. The second is used where the first belongs to the file system itself: the root of an ext4 volume
has one."""

_log = get_logger("state")


class LostFound:
    """One batch of found files, in a folder named for the time; each keeps its path relative to the state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._batch = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"

    def keep(self, path: Path) -> bool:
        """Move a file or folder there. False, logged, where that fails: it stays in its place."""
        problem = ""
        for name in NAMES:
            target = self._directory / name / self._batch / path.relative_to(self._directory)
            try:
                move(path, target)
            except OSError as error:
                if path.exists() or path.is_symlink():  # else it was moved, but not yet synced
                    problem = problem or reason(error)
                    continue
            _log.warning("moved_to_lost_found", path=str(path), to=str(target))
            return True
        _log.error("cannot_move_to_lost_found", path=str(path), reason=problem)
        return False


def batches(directory: Path) -> list[Path]:
    """Folders of earlier batches, oldest first."""
    found = [batch for name in NAMES for batch in _folders(directory / name)]
    return sorted(found, key=lambda batch: batch.name)


def _folders(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
