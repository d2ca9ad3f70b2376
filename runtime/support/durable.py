"""Files that are whole after a crash, or absent. Accessible to this user alone; each new folder is synced upwards.

All lasting files are written through this module, so that a full disk and a lack of descriptors are an `OSError` for
every writing library. The steps are failpoints.
"""

import asyncio
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from runtime.errors import StorageUnavailable
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger

T = TypeVar("T")

PARTIAL = ".partial-"
"""Mark in the names of unfinished files and folders; at the next start they may be deleted."""

PRIVATE_DIRECTORY = 0o700
PRIVATE_FILE = 0o600

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
TOO_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_FOREIGN_ERRNO = re.compile(r"\(os error ([0-9]+)\)")
"""End of an I/O error's text in Rust's standard library, and so in safetensors."""

_DIRECTORIES = re.compile(r"""(?<![\w./~])~?/(?:[^\s/'"()\[\],;]+/)*""")
"""All of an absolute path but its last name."""


def error_code(error: OSError) -> str:
    """Code of a disk error, for people and programs: disk_full, too_many_files, storage_read_only, or
    storage_unavailable."""
    if error.errno in DISK_FULL:
        return "disk_full"
    if error.errno in TOO_MANY_FILES:
        return "too_many_files"
    return "storage_read_only" if error.errno in READ_ONLY else "storage_unavailable"


def reason(error: OSError) -> str:
    """The system's text for an error, without the path."""
    return error.strerror or (os.strerror(error.errno) if error.errno else type(error).__name__)


def without_paths(text: str) -> str:
    """A text of another library for clients: of each absolute path only the last name."""
    return _DIRECTORIES.sub("", text)


def storage_unavailable(what: str, error: OSError) -> StorageUnavailable:
    """The error as the answer to a request. `what` is the failed action."""
    return StorageUnavailable(f"{what}: {reason(error)}.", cause=error_code(error))


def create_file(path: Path) -> BinaryIO:
    """Open a new file for writing; the caller syncs and closes it. Raises `OSError`."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE), "wb")


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, and sync it to the disk. Raises `OSError`."""
    failpoint("durable.before_write", path.name)
    with create_file(path) as file:
        file.write(data)
        file.flush()
        failpoint("durable.before_file_sync", path.name)
        os.fsync(file.fileno())


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by another library, and sync it to the disk. Raises `OSError`, also in place of the library's own
    error for it."""
    with as_os_errors(path):
        write(path)
    os.chmod(path, PRIVATE_FILE)
    sync_file(path)


def read_with(path: Path, read: Callable[[Path], T]) -> T:
    """Read a file by another library. Raises `OSError` as `write_with`, and the library's other errors."""
    with as_os_errors(path):
        return read(path)
    raise AssertionError("the block returns or raises")


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """Context in which another library's own errors about a full disk, or a lack of descriptors, are an `OSError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None and path.exists():
            # safetensors raises this also for a file that it cannot open because descriptors ran out.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path)) from error
        raise
    except Exception as error:
        found = _FOREIGN_ERRNO.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, replacing an existing one of this name. Raises `OSError`; the old one stays then."""
    with replacing(path) as partial:
        write_file(partial, data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with the path of a new file, to be written and synced there. It gets the name `path` when the block
    succeeds; when it fails, nothing of it is left, and an existing file stays. Raises `OSError`."""
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a folder and its missing parents, each synced to the disk. Raises `OSError`."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(PRIVATE_DIRECTORY, exist_ok=True)
        sync_directory(folder.parent)


def move(source: Path, target: Path) -> None:
    """Move a file or folder, and sync that to the disk. Raises `OSError`, also where `target` exists."""
    make_directory(target.parent)
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)
    sync_directory(target.parent)
    sync_directory(source.parent)


def remove(path: Path, *, strict: bool = False) -> None:
    """Delete a file, or a folder with its contents, as far as possible. With `strict`, raises `OSError` where something
    is left."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if strict:
            raise
        shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Sync a folder's entries to the disk."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Sync a file that another library wrote to the disk."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """Context with a folder to fill. It gets the name `path` when the block succeeds; `path` must not exist.

    Raises `FileExistsError`, and the errors of the block: nothing is left then.
    """
    make_directory(path.parent)
    made = partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir(PRIVATE_DIRECTORY)
    try:
        yield partial
        failpoint("durable.before_directory_sync", path.name)
        sync_directory(partial)
        failpoint("durable.before_rename", path.name)
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        made = partial.rename(path)
        failpoint("durable.before_parent_sync", path.name)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def tighten(path: Path) -> bool:
    """Remove other users' permissions from a file or folder. False where that fails."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return True
    try:
        path.chmod(mode & ~0o077)
    except OSError:
        return False
    return True


# -- no links --------------------------------------------------------------------------------------
#
# A path that was checked, and is opened later: a link that is put there in between must not lead elsewhere.


def open_without_links(path: Path, flags: int) -> int:
    """A descriptor of the file or folder at an absolute path that was without links when it was checked: none that was
    put there since is followed, neither at its end nor above. `flags`: how it is opened. Raises `OSError`."""
    folder = os.open(path.anchor, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in path.parts[1:-1]:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(path.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


@contextmanager
def pinned(folder: Path) -> Iterator[Path]:
    """Context with another path of a folder: one that leads to this very folder, whatever is moved or linked to its
    place meanwhile. `folder` as `open_without_links` takes it. Raises `OSError`, also where it is no folder."""
    descriptor = open_without_links(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# -- patience --------------------------------------------------------------------------------------
#
# Bounded waiting for system resources that a job needs. After it, the job fails with their name.
#
# Descriptors become free when connections end, and disk space when an operator frees some. A lack of either should
# not cost a job its training at once, so the job waits for a bounded time.

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between the tries: about a minute in all."""

_log = get_logger("jobs")


def is_passing(error: Exception) -> bool:
    """True for errors that are likely to be temporary."""
    if isinstance(error, StorageUnavailable):
        return error.cause == "too_many_files"
    return isinstance(error, OSError) and error.errno in TOO_MANY_FILES


async def patiently(work: Callable[[], Awaitable[T]], passing: Callable[[Exception], bool] = is_passing) -> T:
    """The result of `work`, retried a bounded number of times while its error is `passing`. Raises the last error."""
    for pause in PAUSES:
        try:
            return await work()
        except (OSError, StorageUnavailable) as error:
            if not passing(error):
                raise
            _log.warning("waiting_for_the_system", reason=str(error), seconds=pause)
        await asyncio.sleep(pause)
    return await work()
