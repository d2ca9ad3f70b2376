"""A recipe, alone or with data files, from a request onto the disk: in pieces, under limits."""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from litestar import Request
from multipart import MultipartError, ParserLimitReached, PushMultipartParser, parse_options_header

from runtime.api.receive import check_encoding, receive_all, receive_chunks
from runtime.durable import sync_directory
from runtime.errors import InvalidRequest, PayloadTooLarge, StorageUnavailable, UnsupportedMediaType
from runtime.trainer.jobs.records import JobFile, Submission
from settings.schema import Settings

RECIPE_TYPES = frozenset(
    {
        "application/yaml",
        "application/x-yaml",
        "text/yaml",
        "text/x-yaml",
        "text/plain",
        "application/octet-stream",
        "application/x-www-form-urlencoded",  # what curl says of --data-binary
        "",
    }
)
RECIPE_PART = "recipe"
MAX_FILES = 100
MAX_NAME = 255
"""Characters of a file's name."""

_BUFFER = 1024 * 1024
"""Bytes that are written to disk at once."""


async def receive_submission(
    request: Request[Any, Any, Any], settings: Settings, *, job_id: str, folder: Path, idempotency_key: str | None
) -> Submission:
    """Read the body: a recipe, or a form with the part `recipe` and files, which are written into `folder`.

    Raises `InvalidRequest`, `PayloadTooLarge`, `UnsupportedMediaType`, `RequestTimeout`, `StorageUnavailable`; what
    was written till then stays, and is the caller's to delete.
    """
    check_encoding(request)
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    timeout = settings.server.body_timeout
    if media_type == "multipart/form-data":
        form = _Form(folder, max_recipe=settings.trainer.max_recipe)
        chunks = receive_chunks(request, limit=settings.trainer.max_upload, timeout=timeout)
        await form.read(chunks, options.get("boundary", ""))
        recipe, files = form.recipe, form.files
    elif media_type in RECIPE_TYPES:
        recipe = await receive_all(request, limit=settings.trainer.max_recipe, timeout=timeout)
        files = []
    else:
        raise UnsupportedMediaType(
            "Send the recipe as YAML (`Content-Type: application/yaml`), or as multipart/form-data with its data files."
        )
    if recipe is None:
        raise InvalidRequest(f"The form has no part `{RECIPE_PART}`.", param=RECIPE_PART)
    if not recipe.strip():
        raise InvalidRequest("The recipe is empty.", param=RECIPE_PART)
    digest = hashlib.blake2b(recipe)
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"\0{file.name}\0{file.digest}".encode())
    return Submission(
        id=job_id,
        recipe=recipe,
        files=tuple(JobFile(name=file.name, stored_as=file.stored_as, bytes=file.size) for file in files),
        digest=digest.hexdigest(),
        idempotency_key=idempotency_key,
    )


class _Form:
    """A multipart form, taken apart as it comes."""

    def __init__(self, folder: Path, *, max_recipe: int) -> None:
        self.recipe: bytes | None = None
        self.files: list[_Upload] = []
        self._folder = folder
        self._max_recipe = max_recipe

    async def read(self, chunks: AsyncIterator[bytes], boundary: str) -> None:
        if not 1 <= len(boundary) <= 200:
            raise InvalidRequest("The multipart/form-data has no valid boundary.")
        try:
            parser = PushMultipartParser(boundary, max_segment_count=MAX_FILES + 1, strict=True)
            await self._take(_events(parser, chunks))
        except ParserLimitReached:
            raise InvalidRequest(f"The form has more than {MAX_FILES} files, or a part with huge headers.") from None
        except MultipartError:
            raise InvalidRequest("The multipart/form-data is malformed, or not complete.") from None
        if self.files:
            await asyncio.to_thread(sync_directory, self._folder)

    async def _take(self, events: AsyncIterator[Any]) -> None:
        async for segment in events:
            if segment.name == RECIPE_PART:
                await self._take_recipe(events)
            else:
                await self._take_file(segment, events)

    async def _take_recipe(self, events: AsyncIterator[Any]) -> None:
        if self.recipe is not None:
            raise InvalidRequest(f"The form has the part `{RECIPE_PART}` twice.", param=RECIPE_PART)
        recipe = b""
        async for data in events:
            if data is None:
                break
            recipe += data
            if len(recipe) > self._max_recipe:
                raise PayloadTooLarge(f"The recipe is larger than {self._max_recipe} bytes.", param=RECIPE_PART)
        self.recipe = recipe

    async def _take_file(self, segment: Any, events: AsyncIterator[Any]) -> None:
        name = _checked_name(segment)
        if any(file.name == name for file in self.files):
            raise InvalidRequest(f"The form has the file `{name}` twice.", param=segment.name)
        try:
            async with _Upload(self._folder, name, len(self.files)) as upload:
                async for data in events:
                    if data is None:
                        break
                    await upload.write(data)
        except OSError as error:
            raise StorageUnavailable(f"The file `{name}` cannot be stored: {error.strerror}.") from error
        self.files.append(upload)


class _Upload:
    """A file on its way to the disk, where it lasts once the block is left."""

    def __init__(self, folder: Path, name: str, index: int) -> None:
        self.name = name
        # Only its ending says something to a reader; the number keeps names apart.
        self.stored_as = f"{index:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-80:]}"
        self.size = 0
        self._path = folder / self.stored_as
        self._digest = hashlib.blake2b()
        self._buffer = bytearray()
        self._file: BinaryIO

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        self._digest.update(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def __aenter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "xb")  # noqa: SIM115, ASYNC230 - closed in `__aexit__`; making a file is quick
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._flush()
                await asyncio.to_thread(os.fsync, self._file.fileno())
        finally:
            self._file.close()

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        await asyncio.to_thread(_write, self._file, data)


def _write(file: BinaryIO, data: bytearray) -> None:
    file.write(data)
    file.flush()


async def _events(parser: PushMultipartParser, chunks: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """Segments, each followed by its data in pieces and by None."""
    async for chunk in chunks:
        if chunk:
            for event in parser.parse(chunk):
                yield event
    parser.close()


def _checked_name(segment: Any) -> str:
    name = segment.filename
    if not name:
        raise InvalidRequest(
            f"The form's part `{str(segment.name)[:100]}` is no file; besides `{RECIPE_PART}`, send files.",
            param=str(segment.name)[:100],
        )
    if len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(
            f"A file's name has more than {MAX_NAME} characters, or some that cannot be printed.", param=segment.name
        )
    return str(name)
