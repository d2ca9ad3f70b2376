"""POST /admin/train: start a job from a recipe."""

import asyncio
import functools
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from litestar import Request, Response, get, post
from msgspec.structs import replace
from multipart import parse_options_header

from runtime.api.admin.views import DryRun, JobDetail, job_detail
from runtime.api.docs import ANSWERS, BINARY, FLAG, FORM, QUERY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.auth import TRAIN
from runtime.api.http.body import check_encoding, check_typed, content_type, receive_all, receive_chunks
from runtime.api.http.form import MULTIPART, data_of, segments
from runtime.api.http.query import check_names, flag
from runtime.api.http.record import RequestRecord, record_of, visible_to
from runtime.errors import InvalidRequest, NotFound, PayloadTooLarge, UnsupportedMediaType
from runtime.files.library import FileLibrary
from runtime.files.store import StoredFile
from runtime.support.durable import create_file, make_directory, storage_unavailable, sync_directory, sync_file
from runtime.trainer.jobs.manager import PATIENCE, JobManager
from runtime.trainer.jobs.records import JobFile, JobSubmission
from runtime.trainer.recipe.reference import json_schema
from settings.schema import Settings

# -- uploads ---------------------------------------------------------------------------------------
#
# A recipe, alone or with data files, from a request onto the disk: in pieces, under limits.

FORM_TYPE = "application/x-www-form-urlencoded"
"""Content-Type that curl sends for --data-binary and for -d; the latter removes line breaks."""
RECIPE_TYPES = frozenset(
    {
        "application/yaml",
        "application/x-yaml",
        "text/yaml",
        "text/x-yaml",
        "text/plain",
        "application/octet-stream",
        FORM_TYPE,
        "",
    }
)
RECIPE_PART = "recipe"
_TRAIN_FORM = {
    "type": "object",
    "properties": {RECIPE_PART: {"type": "string"}},
    "additionalProperties": BINARY,
    "required": [RECIPE_PART],
}
"""The data files are parts too, named by the paths that the recipe has for them."""
_RECIPE_ENDINGS = (".yml", ".yaml")
MAX_FILES = 100
MAX_NAME = 255
"""Characters of a file's name."""

_BUFFER = 1024 * 1024
"""Bytes per write to disk."""


async def receive_submission(
    request: Request[Any, Any, Any], settings: Settings, *, job_id: str, folder: Path, idempotency_key: str | None
) -> JobSubmission:
    """Read the body: a recipe, or a form with the part `recipe` and files, which are written into `folder`.

    Raises `InvalidRequest`, `PayloadTooLarge`, `UnsupportedMediaType`, `RequestTimeout`, `StorageUnavailable`; files
    written until then stay, and the caller deletes them.
    """
    check_encoding(request)
    media_type, options = parse_options_header(content_type(request))
    timeout = settings.server.body_timeout
    if media_type == MULTIPART:
        form = _Form(folder, max_recipe=settings.trainer.max_recipe)
        chunks = receive_chunks(request, limit=settings.trainer.max_upload, timeout=timeout)
        await form.read(chunks, options.get("boundary", ""))
        recipe, files = form.recipe, form.files
    elif media_type in RECIPE_TYPES:
        recipe = await receive_all(request, limit=settings.trainer.max_recipe, timeout=timeout)
        check_typed(request, recipe)
        files = []
    else:
        raise UnsupportedMediaType(
            "Send the recipe as YAML (`Content-Type: application/yaml`), or as multipart/form-data with its data files."
        )
    if recipe is None:
        sent = next((file.name for file in files if file.name.lower().endswith(_RECIPE_ENDINGS)), "recipe.yml")
        raise InvalidRequest(
            f"The form has no part `{RECIPE_PART}`: send the recipe as one (curl: -F {RECIPE_PART}=@{sent}).",
            param=RECIPE_PART,
        )
    if not recipe.strip():
        raise InvalidRequest("The recipe is empty.", param=RECIPE_PART)
    _check_is_recipe(recipe, media_type)
    digest = hashlib.blake2b(recipe)
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"\0{file.name}\0{file.digest}".encode())
    return JobSubmission(
        id=job_id,
        recipe=recipe,
        files=tuple(JobFile(name=file.name, stored_as=file.stored_as, bytes=file.size) for file in files),
        digest=digest.hexdigest(),
        idempotency_key=idempotency_key,
        owner=record_of(request).tenant,
    )


