"""Stores that servers share, and that do not do what is asked of a store: late, never, twice, or on another clock."""

import asyncio
import errno
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.adapters import replica
from runtime.adapters.library import AdapterLibrary
from runtime.adapters.shared import SharedStore
from runtime.adapters.shared_objects import DirectoryObjects, SharedObjects, open_objects
from runtime.adapters.store import SCHEMA
from runtime.adapters.versions import digest
from runtime.errors import Conflict, StorageUnavailable
from runtime.model.lora_base import LoraBase
from runtime.support.database import Database
from settings.errors import SettingsError
from tests.adapters.conftest import FakeHost


@asynccontextmanager
async def opened(directory: Path, base: LoraBase, objects: SharedObjects) -> AsyncIterator[AdapterLibrary]:
    database = Database(directory, [SCHEMA])
    try:
        library = await AdapterLibrary.open(
            database, directory, FakeHost(base), max_loaded=9, max_rank=64, shared=SharedStore(objects)
        )
        try:
            yield library
        finally:
            await library.close()
    finally:
        database.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


class Hooked(DirectoryObjects):
    """A directory that calls `hook(path)` before it is read or listed."""

    def __init__(self, root: Path, hook: Callable[[str], object]) -> None:
        super().__init__(root)
        self._hook = hook

    def read(self, path: str) -> bytes:
        self._hook(path)
        return super().read(path)

    def list(self, folder: str) -> list[str]:
        self._hook(folder)
        return super().list(folder)


# -- conditional writes ------------------------------------------------------------------------------


def test_a_store_without_conditional_writes_is_refused_at_the_start(
    tmp_path: Path, tiny_base: LoraBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an S3 API that takes no notice of `If-None-Match`."""
    from fsspec.implementations.memory import MemoryFileSystem

    write = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": write(self, path, value))

    async def main() -> None:
        with pytest.raises(SettingsError, match="lose each other's changes: it replaces an object"):
            async with opened(tmp_path / "a", tiny_base, open_objects(f"memory://{uuid.uuid4().hex}/adapters")):
                pass

    asyncio.run(main())


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_directory_without_hard_links_is_refused_at_the_start(
    code: int, tmp_path: Path, store: Path, tiny_base: LoraBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(SettingsError, match="no hard links"):
            async with opened(tmp_path / "a", tiny_base, DirectoryObjects(store)):
                pass
        monkeypatch.undo()

    asyncio.run(main())
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_a_store_that_may_not_be_written_is_followed(
    tmp_path: Path, store: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadOnly(DirectoryObjects):
        def create(self, path: str, data: bytes) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    async def main() -> None:
        async with opened(tmp_path / "a", tiny_base, DirectoryObjects(store)) as a:
            version = await a.publish("news", sources[0])
            async with opened(tmp_path / "b", tiny_base, ReadOnly(store)) as b:
                assert b.get("news").version == version
                with pytest.raises(StorageUnavailable, match="Permission denied"):
                    await b.publish("news", sources[1])
                assert b.get("news").version == version

    asyncio.run(main())


# -- at the same time --------------------------------------------------------------------------------


def test_a_version_that_is_deleted_while_another_server_brings_it(
    tmp_path: Path, store: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    async def main() -> None:
        loop, deleted = asyncio.get_running_loop(), threading.Event()

        def delete(path: str) -> None:
            if path.startswith("versions/news/1/adapter_") and not deleted.is_set():
                deleted.set()
                asyncio.run_coroutine_threadsafe(a.delete_version("news", 1), loop).result(30)

        async with opened(tmp_path / "a", tiny_base, DirectoryObjects(store)) as a:
            await a.publish("news", sources[0])
            second = await a.publish("news", sources[1])
            async with opened(tmp_path / "b", tiny_base, Hooked(store, delete)) as b:
                assert deleted.is_set()
                assert [*b.get("news").versions] == [2]
                assert b.revision("news") == a.revision("news")
                assert digest(b.directory(second)) == second.sha256

    asyncio.run(main())


def test_names_that_differ_in_case_alone_are_one_name(
    tmp_path: Path, store: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    """On a server that has not heard of the other one's yet; and where both are new at once, each keeps its own."""

    async def main() -> None:
        async with (
            opened(tmp_path / "a", tiny_base, DirectoryObjects(store)) as a,
            opened(tmp_path / "b", tiny_base, DirectoryObjects(store)) as b,
        ):
            first = await a.publish("News", sources[0])
            with pytest.raises(Conflict, match="the case of letters alone"):
                await b.publish("news", sources[1])
            await a.delete("News")
            second = await b.publish("news", sources[1])
            await a.follow_shared()
            assert (a.find("News"), a.get("news").version) == (None, second)
            assert first.sha256 != second.sha256
            made = await asyncio.gather(
                a.publish("Once", sources[0]), b.publish("once", sources[1]), return_exceptions=True
            )
            assert all(isinstance(one, Conflict) or not isinstance(one, BaseException) for one in made)
            for library in (a, b):
                await library.follow_shared()
            for library, one, name in ((a, made[0], "Once"), (b, made[1], "once")):
                if not isinstance(one, BaseException):
                    assert library.get(name).version == one
                    assert digest(library.directory(one)) == one.sha256

    asyncio.run(main())


def test_clocks_that_disagree_decide_nothing(
    tmp_path: Path, store: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, behind = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() - behind[0])

    async def main() -> None:
        async with (
            opened(tmp_path / "a", tiny_base, DirectoryObjects(store)) as a,
            opened(tmp_path / "b", tiny_base, DirectoryObjects(store)) as b,
        ):
            first = await a.publish("news", sources[0])
            behind[0] = 86_400.0
            second = await b.publish("news", sources[1])
            assert second.created < first.created
            behind[0] = -86_400.0
            for library in (a, b):
                await library.follow_shared()
                assert library.get("news").version == second
            assert (await a.rollback("news")).number == 1

    asyncio.run(main())


# -- no answer ---------------------------------------------------------------------------------------


def test_a_store_that_never_answers_holds_up_nothing(
    tmp_path: Path, store: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system that waits for its server: calls neither return nor fail."""
    silent = threading.Event()
    answers = threading.Event()

    def wait(path: str) -> None:
        if silent.is_set():
            answers.wait(60)

    async def main() -> None:
        async with opened(tmp_path / "b", tiny_base, Hooked(store, wait)) as b:
            version = await b.publish("news", sources[0])
            monkeypatch.setattr(replica, "ANSWER_SECONDS", 0.2)
            silent.set()
            refused: list[Any] = await asyncio.gather(
                *(b.publish(name, sources[1]) for name in ("news", "other", "third")), return_exceptions=True
            )
            assert [one.code for one in refused] == ["shared_store_unavailable"] * 3
            assert "it did not answer within 0.2 s" in (b.shared_problem or "")
            # Nothing else waits for those calls: neither requests, nor work on other threads.
            await asyncio.wait_for(b.ready(b.get("news").version), 30)
            assert await asyncio.to_thread(digest, b.directory(version)) == version.sha256
            monkeypatch.setattr(replica, "ANSWER_SECONDS", 60.0)
            silent.clear()
            answers.set()
            assert (await b.publish("news", sources[1])).number > 1
            assert b.shared_problem is None

    asyncio.run(main())
