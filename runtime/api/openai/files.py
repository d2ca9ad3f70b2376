"""/v1/files: upload, list, retrieve, read and delete files."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from litestar import Response, delete, get, post
from litestar.response import Stream
from msgspec import Struct

from runtime.api.docs import BINARY, FORM, QUERY, page_query
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.form import FormReader
from runtime.api.http.query import ObjectPage, check_names, choices, number, object_page, page_request
from runtime.api.http.record import record_of, visible_to
from runtime.api.openai.fine_tuning_views import RESULTS, results_csv
from runtime.errors import Conflict, InvalidRequest, NotFound
from runtime.files.library import FileLibrary, Upload
from runtime.files.store import (
    MAX_EXPIRY_SECONDS,
    MAX_FILENAME,
    MIN_EXPIRY_SECONDS,
    PURPOSES,
    UPLOAD_PURPOSES,
    StoredFile,
)
from runtime.support.durable import storage_unavailable
from runtime.trainer.jobs.records import Job

MAX_FILES = 10_000
"""Most files of one page of the list, OpenAI's; its default too."""

PIECE_BYTES = 256 * 1024
"""Bytes that are read from the disk at once."""

MAX_RESULT_LINES = 10_000
"""Most steps in the result file of a job; of a longer one, as many, evenly."""

_HEADERS = {"X-Content-Type-Options": "nosniff"}

FILE_PART = "file"
_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        FILE_PART: BINARY,
        "purpose": {"enum": list(UPLOAD_PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": MAX_EXPIRY_SECONDS},
    },
    "required": [FILE_PART, "purpose"],
}
_FIELDS = frozenset(_FORM["properties"]) - {FILE_PART}


class FileObject(Struct, kw_only=True):
    """A file, in OpenAI's form. Times are seconds since the epoch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileDeleted(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


@post("/v1/files", status_code=200, opt={FORM: _FORM})
async def upload_file(request: AnyRequest) -> FileObject:
    """Store a file, sent as a form with the parts `purpose` and `file`, in this or the other order."""
    api = api_of(request)
    library = api.handle.require_files()
    check_names(request, ())
    record = record_of(request)
    form = FormReader(request, max_file=library.max_file, timeout=api.settings.server.body_timeout)
    async with library.receiving() as upload:
        filename = await _receive(form, upload)
        file = await library.keep(
            upload, owner=record.tenant, purpose=_purpose(form), filename=filename, lifetime=_lifetime(form.fields)
        )
    record.target = file.id
    return file_object(file)


@get("/v1/files", opt={QUERY: page_query(MAX_FILES, purpose={"enum": list(PURPOSES)})})
async def list_files(request: AnyRequest) -> ObjectPage[FileObject]:
    """The files, the newest first. `after` takes an id, `limit` up to 10,000, `order` asc or desc, `purpose` one."""
    library = _library(request)
    page = page_request(request, default=MAX_FILES, most=MAX_FILES, further=("purpose",))
    purposes = choices(request, "purpose", PURPOSES)
    if len(purposes) > 1:
        raise InvalidRequest(f"purpose: expected one value, got {len(purposes)}.", param="purpose")
    found, more = await library.store.page(
        visible_to(record_of(request)),
        after=page.after,
        limit=page.limit,
        newest_first=page.newest_first,
        purpose=purposes[0] if purposes else None,
    )
    return object_page([file_object(file) for file in found], more)


@get("/v1/files/{file_id:str}")
async def retrieve_file(request: AnyRequest) -> FileObject:
    """One file."""
    check_names(request, ())
    if (found := await _results(request)) is not None:
        job, text = found
        return FileObject(
            id=_file_id(request),
            bytes=len(text),
            created_at=int(job.finished_at or job.created_at),
            filename="step_metrics.csv",
            purpose="fine-tune-results",
        )
    return file_object(await _library(request).store.get(_file_id(request), visible_to(record_of(request))))


@get("/v1/files/{file_id:str}/content", media_type="application/octet-stream")
async def file_content(request: AnyRequest) -> Response[bytes]:
    """The file's bytes."""
    library = _library(request)
    check_names(request, ())
    if (found := await _results(request)) is not None:
        return Response(found[1], media_type="application/octet-stream", headers=_HEADERS)
    file = await library.store.get(_file_id(request), visible_to(record_of(request)))
    try:
        opened = await asyncio.to_thread(_open, library.path(file))
    except OSError as error:
        raise storage_unavailable("The file cannot be read", error) from error
    headers = {"Content-Length": str(file.bytes), **_HEADERS}
    return Stream(file_pieces(opened), media_type="application/octet-stream", headers=headers)  # type: ignore[return-value]