class _Form:
    """A multipart form, parsed as it arrives."""

    def __init__(self, folder: Path, *, max_recipe: int) -> None:
        self.recipe: bytes | None = None
        self.files: list[_Upload] = []
        self._folder = folder
        self._max_recipe = max_recipe

    async def read(self, chunks: AsyncIterator[bytes], boundary: str) -> None:
        too_many = InvalidRequest(f"The form has more than {MAX_FILES} files, or a part with huge headers.")
        await self._take(segments(chunks, boundary, max_parts=MAX_FILES + 1, too_many=too_many))
        if self.files:
            try:
                await asyncio.to_thread(sync_directory, self._folder)
            except OSError as error:
                raise storage_unavailable("The files cannot be stored", error) from error

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
        async for data in data_of(events):
            recipe += data
            if len(recipe) > self._max_recipe:
                raise PayloadTooLarge(f"The recipe is larger than {self._max_recipe} bytes.", param=RECIPE_PART)
        self.recipe = recipe

    async def _take_file(self, segment: Any, events: AsyncIterator[Any]) -> None:
        name = _checked_name(segment)
        if any(file.name == name for file in self.files):
            raise InvalidRequest(
                f"The form has the file `{name}` twice: name the parts by the paths that the recipe has (curl: "
                f"-F data/{name[:100]}=@FILE).",
                param=segment.name,
            )
        try:
            async with _Upload(self._folder, name, len(self.files)) as upload:
                async for data in data_of(events):
                    await upload.write(data)
        except OSError as error:
            raise storage_unavailable(f"The file `{name}` cannot be stored", error) from error
        self.files.append(upload)


class _Upload:
    """A file being written to disk; durable once the block is left."""

    def __init__(self, folder: Path, name: str, index: int) -> None:
        self.name = name
        # Readers need only its ending; the number keeps names apart.
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
        await asyncio.to_thread(make_directory, self._path.parent)
        self._file = create_file(self._path)  # closed in `__aexit__`; making a file is quick
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


def _check_is_recipe(body: bytes, media_type: str) -> None:
    """Raise `InvalidRequest` for a recipe that curl mangled because an `@` or `--data-binary` is missing."""
    text = body.strip()
    if b"\n" in text or text.startswith(b"{"):
        return
    if text.lower().endswith(tuple(ending.encode() for ending in _RECIPE_ENDINGS)) and b": " not in text:
        flag = f"-F {RECIPE_PART}=@" if media_type == MULTIPART else "--data-binary @"
        name = text.removeprefix(b"@").decode("utf-8", "replace")[:100]
        how = f"`{name}` is the name of a file, not what is in it: write {flag}{name}."
    elif b"\n" not in body and (media_type == FORM_TYPE or text.count(b": ") > 1):
        how = "The recipe came without its line breaks, as curl's -d sends it: use --data-binary @recipe.yml."
    else:
        return
    raise InvalidRequest(f"{how} With data files: -F recipe=@recipe.yml -F file=@data.jsonl.", param=RECIPE_PART)


def _checked_name(segment: Any) -> str:
    """Name of the file: its own, or, if that says more, the part's (`-F data/x.jsonl=@x.jsonl`)."""
    name = segment.filename
    if not name:
        part = str(segment.name)[:100]
        how = (
            "it goes into the address, as ?dry_run=1"
            if part == "dry_run"
            else f"besides `{RECIPE_PART}`, send files, each with an @ (curl: -F file=@data.jsonl)"
        )
        raise InvalidRequest(f"The form's part `{part}` is no file: {how}.", param=part)
    if "/" in str(segment.name) and "/" not in name:
        name = str(segment.name)
    if len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(
            f"A file's name has more than {MAX_NAME} characters, or some that cannot be printed.", param=segment.name
        )
    return str(name)


MAX_KEY = 255
"""Characters of an idempotency key."""

SUBMITTED = {200: (JobDetail, DryRun), 201: (JobDetail,), 202: (JobDetail,)}
"""What a submission may be answered with."""


@post(
    "/admin/train",
    opt={TRAIN: True, FORM: _TRAIN_FORM, QUERY: {"dry_run": FLAG}, ANSWERS: SUBMITTED},
    status_code=201,
)
async def train(request: AnyRequest) -> Response[JobDetail | DryRun]:
    """Start a job from a recipe in YAML, alone or in a form with its data files. 201: it is queued; 202: its data
    is still being read (after 30 s, or as many as `Prefer: wait=N` says); 200: this Idempotency-Key made it before, or
    `dry_run=1` asked for the plan only."""
    api = api_of(request)
    api.handle.require()
    jobs = api.handle.require_jobs()
    check_names(request, ("dry_run",))
    dry_run = flag(request, "dry_run")
    if dry_run:
        record_of(request).action = ""  # it changes nothing, and editors send one for every pause in typing
    key = _idempotency_key(request)
    job_id = jobs.new_id()
    with jobs.arriving():
        try:
            folder = jobs.directories.incoming(job_id)
            asked = await receive_submission(request, api.settings, job_id=job_id, folder=folder, idempotency_key=key)
            asked = await with_stored_files(api, asked, folder, record_of(request))
        except BaseException:
            await jobs.discard(job_id)
            raise
        if dry_run:
            prepared = await jobs.dry_run(asked)
            plan = DryRun(name=prepared.name, total_steps=prepared.total_steps, summary=prepared.summary)
            return Response(plan, status_code=200)
    job, created = await jobs.submit(asked, patience=_patience(request))
    record_of(request).target = job.id
    location = {"Location": f"/admin/jobs/{job.id}"}
    status = 202 if job.state == "validating" else 201 if created else 200
    return Response(await detail_of(jobs, job.id), status_code=status, headers=location)


