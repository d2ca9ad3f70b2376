"""Intake of an uploaded adapter: the files of a form, or a tar archive, from a request into a folder."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from multipart import parse_options_header

from runtime.adapters.card import CARD
from runtime.api.admin.archives import MAX_ENTRIES, PIECE, TarReader, UploadedFiles, entry_error
from runtime.api.handle import AnyRequest
from runtime.api.http.body import check_encoding, content_type, receive_chunks
from runtime.api.http.form import MULTIPART, data_of, segments
from runtime.errors import InvalidRequest, UnsupportedMediaType
from runtime.support.durable import storage_unavailable
from runtime.support.peft_files import CONFIG, WEIGHTS
from settings.schema import Settings

ARCHIVE_TYPES = frozenset(
    {
        "application/x-tar",
        "application/tar",
        "application/gzip",
        "application/x-gzip",
        "application/x-compressed-tar",
        "application/x-gtar",
        "application/octet-stream",
    }
)
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz")
NAME_PART = "name"
MAX_FIELD = 1024
"""Bytes of the form's part `name`."""

WANTED = (CONFIG, WEIGHTS, CARD, "adapter_model.bin")
"""Files of an adapter. The last is a pickle: kept for its error, which says how to save the adapter instead."""


@dataclass(frozen=True)
class AdapterUpload:
    """An upload on the disk."""

    folder: Path
    """Folder of the adapter's files."""
    name: str | None
    """The form's part `name`."""
    left_out: list[str]
    """Paths in the upload that are no part of the adapter."""


async def receive_adapter(request: AnyRequest, settings: Settings, folder: Path) -> AdapterUpload:
    """Write the adapter in the request's body into `folder`, which is empty.

    Raises `InvalidRequest` naming the entry at fault, `PayloadTooLarge`, `UnsupportedMediaType`, `RequestTimeout`,
    `StorageUnavailable`; files written until then stay, and the caller deletes them.
    """
    check_encoding(request)
    media_type, options = parse_options_header(content_type(request))
    limit = settings.adapters.max_adapter_upload
    chunks = receive_chunks(request, limit=limit, timeout=settings.server.body_timeout)
    files = UploadedFiles(folder, WANTED, limit=limit)
    name = None
    try:
        if media_type == MULTIPART:
            name = await _read_form(chunks, options.get("boundary", ""), files)
        elif media_type in ARCHIVE_TYPES:
            archive = TarReader(files)
            await _pump(chunks, archive.feed)
            await asyncio.to_thread(archive.close)
        else:
            raise UnsupportedMediaType(
                "Send the adapter's folder as a tar archive, plain or gzipped (`Content-Type: application/x-tar`), or "
                "its files as multipart/form-data."
            )
        target = folder / "adapter"
        left_out = await asyncio.to_thread(files.choose, CONFIG, target)
    except OSError as error:
        raise storage_unavailable("The adapter cannot be stored", error) from error
    finally:
        with suppress(OSError):
            files.end()
    return AdapterUpload(target, name, left_out)


async def _read_form(chunks: AsyncIterator[bytes], boundary: str, files: UploadedFiles) -> str | None:
    """Read the form's files, and its part `name`, which is returned."""
    name = None
    too_many = InvalidRequest(
        f"The form has more than {MAX_ENTRIES} files, or a part with huge headers.", code="invalid_upload"
    )
    events = segments(chunks, boundary, max_parts=MAX_ENTRIES + 1, too_many=too_many)
    async for segment in events:
        if segment.filename:
            await _read_file(segment.filename, data_of(events), files)
        elif segment.name == NAME_PART and name is None:
            name = await _read_field(data_of(events))
        else:
            raise entry_error(
                str(segment.name), "is no file: besides the part `name`, once, send files (curl: -F file=@FILE)"
            )
    return name


async def _read_file(name: str, data: AsyncIterator[bytes], files: UploadedFiles) -> None:
    if name.lower().endswith(ARCHIVE_ENDINGS):
        archive = TarReader(files)
        await _pump(data, archive.feed)
        await asyncio.to_thread(archive.close)
        return

    def write(piece: bytes) -> None:
        files.count(len(piece))
        files.write(piece)

    await asyncio.to_thread(files.begin, name)
    await _pump(data, write)
    await asyncio.to_thread(files.end)


async def _read_field(data: AsyncIterator[bytes]) -> str:
    value = b""
    async for piece in data:
        value += piece
        if len(value) > MAX_FIELD:
            raise InvalidRequest(f"{NAME_PART} must have at most {MAX_FIELD} bytes.", param=NAME_PART)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{NAME_PART} must be UTF-8.", param=NAME_PART) from None


async def _pump(data: AsyncIterator[bytes], sink: Callable[[bytes], None]) -> None:
    """Hand the data to `sink` on a thread, in pieces of some size."""
    buffer = bytearray()
    async for piece in data:
        buffer += piece
        if len(buffer) >= PIECE:
            full, buffer = bytes(buffer), bytearray()
            await asyncio.to_thread(sink, full)
    if buffer:
        await asyncio.to_thread(sink, bytes(buffer))
