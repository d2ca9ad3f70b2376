"""Files on the disk with their rows: uploads under quotas, deletion, retention. Event loop only; the disk is worked on
by threads.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from runtime.errors import PayloadTooLarge
from runtime.files.store import CONTENT, FOLDER, RECORD, FileStore, StoredFile, encode_record
from runtime.support.database import Database
from runtime.support.durable import (
    PARTIAL,
    PRIVATE_DIRECTORY,
    create_file,
    make_directory,
    remove,
    storage_unavailable,
    sync_directory,
    write_file,
)
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.support.state_directory import LostFound
from settings.api import FileSettings

BUFFER_BYTES = 1024 * 1024
"""Bytes per write to the disk."""

_log = get_logger("files")


def new_file_id() -> str:
    """A new random id of a file."""
    return f"file-{secrets.token_hex(12)}"


class FileLibrary:
    """All stored files. Reads of rows go straight to `store`."""

    def __init__(self, database: Database, directory: Path, settings: FileSettings) -> None:
        """`directory`: the state directory."""
        self.store = FileStore(database)
        self._directory = directory
        self._settings = settings
        self._stored = 0
        """Bytes of all files that have rows."""
        self._arriving = 0
        """Bytes of uploads that have no row yet."""

    @property
    def used_bytes(self) -> int:
        """Bytes that count towards the quota."""
        return self._stored + self._arriving

    @property
    def max_file(self) -> int:
        """Bytes of the largest upload."""
        return self._settings.max_file

    def path(self, file: StoredFile) -> Path:
        return self._directory / file.path

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear up after the last process. Raises `OSError`, `StorageUnavailable`."""
        await self.finish_deleting()
        known = {name for path in await self.store.paths() for name in Path(path).parts[1:2]}
        await asyncio.to_thread(self._sweep, known)
        self._stored = await self.store.total_bytes()

    def _sweep(self, known: set[str]) -> None:
        """Move what has no row to lost+found, and delete uploads that were never finished. `known`: ids."""
        folder, lost = self._directory / FOLDER, LostFound(self._directory)
        make_directory(folder)
        for path in sorted(folder.iterdir()):
            if PARTIAL in path.name:
                remove(path)
                _log.info("unfinished_upload_deleted", path=str(path))
            elif path.name not in known:
                lost.keep(path)

    async def prune(self) -> list[StoredFile]:
        """Delete files that have expired, or are older than the setting says; but for used ones. Raises
        `StorageUnavailable`."""
        gone = await self.store.expire(self._settings.keep_files)
        self.dropped(*gone)
        await self.finish_deleting()
        return gone

    async def due(self) -> list[StoredFile]:
        """The files that `prune` would delete."""
        return await self.store.due(self._settings.keep_files)

    # -- changes -------------------------------------------------------------------------------

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator["Upload"]:
        """An upload to be written in the block, and then handed to `keep`; without that nothing of it stays.

        Raises `StorageUnavailable` for errors of the disk, in the block too."""
        upload = Upload(self._directory / FOLDER, new_file_id(), self._reserve)
        try:
            async with upload:
                yield upload
        except OSError as error:
            raise storage_unavailable("The file cannot be stored", error) from error
        finally:
            self._arriving -= upload.size

    async def keep(
        self, upload: "Upload", *, owner: str, purpose: str, filename: str, lifetime: int | None
    ) -> StoredFile:
        """Make a complete upload a file. `lifetime`: seconds until it is deleted, where that is sooner than the
        setting `files.keep_files`. Raises `OSError`, `StorageUnavailable`."""
        created = int(time.time())
        file = StoredFile(
            id=upload.id,
            owner=owner,
            purpose=purpose,
            filename=filename,
            bytes=upload.size,
            created_at=created,
            expires_at=self.expiry(created, lifetime),
            path=f"{FOLDER}/{upload.id}/{CONTENT}",
        )
        folder = self.path(file).parent
        await upload.finish(folder, encode_record(file))
        try:
            failpoint("files.before_row", file.id)
            # Shielded: where the caller is cancelled the row may be stored all the same, and needs its file.
            await asyncio.shield(asyncio.ensure_future(self.store.add(file)))
        except Exception:
            await asyncio.to_thread(remove, folder)
            raise
        self._stored += file.bytes
        return file

    def expiry(self, created: int, lifetime: int | None) -> int | None:
        """Time at which a file of this lifetime, in seconds, is deleted; None for never."""
        lifetimes = [seconds for seconds in (lifetime, self._settings.keep_files) if seconds is not None]
        return created + int(min(lifetimes)) if lifetimes else None

    def adopted(self, *files: StoredFile) -> None:
        """Count files whose rows another part has added."""
        self._stored += sum(file.bytes for file in files)

    def dropped(self, *files: StoredFile) -> None:
        """Count files no more whose rows are gone."""
        self._stored -= sum(file.bytes for file in files)

    async def delete(self, file_id: str, owner: str | None) -> None:
        """Delete a file. Raises `NotFound`, `Conflict`, `StorageUnavailable`."""
        file = await self.store.delete(file_id, owner)
        self.dropped(file)
        await self.finish_deleting()

    async def finish_deleting(self) -> None:
        """Delete from the disk what has no row any more. Raises `StorageUnavailable`."""
        paths = await self.store.discards()
        if not paths:
            return
        failpoint("files.before_unlink")
        gone = await asyncio.to_thread(self._unlink, paths)
        await self.store.forget_discards(gone)

    def _unlink(self, paths: list[str]) -> list[str]:
        gone = []
        for name in paths:
            path = self._directory / name
            remove(path)
            if not path.exists():
                gone.append(name)
        return gone

    def require_room(self) -> None:
        """Raise `PayloadTooLarge` where the quota is used up."""
        if self.used_bytes >= self._settings.max_files_total:
            raise self._no_room()

    def _reserve(self, size: int, count: int) -> None:
        """Reserve `count` bytes for an upload that has `size` bytes so far. Raises `PayloadTooLarge`."""
        if size + count > self._settings.max_file:
            raise PayloadTooLarge(
                f"The file is larger than {self._settings.max_file} bytes (the setting files.max_file).", param="file"
            )
        if self.used_bytes + count > self._settings.max_files_total:
            raise self._no_room()
        self._arriving += count

    def _no_room(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"All files together may have {self._settings.max_files_total} bytes (the setting files.max_files_total), "
            f"and there are {self._stored}. Delete files that are not needed any more.",
            param="file",
            code="file_quota_exceeded",
        )