@get("/admin/train/schema", opt={TRAIN: True})
async def recipe_schema(request: AnyRequest) -> Response[dict[str, Any]]:
    """The JSON schema of recipes, for editors."""
    check_names(request, ())
    return Response(await asyncio.to_thread(_schema))


_schema = functools.cache(json_schema)


async def job_id_of(request: AnyRequest) -> str:
    """Id of the job that the path names. Raises `NotFound` for one that the request's key may not see."""
    jobs = api_of(request).handle.require_jobs()
    return (await jobs.store.get(str(request.path_params["job_id"]), visible_to(record_of(request)))).id


async def detail_of(jobs: JobManager, job_id: str) -> JobDetail:
    """Everything about one job. Raises `NotFound`."""
    job, progress = await jobs.store.describe(job_id)
    store = jobs.store
    files, checkpoints = await store.files(job_id), await store.checkpoints(job_id)
    answers, gate = await store.answers(job_id), await store.gate(job_id)
    resumable = job.state in ("paused", "failed") and await jobs.can_resume(job_id)
    return job_detail(job, progress, files, checkpoints, answers, gate, resumable=resumable)


_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)


def _patience(request: AnyRequest) -> float:
    """Seconds that the answer may wait for the recipe's data: the preference `wait` of RFC 7240, at most PATIENCE."""
    wait = _WAIT.search(request.headers.get("prefer", ""))
    return PATIENCE if wait is None else min(PATIENCE, float(wait[1]))


def _idempotency_key(request: AnyRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key: expected 1 to {MAX_KEY} printable characters, got {len(key)}.", param="Idempotency-Key"
        )
    return key


# -- stored files ----------------------------------------------------------------------------------
#
# Stored files of /v1/files as the data files of a job, under names of the job's own.

PURPOSE = "fine-tune"
MAX_STORED = 100
"""Most stored files that one recipe names."""
_FILE_ID = re.compile(rb"\bfile-[0-9a-f]{24}\b")


async def training_file(library: FileLibrary, file_id: str, owner: str | None, param: str) -> StoredFile:
    """A file that a job may read. Raises `NotFound`, and `InvalidRequest` for one of another purpose."""
    file = await library.store.get(file_id, owner, param=param)
    if file.purpose != PURPOSE:
        raise InvalidRequest(
            f"{param} must name a file with the purpose {PURPOSE}; the purpose of `{file.id}` is {file.purpose}.",
            param=param,
        )
    return file


def take_files(taken: list[tuple[Path, JobFile]], folder: Path) -> tuple[JobFile, ...]:
    """Give a job its own names for stored files, which may be deleted afterwards. Blocks. Raises `OSError`."""
    make_directory(folder)
    for path, file in taken:
        try:
            os.link(path, folder / file.stored_as)
        except OSError:  # a file system without links
            shutil.copyfile(path, folder / file.stored_as)
            sync_file(folder / file.stored_as)
    sync_directory(folder)
    return tuple(file for _, file in taken)


async def with_stored_files(api: Api, asked: JobSubmission, folder: Path, record: RequestRecord) -> JobSubmission:
    """The submission with the stored files whose ids stand in its recipe. An id that is none of the client's files
    stays out: the recipe's check reports it. Raises `InvalidRequest`, `StorageUnavailable`."""
    sent = {file.name for file in asked.files}
    ids = dict.fromkeys(id for found in _FILE_ID.findall(asked.recipe) if (id := found.decode()) not in sent)
    library = api.handle.files
    if not ids or library is None:
        return asked
    if len(ids) > MAX_STORED:
        raise InvalidRequest(f"The recipe names {len(ids)} stored files, and may name {MAX_STORED}.", param="datasets")
    taken = list[tuple[Path, JobFile]]()
    for index, id in enumerate(ids, len(asked.files)):
        try:
            file = await training_file(library, id, visible_to(record), "datasets")
        except NotFound:
            continue
        name = re.sub(r"[^A-Za-z0-9._-]", "_", file.filename)[-80:]  # its ending says what it holds
        taken.append((library.path(file), JobFile(name=id, stored_as=f"{index:03d}-{name}", bytes=file.bytes)))
    try:
        files = await asyncio.to_thread(take_files, taken, folder)
    except OSError as error:
        raise storage_unavailable("The files of the job cannot be stored", error) from error
    return replace(asked, files=(*asked.files, *files))
