"""Stored files of /v1/files as the data files of a job, under names of the job's own."""

import asyncio
import os
import re
import shutil
from pathlib import Path

from msgspec.structs import replace

from runtime.api.handle import Api
from runtime.api.http.record import RequestRecord, visible_to
from runtime.errors import InvalidRequest, NotFound
from runtime.files.library import FileLibrary
from runtime.files.records import StoredFile
from runtime.support.durable import make_directory, storage_unavailable, sync_directory, sync_file
from runtime.trainer.jobs.records import JobFile, JobSubmission

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
