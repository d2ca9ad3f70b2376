"""Stored files: what is on the disk is in a row, or goes; quotas hold while uploads arrive."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.errors import Conflict, NotFound, PayloadTooLarge, StorageUnavailable
from runtime.files import recovery, store
from runtime.files.library import FileLibrary
from runtime.files.store import StoredFile
from runtime.support import failpoints
from runtime.support.database import Database
from settings.api import FileSettings

pytestmark = pytest.mark.anyio

SMALL = FileSettings(max_file=1000, max_files_total=2500)


@pytest.fixture
async def library(tmp_path: Path) -> AsyncIterator[FileLibrary]:
    database = Database(tmp_path, [store.SCHEMA])
    library = FileLibrary(database, tmp_path, SMALL)
    await library.start()
    yield library
    failpoints.configure("")
    database.close()


async def put(library: FileLibrary, content: bytes, *, owner: str = "", lifetime: int | None = None) -> StoredFile:
    async with library.receiving() as upload:
        await upload.write(content)
        return await library.keep(upload, owner=owner, purpose="batch", filename="a.jsonl", lifetime=lifetime)


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "files").iterdir()}


async def test_a_stored_file_is_whole(library: FileLibrary, tmp_path: Path) -> None:
    file = await put(library, b"one\ntwo\n")
    assert library.path(file).read_bytes() == b"one\ntwo\n"
    assert library.path(file).stat().st_mode & 0o077 == 0
    assert await library.store.get(file.id, "") == file
    assert names(tmp_path) == {file.id}


async def test_an_upload_that_raises_leaves_nothing(library: FileLibrary, tmp_path: Path) -> None:
    async def leave() -> None:
        async with library.receiving() as upload:
            await upload.write(b"x" * 900)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await leave()
    assert names(tmp_path) == set()
    assert library.used_bytes == 0


async def test_quotas_count_what_arrives(library: FileLibrary) -> None:
    async with library.receiving() as first, library.receiving() as second, library.receiving() as third:
        for upload in (first, second):
            await upload.write(b"x" * 1000)
            with pytest.raises(PayloadTooLarge) as large:
                await upload.write(b"x")
            assert "1000" in large.value.message
        await third.write(b"x" * 500)
        with pytest.raises(PayloadTooLarge) as full:
            await third.write(b"x")
        assert full.value.code == "file_quota_exceeded"
    assert library.used_bytes == 0
    kept = await put(library, b"x" * 1000)
    assert library.used_bytes == 1000
    await library.delete(kept.id, "")
    assert library.used_bytes == 0


@pytest.mark.parametrize("place", ["files.before_sync", "files.before_row"])
async def test_a_failure_while_storing_leaves_nothing(library: FileLibrary, tmp_path: Path, place: str) -> None:
    failpoints.configure(f"{place}=raise")
    with pytest.raises(failpoints.FailpointError):
        await put(library, b"text")
    assert names(tmp_path) == set()
    assert library.used_bytes == 0
    failpoints.configure("")
    assert (await library.store.page(None, after=None, limit=10, newest_first=True, purpose=None))[0] == []


async def test_a_disk_that_refuses_is_a_503(
    library: FileLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("runtime.files.library._write", refuse)
    with pytest.raises(StorageUnavailable) as full:
        await put(library, b"text")
    assert full.value.cause == "disk_full"
    assert str(tmp_path) not in full.value.message
    assert names(tmp_path) == set()


async def test_a_used_file_stays(library: FileLibrary) -> None:
    file = await put(library, b"text")
    await library.store._database.call(lambda c: store.hold(c, file.id, "batch_1"))
    with pytest.raises(Conflict) as used:
        await library.delete(file.id, "")
    assert "batch_1" in used.value.message
    await library.store._database.call(lambda c: store.release(c, "batch_1"))
    await library.delete(file.id, "")
    with pytest.raises(NotFound):
        await library.store.get(file.id, "")


async def test_owners_see_their_own(library: FileLibrary) -> None:
    mine, other = await put(library, b"a", owner="ann"), await put(library, b"b", owner="bob")
    with pytest.raises(NotFound):
        await library.store.get(other.id, "ann")
    with pytest.raises(NotFound):
        await library.delete(other.id, "ann")
    with pytest.raises(NotFound):
        await library.store.page("ann", after=other.id, limit=1, newest_first=True, purpose=None)
    page = await library.store.page("ann", after=None, limit=10, newest_first=True, purpose=None)
    assert page == ([mine], False)
    everything, _ = await library.store.page(None, after=None, limit=10, newest_first=True, purpose=None)
    assert everything == [other, mine]


async def test_an_expired_file_is_gone_and_a_used_one_once_it_is_released(library: FileLibrary, tmp_path: Path) -> None:
    file, used = await put(library, b"text", lifetime=0), await put(library, b"text", lifetime=0)
    lasting = await put(library, b"text", lifetime=3600)
    await library.store._database.call(lambda c: store.hold(c, used.id, "batch_1"))
    with pytest.raises(NotFound):
        await library.store.get(file.id, "")
    await library.prune()
    assert names(tmp_path) == {used.id, lasting.id}
    await library.store._database.call(lambda c: store.release(c, "batch_1"))
    await library.prune()
    assert names(tmp_path) == {lasting.id}
    assert library.used_bytes == 4


async def test_the_shorter_lifetime_counts(tmp_path: Path) -> None:
    database = Database(tmp_path, [store.SCHEMA])
    library = FileLibrary(database, tmp_path, FileSettings(keep_files=7200.0))
    assert library.expiry(100, None) == 7300
    assert library.expiry(100, 3600) == 3700
    assert library.expiry(100, 10_000) == 7300
    assert FileLibrary(database, tmp_path, FileSettings()).expiry(100, None) is None
    database.close()


async def test_the_next_process_clears_up(tmp_path: Path) -> None:
    """A file without a row goes to lost+found, an unfinished one is deleted, and a deletion is finished."""
    database = Database(tmp_path, [store.SCHEMA])
    library = FileLibrary(database, tmp_path, SMALL)
    await library.start()
    kept, deleted = await put(library, b"kept"), await put(library, b"deleted")
    failpoints.configure("files.before_unlink=raise")
    with pytest.raises(failpoints.FailpointError):
        await library.delete(deleted.id, "")
    failpoints.configure("")
    assert names(tmp_path) == {kept.id, deleted.id}
    (tmp_path / "files" / "file-unknown").write_bytes(b"unknown")
    (tmp_path / "files" / "file-x.partial-1234").mkdir()
    again = FileLibrary(database, tmp_path, SMALL)
    await again.start()
    assert names(tmp_path) == {kept.id}
    assert again.used_bytes == 4
    [lost] = (tmp_path / "lost+found").rglob("file-*")
    assert lost.read_bytes() == b"unknown"
    database.close()


async def test_an_older_file_goes_by_a_setting_of_today(tmp_path: Path) -> None:
    """`files.keep_files` goes for the files that are there already, but for used ones."""
    database = Database(tmp_path, [store.SCHEMA])
    library = FileLibrary(database, tmp_path, SMALL)
    await library.start()
    old, used = await put(library, b"old"), await put(library, b"used")
    await database.call(lambda c: c.execute("UPDATE files SET created_at = created_at - 100"))
    await database.call(lambda c: store.hold(c, used.id, "batch_1"))
    young = await put(library, b"young")
    assert await library.due() == []
    shorter = FileLibrary(database, tmp_path, FileSettings(keep_files=50.0))
    assert [file.id for file in await shorter.due()] == [old.id]
    assert [file.id for file in await shorter.prune()] == [old.id]
    assert names(tmp_path) == {used.id, young.id}
    database.close()


async def test_a_lost_database_is_made_again(library: FileLibrary, tmp_path: Path) -> None:
    files = [await put(library, f"{n}".encode(), owner=owner, lifetime=9999) for n, owner in enumerate(("", "ann"))]
    short, wrong, bare, link, out = [await put(library, b"text") for _ in range(5)]
    library.path(link).rename(tmp_path / "elsewhere")
    library.path(link).symlink_to(tmp_path / "elsewhere")
    record = tmp_path / "files" / out.id / "file.json"
    record.write_text(record.read_text().replace("content", "../../elsewhere"))
    library.path(short).write_bytes(b"te")
    (tmp_path / "files" / wrong.id).rename(tmp_path / "files" / "file-other")
    (tmp_path / "files" / bare.id / "file.json").write_text("{")
    await library.store._database.call(lambda c: c.execute("DELETE FROM files"))
    made, problems = await library.store._database.call(lambda c: recovery.adopt(c, tmp_path))
    assert made == [file.id for file in files]
    for file in files:
        assert await library.store.get(file.id, file.owner) == file
    assert {problem.partition(": ")[0] for problem in problems} == {
        f"files/{short.id}/content",
        "files/file-other",
        f"files/{bare.id}",
        f"files/{link.id}/content",
        f"files/{out.id}",
    }
    assert await library.store._database.call(lambda c: recovery.adopt(c, tmp_path)) == ([], problems)