class Upload:
    """A file's folder, filled under a temporary name. Deleted when its block is left, unless `finish` was called."""

    def __init__(self, folder: Path, file_id: str, reserve: Callable[[int, int], None]) -> None:
        """`reserve`: called with the bytes so far and those to come; raises where there is no room for them."""
        self.id = file_id
        self.size = 0
        self._reserve = reserve
        self._partial = folder / f"{file_id}{PARTIAL}{secrets.token_hex(4)}"
        self._buffer = bytearray()
        self._file: BinaryIO

    async def write(self, data: bytes) -> None:
        """Raises `OSError`, `PayloadTooLarge`."""
        self._reserve(self.size, len(data))
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            await self._flush()

    async def finish(self, folder: Path, record: bytes) -> None:
        """Give the folder its name, with a copy of the file's row. Raises `OSError`."""
        await self._flush()
        await asyncio.to_thread(self._publish, folder, record)

    async def __aenter__(self) -> Self:
        self._file = await asyncio.to_thread(self._create)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._discard)

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        await asyncio.to_thread(_write, self._file, data)

    def _create(self) -> BinaryIO:
        make_directory(self._partial.parent)
        self._partial.mkdir(PRIVATE_DIRECTORY)
        try:
            return create_file(self._partial / CONTENT)
        except OSError:
            remove(self._partial)
            raise

    def _publish(self, folder: Path, record: bytes) -> None:
        failpoint("files.before_sync", self.id)
        os.fsync(self._file.fileno())
        write_file(self._partial / RECORD, record)
        sync_directory(self._partial)
        self._partial.rename(folder)
        sync_directory(folder.parent)

    def _discard(self) -> None:
        try:
            self._file.close()
        finally:
            remove(self._partial)


def _write(file: BinaryIO, data: bytearray) -> None:
    file.write(data)
    file.flush()
