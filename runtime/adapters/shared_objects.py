"""Objects that several servers share: files of a directory, or of an object store through fsspec.

All that is asked of a store: an object is created whole or not at all, and only where there is none of its name. On a
directory that is a hard link; S3 and Google Cloud Storage have conditional writes. An object never changes.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from runtime.support.durable import PARTIAL, make_directory, remove, sync_directory, write_file
from settings.errors import SettingsError

_PROBES = "probes"
"""Folder of objects that a start creates and deletes again."""
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV})


class ConditionalWritesMissing(OSError):
    """The store creates an object though there is one of its name: changes of several servers would be lost."""


class SharedObjects(Protocol):
    """A store. Paths are relative, with `/`. All methods block. They raise `OSError` when the store cannot be
    reached."""

    def create(self, path: str, data: bytes) -> bool:
        """Create an object. False where there is one of this name."""

    def read(self, path: str) -> bytes:
        """Raises `FileNotFoundError`."""

    def list(self, folder: str) -> list[str]:
        """Paths of all objects below a folder, in any order; none where there is no such folder."""

    def remove(self, folder: str) -> None:
        """Delete everything below a folder."""


class DirectoryObjects:
    """A directory that all servers mount. It must exist: one that was never mounted is no empty store."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, path: str, data: bytes) -> bool:
        self._check_root()
        target = self._root / path
        make_directory(target.parent)
        partial = target.with_name(f".{target.name}{PARTIAL}{uuid.uuid4().hex}")
        write_file(partial, data)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                text = "its file system has no hard links, by which a file is created only where there is none"
                raise ConditionalWritesMissing(text) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(target.parent)
        return True

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def list(self, folder: str) -> list[str]:
        self._check_root()
        found = []
        for parent, _, names in os.walk(self._root / folder):
            below = Path(parent).relative_to(self._root).as_posix()
            found += [f"{below}/{name}" for name in names if PARTIAL not in name]
        return found

    def remove(self, folder: str) -> None:
        remove(self._root / folder)

    def _check_root(self) -> None:
        if not self._root.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root))


class FsspecObjects:
    """A URL of fsspec, such as `s3://bucket/adapters` or `gs://bucket/adapters`."""

    def __init__(self, url: str) -> None:
        """Raises `SettingsError` where the protocol is unknown, or its package is not installed."""
        import fsspec

        protocol, _, self._root = url.partition("://")
        self._root = self._root.strip("/")
        try:
            # Listings are not cached: what another server wrote a moment ago is to be seen.
            self._fs: Any = fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise SettingsError([f"adapters.shared_store: {protocol}:// cannot be used here: {error}"]) from error

    def create(self, path: str, data: bytes) -> bool:
        full = self._full(path)
        with _as_os_errors():
            try:
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            except Exception:
                # A conditional write whose answer was lost has happened all the same: its content tells.
                if not self._fs.exists(full):
                    raise
                return bool(self._fs.cat_file(full) == data)
        return True

    def read(self, path: str) -> bytes:
        with _as_os_errors():
            return bytes(self._fs.cat_file(self._full(path)))
        raise AssertionError("the block returns or raises")

    def list(self, folder: str) -> list[str]:
        found: list[Any] = []
        with _as_os_errors(), suppress(FileNotFoundError):
            found = self._fs.find(self._full(folder))
        return [str(path).lstrip("/").removeprefix(f"{self._root}/") for path in found]

    def remove(self, folder: str) -> None:
        with _as_os_errors(), suppress(FileNotFoundError):
            self._fs.rm(self._full(folder), recursive=True)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """The stores' own libraries raise what they like when they cannot be reached."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def check_conditional_writes(objects: SharedObjects) -> None:
    """Create an object twice, to see that the second time is refused. Raises `ConditionalWritesMissing` where it is
    not, and `OSError` where the store cannot be reached, or not be written to."""
    folder = f"{_PROBES}/{uuid.uuid4().hex}"
    try:
        first, second = objects.create(f"{folder}/probe", b"first"), objects.create(f"{folder}/probe", b"second")
        kept = objects.read(f"{folder}/probe")
    finally:
        with suppress(OSError):
            objects.remove(folder)
    if not first or second or kept != b"first":
        raise ConditionalWritesMissing("it replaces an object though it is asked to create it only where there is none")


def open_objects(place: str) -> SharedObjects:
    """The store at a directory's path or a URL. Raises `SettingsError` for a URL that cannot be used here."""
    if "://" in place:
        return FsspecObjects(place)
    return DirectoryObjects(Path(place).expanduser())