@delete("/v1/files/{file_id:str}", status_code=200)
async def delete_file(request: AnyRequest) -> FileDeleted:
    """Delete a file. 409 while a batch reads it."""
    check_names(request, ())
    file_id = _file_id(request)
    if (found := await _results(request)) is not None:
        raise Conflict(
            f"`{file_id[:100]}` is made of the metrics of its job: DELETE /admin/jobs/{found[0].id} deletes both.",
            param="file_id",
            code="file_in_use",
        )
    await _library(request).delete(file_id, visible_to(record_of(request)))
    return FileDeleted(id=file_id)


async def _results(request: AnyRequest) -> tuple[Job, bytes] | None:
    """The job whose result file the path names, and that file, which is made when it is asked for; None for the path of
    a stored file. Raises `NotFound`."""
    file_id = _file_id(request)
    if not file_id.startswith(RESULTS):
        return None
    store = api_of(request).handle.require_jobs().store
    try:
        job = await store.get(file_id.removeprefix(RESULTS), visible_to(record_of(request)))
    except NotFound:
        job = None
    if job is None or job.state != "succeeded":
        raise NotFound(f"There is no file `{file_id[:100]}`.", param="file_id", code="file_not_found")
    found = await store.thinned_metrics(job.id, limit=MAX_RESULT_LINES)
    return job, await asyncio.to_thread(results_csv, found.rows)


ROUTES = (upload_file, list_files, retrieve_file, file_content, delete_file)


def file_object(file: StoredFile) -> FileObject:
    """A stored file in OpenAI's shape."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


async def _receive(form: FormReader, upload: Upload) -> str:
    """Write the form's file into `upload`; its name. Raises `InvalidRequest`."""
    filename: str | None = None
    async for file in form.files():
        if file.part != FILE_PART or filename is not None:
            what = f"`{file.part[:100]}`" if file.part != FILE_PART else f"the part `{FILE_PART}` twice"
            raise InvalidRequest(
                f"The form has {what} as a file: send one, as the part `{FILE_PART}` (curl: -F {FILE_PART}=@FILE).",
                param=file.part[:100],
            )
        filename = _checked_name(file.filename)
        async for piece in file.pieces:
            await upload.write(piece)
    if filename is None:
        raise InvalidRequest(
            f"The form has no file: send one as the part `{FILE_PART}` (curl: -F {FILE_PART}=@FILE).", param=FILE_PART
        )
    if upload.size == 0:
        raise InvalidRequest("The file is empty.", param=FILE_PART)
    if unknown := form.fields.keys() - _FIELDS:
        name = min(unknown)[:100]
        raise InvalidRequest(
            f"The form has an unknown field `{name}`; it takes: {', '.join(sorted(_FIELDS))}.",
            param=name,
            code="unknown_parameter",
        )
    return filename


def _checked_name(given: str) -> str:
    name = given.replace("\\", "/").rpartition("/")[2] or "upload"
    if len(name) > MAX_FILENAME or not name.isprintable():
        raise InvalidRequest(
            f"The file's name must have at most {MAX_FILENAME} printable characters, got {len(name)}.", param=FILE_PART
        )
    return name


def _purpose(form: FormReader) -> str:
    given = form.fields.get("purpose")
    if given not in UPLOAD_PURPOSES:
        what = (
            "The form has no `purpose`" if given is None else f"purpose must be one of those listed, got `{given[:50]}`"
        )
        raise InvalidRequest(f"{what}: it may be {', '.join(UPLOAD_PURPOSES)}.", param="purpose")
    return given


def _lifetime(fields: dict[str, str]) -> int | None:
    """Seconds of `expires_after`; None without it."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(
            f"expires_after.anchor must be created_at, got {'nothing' if anchor is None else f'`{anchor[:50]}`'}.",
            param="expires_after.anchor",
        )
    return number(seconds or "", "expires_after.seconds", least=MIN_EXPIRY_SECONDS, most=MAX_EXPIRY_SECONDS)


def _open(path: Path) -> BinaryIO:
    return open(path, "rb")


async def file_pieces(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    """The content of a file, which is closed afterwards."""
    try:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece
    finally:
        file.close()


def _library(request: AnyRequest) -> FileLibrary:
    return api_of(request).handle.require_files()


def _file_id(request: AnyRequest) -> str:
    return str(request.path_params["file_id"])
