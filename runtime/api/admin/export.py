"""GET /admin/adapters/{name}/export: a version in PEFT's format, merged into the base, or as GGUF."""

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncGenerator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from litestar import get
from litestar.response import Stream

from runtime.adapters.card import CARD
from runtime.adapters.store import Version
from runtime.api.admin.views import library_of
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import ADMIN
from runtime.api.http.query import check_names, integer
from runtime.checkpoints.export import check_format
from runtime.errors import AdapterUnavailable, InvalidRequest, NotFound
from runtime.support.durable import remove, storage_unavailable
from runtime.support.peft_files import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from runtime.adapters.library import AdapterLibrary

TAR, BINARY = "application/x-tar", "application/octet-stream"
_CHUNK = 1024 * 1024
"""Bytes per read."""
_MOST = 2**31
_one_at_a_time = asyncio.Lock()
"""Held while a model is merged, which takes the disk space of one, and memory."""


@get("/admin/adapters/{name:str}/export", opt={ADMIN: True})
async def export_adapter(request: AnyRequest) -> Stream:
    """The files of an adapter. `version` (default: the one that the name points to); `format` peft (default) or merged:
    a tar archive with one folder; gguf or gguf-lora: a file. `type` as for `eft export`. The base is read from the disk
    again."""
    check_names(request, ("version", "format", "type"))
    api = api_of(request)
    library = library_of(api)
    record = library.get(str(request.path_params["name"]))
    number = integer(request, "version", default=record.current, least=1, most=_MOST)
    format, type = request.query_params.get("format", "peft"), request.query_params.get("type")
    check_format(format, type)
    if number not in record.versions:
        there = ", ".join(map(str, record.versions))
        raise NotFound(f"{record.name!r} has no version {number}; there are: {there}.", param="version")
    version = record.versions[number]
    if format == "peft":
        files = await asyncio.to_thread(_open, version, library.directory(version), (CONFIG, WEIGHTS, CARD))
    else:
        files = await _written(api, library, version, format, type)
    is_file = format.startswith("gguf")
    headers = {
        "content-length": str(files.entries[0].bytes if is_file else files.archive_size),
        "content-disposition": f'attachment; filename="{version.name}-{version.number}.{"gguf" if is_file else "tar"}"',
        "x-eft-adapter-version": version.id,
    }
    body = _plain(files) if is_file else _archive(files)
    return Stream(body, media_type=BINARY if is_file else TAR, headers=headers)


async def _written(api: Api, library: "AdapterLibrary", version: Version, format: str, type: str | None) -> "_Files":
    """The files of an export in another format, written, opened, and gone from their folder: what a client that
    leaves does not fetch takes no space."""
    from runtime.checkpoints import open_checkpoint
    from runtime.checkpoints.export.export import export_adapter as write
    from runtime.model.config import ModelLoadError

    settings = api.handle.require_latest().settings.model

    def work() -> _Files:
        folder = library.make_incoming()
        target = folder / (f"{version.name}.gguf" if format.startswith("gguf") else version.name)
        try:
            checkpoint = open_checkpoint(
                settings.model, revision=settings.revision, chat_template=settings.chat_template
            )
            own = library.card(version).own_text
            source = library.directory(version)
            write(checkpoint, source, target, format, type=type, name=version.name, own=own)
            names = [target.name] if target.is_file() else sorted(file.name for file in target.iterdir())
            return _open(version, folder if target.is_file() else target, names)
        finally:
            remove(folder)

    async with _one_at_a_time:
        try:
            return await asyncio.to_thread(work)
        except ModelLoadError as error:
            raise InvalidRequest(str(error), param="format") from error
        except OSError as error:
            raise storage_unavailable("The export cannot be written", error) from error


@dataclass(frozen=True)
class _Entry:
    """A file to send, and its header in the archive."""

    header: bytes
    file: BinaryIO
    bytes: int

    @property
    def size(self) -> int:
        """Bytes in the archive, with the header and the padding of the last block."""
        return len(self.header) + self.bytes + self.padding

    @property
    def padding(self) -> int:
        return -self.bytes % tarfile.BLOCKSIZE


@dataclass(frozen=True)
class _Files:
    entries: list[_Entry]
    stack: ExitStack
    """Closes the files."""

    @property
    def archive_size(self) -> int:
        """Bytes of a tar archive of them."""
        return sum(entry.size for entry in self.entries) + tarfile.BLOCKSIZE * 2


def _open(version: Version, directory: Path, names: Iterable[str]) -> _Files:
    """Open all files at once: the version may be deleted afterwards. Blocks. Raises `AdapterUnavailable`."""
    entries = list[_Entry]()
    with ExitStack() as stack:
        for name in names:
            try:
                descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if name == CARD:  # of an adapter that came from elsewhere
                    continue
                raise AdapterUnavailable(f"{version.id} cannot be exported: its files are missing.") from None
            except OSError as error:
                raise AdapterUnavailable(f"{version.id} cannot be exported: {error.strerror}.") from error
            file = stack.enter_context(os.fdopen(descriptor, "rb"))
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterUnavailable(f"{version.id} cannot be exported: its files are damaged.")
            info = tarfile.TarInfo(f"{version.name}/{name}")
            info.size, info.mtime, info.mode = status.st_size, int(version.created), 0o644
            entries.append(_Entry(info.tobuf(tarfile.GNU_FORMAT), file, status.st_size))
        return _Files(entries, stack.pop_all())


async def _archive(files: _Files) -> AsyncGenerator[bytes, None]:
    with files.stack:
        for entry in files.entries:
            yield entry.header
            async for data in _content(entry):
                yield data
            yield bytes(entry.padding)
        yield bytes(2 * tarfile.BLOCKSIZE)


async def _plain(files: _Files) -> AsyncGenerator[bytes, None]:
    """The content of the only file."""
    with files.stack:
        async for data in _content(files.entries[0]):
            yield data


async def _content(entry: _Entry) -> AsyncGenerator[bytes, None]:
    left = entry.bytes
    while left:
        data = await asyncio.to_thread(entry.file.read, min(left, _CHUNK))
        if not data:
            raise OSError("the file was cut while it was read")
        left -= len(data)
        yield data
