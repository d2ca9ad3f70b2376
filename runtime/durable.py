"""Files that are there and whole after a crash, or not there. Each step of it is a failpoint."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.failpoints import failpoint

PARTIAL = ".partial-"
"""In the name of a folder that was not finished; whoever finds one at start may delete it."""


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, and have it on the disk. Raises `OSError`."""
    failpoint("durable.before_write", path.name)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        failpoint("durable.before_file_sync", path.name)
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Have a folder's entries on the disk."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Have on the disk what somebody else wrote to a file."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when all went well; `path` must not exist.

    Raises `FileExistsError`, and whatever the block raises: nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        failpoint("durable.before_directory_sync", path.name)
        sync_directory(partial)
        failpoint("durable.before_rename", path.name)
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        partial.rename(path)
        failpoint("durable.before_parent_sync", path.name)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
