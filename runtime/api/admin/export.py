"""GET /admin/adapters/{name}/export: a version's folder in PEFT's format, streamed as a tar archive."""

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from litestar import get
from litestar.response import Stream

from runtime.adapters.card import CARD
from runtime.adapters.store import Version
from runtime.api.admin.views import library_of
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.auth import ADMIN
from runtime.api.http.query import check_names, integer
from runtime.checkpoints.peft.config import CONFIG, WEIGHTS
from runtime.errors import AdapterUnavailable, InvalidRequest, NotFound, Unsupported

MEDIA_TYPE = "application/x-tar"
FORMATS = ("peft",)
_LATER = ("merged", "gguf")
_CHUNK = 1024 * 1024
"""Bytes per read."""
_MOST = 2**31


@get("/admin/adapters/{name:str}/export", opt={ADMIN: True})
async def export_adapter(request: AnyRequest) -> Stream:
    """The files of an adapter as PEFT loads them, in a tar archive with one folder. `version` (default: the one that
    the name points to), `format` peft."""
    check_names(request, ("version", "format"))
    library = library_of(api_of(request))
    record = library.get(str(request.path_params["name"]))
    number = integer(request, "version", default=record.current, least=1, most=_MOST)
    _check_format(request.query_params.get("format", "peft"))
    if number not in record.versions:
        there = ", ".join(map(str, record.versions))
        raise NotFound(f"{record.name!r} has no version {number}; there are: {there}.", param="version")
    version = record.versions[number]
    files = await asyncio.to_thread(_open, version, library.directory(version))
    headers = {
        "content-length": str(sum(entry.size for entry in files.entries) + tarfile.BLOCKSIZE * 2),
        "content-disposition": f'attachment; filename="{version.name}-{version.number}.tar"',
        "x-eft-adapter-version": version.id,
    }
    return Stream(_archive(files), media_type=MEDIA_TYPE, headers=headers)


def _check_format(format: str) -> None:
    if format in _LATER:
        raise Unsupported(f"format {format} is not supported yet; peft is.", param="format")
    if format not in FORMATS:
        raise InvalidRequest(f"format: expected one of {', '.join(FORMATS)}, got `{format[:50]}`.", param="format")


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


def _open(version: Version, directory: Path) -> _Files:
    """Open all files at once: the version may be deleted afterwards. Blocks. Raises `AdapterUnavailable`."""
    entries = list[_Entry]()
    with ExitStack() as stack:
        for name in (CONFIG, WEIGHTS, CARD):
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
            entries.append(_Entry(info.tobuf(tarfile.USTAR_FORMAT), file, status.st_size))
        return _Files(entries, stack.pop_all())


async def _archive(files: _Files) -> AsyncGenerator[bytes, None]:
    with files.stack:
        for entry in files.entries:
            yield entry.header
            left = entry.bytes
            while left:
                data = await asyncio.to_thread(entry.file.read, min(left, _CHUNK))
                if not data:
                    raise OSError("the file was cut while it was read")
                left -= len(data)
                yield data
            yield bytes(entry.padding)
        yield bytes(2 * tarfile.BLOCKSIZE)
