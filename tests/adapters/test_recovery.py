"""Adapters made again from their folders; serving without a database; and what no row knows."""

import errno
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.adapters.library import AdapterLibrary
from runtime.adapters.recovery import NAMES
from runtime.adapters.versions import RECORD
from runtime.engine import state as frozen
from runtime.engine.state import DatabaseMissing, frozen_database, open_database
from runtime.engine.state_upkeep import rebuild, usage
from runtime.errors import NotFound, StorageUnavailable
from runtime.model.lora_base import LoraBase
from runtime.support.database import FILE, Database, DatabaseCorrupt, DatabaseTooNew
from runtime.trainer.jobs.rows import SCHEMAS
from tests.adapters.conftest import FakeHost, with_library

Catalogue = dict[str, Any]


def catalogue(library: AdapterLibrary) -> Catalogue:
    return {record.name: record for record in library.list()}


@pytest.fixture
def state(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> Path:
    """Names with versions, of which some were deleted; one that was rolled back, with an alias; one that is not served;
    a canary; and one that is all gone."""

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        for source in sources:
            await library.publish("a", source, job="ftjob-1", step=3, metrics={"eval_loss": 0.5})
        await library.rollback("a")
        await library.set_alias("b", "a")
        await library.set_canary("a", 3, 0.25)
        await library.publish("c", sources[0])
        await library.publish("c", sources[1])
        await library.delete_version("c", 1)
        await library.unload("c")
        await library.publish("d", sources[0])
        await library.publish("d", sources[1])
        await library.delete("d")

    with_library(tmp_path, tiny_base, body)
    return tmp_path


@pytest.fixture
def before(state: Path, tiny_base: LoraBase) -> Catalogue:
    async def body(library: AdapterLibrary, host: FakeHost) -> Catalogue:
        return catalogue(library)

    found: Catalogue = with_library(state, tiny_base, body)
    return found


def lose_database(state: Path) -> None:
    for path in state.glob(f"{FILE}*"):
        path.unlink()


def test_a_lost_database_is_made_again(
    state: Path, before: Catalogue, tiny_base: LoraBase, sources: list[Path]
) -> None:
    lose_database(state)
    found = rebuild(state, lost_found=False)
    assert found.problems == []
    assert sorted(found.adapters) == ["a@1", "a@2", "a@3", "c@2"]
    assert rebuild(state, lost_found=False).adapters == []

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        assert catalogue(library) == before
        assert host.loaded == [before["a"].version.key]
        await library.promote("a", 3)
        await library.rollback("a")  # the moves before are known too
        assert (await library.rollback("a")).number == 1
        assert (await library.publish("c", sources[0])).number == 3
        assert (await library.publish("d", sources[0])).number == 3, "a number is never used again"

    with_library(state, tiny_base, body)


def test_without_the_file_of_names_they_mean_their_newest_versions(
    state: Path, before: Catalogue, tiny_base: LoraBase
) -> None:
    lose_database(state)
    (state / "adapters" / NAMES).write_text("[{")
    found = rebuild(state, lost_found=False)
    assert [problem.partition(":")[0] for problem in found.problems] == [f"adapters/{NAMES}"]

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        assert library.get("a").current == 3
        assert library.get("a").versions == before["a"].versions
        with pytest.raises(NotFound):
            library.get("b")

    with_library(state, tiny_base, body)


def test_what_is_damaged_is_named_and_the_rest_is_taken_in(state: Path) -> None:
    lose_database(state)
    root = state / "adapters"
    (root / "a" / "1" / RECORD).unlink()
    weights = root / "a" / "2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(root / "c" / "2", root / "e" / "1")
    found = rebuild(state, lost_found=False)
    assert sorted(found.adapters) == ["a@3", "c@2"]
    problems = dict(problem.split(": ", 1) for problem in found.problems)
    assert set(problems) == {"adapters/a/1", "adapters/a/2", "adapters/e/1"}
    assert "eft adapters load" in problems["adapters/a/1"]
    assert "not what they were" in problems["adapters/a/2"]
    assert "c@2" in problems["adapters/e/1"]


def test_what_no_row_knows_is_moved_aside_and_can_be_put_back(
    state: Path, before: Catalogue, tiny_base: LoraBase
) -> None:
    """As where an older backup of the database was put back."""
    with sqlite3.connect(state / FILE) as connection:
        connection.execute("DELETE FROM adapter_moves WHERE number = 3")
        connection.execute("DELETE FROM adapter_versions WHERE name = 'a' AND number = 3")
        connection.execute("UPDATE adapters SET canary = NULL, next_number = 3 WHERE name = 'a'")
    connection.close()
    kept = {path.name: path.read_bytes() for path in (state / "adapters" / "a" / "3").iterdir()}

    async def body(library: AdapterLibrary, host: FakeHost) -> list[int]:
        return list(library.get("a").versions)

    assert with_library(state, tiny_base, body) == [1, 2]
    (folder,) = (state / "lost+found").glob("*/adapters/a/3")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert usage(state).lost_found == sum(map(len, kept.values()))
    assert rebuild(state, lost_found=False).adapters == []
    assert rebuild(state, lost_found=True).adapters == ["a@3"]
    assert with_library(state, tiny_base, body) == [1, 2, 3]


def test_leftovers_of_crashes_are_deleted(state: Path, before: Catalogue, tiny_base: LoraBase) -> None:
    """Folders that by their names were not finished, and versions whose rows say that they were deleted."""
    root = state / "adapters"
    for name in ("a/4.partial-12345678", "a/4.partial-written", "c/1", "d/2"):
        (root / name).mkdir()

    async def body(library: AdapterLibrary, host: FakeHost) -> Catalogue:
        return catalogue(library)

    assert with_library(state, tiny_base, body) == before
    assert sorted(str(path.relative_to(root)) for path in root.glob("*/*")) == ["a/1", "a/2", "a/3", "c/2"]
    assert not (state / "lost+found").exists()


def test_a_folder_that_is_there_is_never_overwritten(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        stray = tmp_path / "adapters" / "a" / "1"
        stray.mkdir(parents=True)
        (stray / "mine").write_text("mine")
        version = await library.publish("a", sources[0])
        assert version.number == 2
        assert (stray / "mine").read_text() == "mine"

    with_library(tmp_path, tiny_base, body)


def test_versions_of_an_older_eft_get_their_records(state: Path, before: Catalogue, tiny_base: LoraBase) -> None:
    records = sorted((state / "adapters").glob(f"*/*/{RECORD}"))
    texts = [record.read_text() for record in records]
    for record in records:
        record.unlink()

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        assert [record.read_text() for record in records] == texts

    with_library(state, tiny_base, body)


# -- without a database that can be used ---------------------------------------------------------


def with_frozen(directory: Path, base: LoraBase, body: Callable[[AdapterLibrary, FakeHost], Any]) -> Any:
    """A library over what `frozen_database` finds."""
    import asyncio

    async def main() -> Any:
        database = frozen_database(directory, "no room")
        host = FakeHost(base)
        library = await AdapterLibrary.open(database, directory, host, max_loaded=4, max_rank=64)
        try:
            return await body(library, host)
        finally:
            await library.close()
            database.close()

    return asyncio.run(main())


def files_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("database", ["whole", "with WAL", "missing", "damaged", "too new", "no bytes", "no rows"])
def test_what_was_published_is_served_whatever_became_of_the_database(
    state: Path, before: Catalogue, tiny_base: LoraBase, sources: list[Path], database: str
) -> None:
    path, open_connection = state / FILE, None
    if database == "with WAL":  # as a process that was killed leaves it
        open_connection = sqlite3.connect(path)
        open_connection.execute("PRAGMA wal_autocheckpoint = 0")
        open_connection.execute("UPDATE adapters SET served = 1 WHERE name = 'c'")
        open_connection.commit()
        assert (state / f"{FILE}-wal").stat().st_size > 0
    elif database == "missing":
        lose_database(state)
    elif database == "damaged":
        path.write_bytes(b"no database" * 1000)
    elif database == "too new":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    elif database == "no bytes":
        path.write_bytes(b"")
    elif database == "no rows":
        lose_database(state)
        Database(state, SCHEMAS).close()
    there = files_below(state)

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        assert library.frozen == "no room"
        found = catalogue(library)
        assert found.keys() == before.keys()
        assert found["a"] == before["a"]
        assert found["c"].served == (database == "with WAL")
        version = library.resolve("b@2")
        assert version is not None
        await library.ready(version)
        for change in (
            lambda: library.publish("a", sources[0]),
            lambda: library.promote("a", 1),
            lambda: library.set_alias("x", "a"),
            lambda: library.delete("a"),
            lambda: library.unload("a"),
        ):
            with pytest.raises(StorageUnavailable, match="no room"):
                await change()
        assert catalogue(library) == found

    with_frozen(state, tiny_base, body)
    after = files_below(state)
    if open_connection is not None:
        open_connection.close()
    assert after == there, "nothing on the disk was touched"


def test_a_new_database_beside_folders_is_refused(state: Path, before: Catalogue) -> None:
    new = state / "new"
    Database(new, SCHEMAS).close()  # as a backup of the file without its WAL is, or an Eft of before left it
    for content in (None, b"", (new / FILE).read_bytes()):
        lose_database(state)
        if content is not None:
            (state / FILE).write_bytes(content)
        with pytest.raises(DatabaseMissing, match=r"folders of 4 versions of adapters\. .*eft state rebuild") as caught:
            open_database(state)
        assert str(state) not in str(caught.value)
    rebuild(state, lost_found=False)
    open_database(state).close()


@pytest.mark.parametrize(
    "foreign",
    ["", "adapters/.names.json", "jobs/ftjob-1.partial-uploads/x", "jobs/ftjob-1/job.json", "adapters/a/4.partial-1/x"],
)
def test_a_new_database_beside_nothing_is_none(tmp_path: Path, foreign: str) -> None:
    if foreign:
        (tmp_path / foreign).parent.mkdir(parents=True)
        (tmp_path / foreign).write_text("")
    open_database(tmp_path).close()
    assert (tmp_path / FILE).is_file()


def test_a_damaged_database_is_moved_aside_by_a_rebuild(state: Path, before: Catalogue, tiny_base: LoraBase) -> None:
    (state / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(DatabaseCorrupt):
        open_database(state)
    found = rebuild(state, lost_found=False)
    assert found.moved_aside == [FILE]
    assert next((state / "lost+found").glob(f"*/{FILE}")).read_bytes() == b"no database" * 1000

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        assert catalogue(library) == before

    with_library(state, tiny_base, body)


def test_a_newer_database_is_not_rebuilt(state: Path, before: Catalogue) -> None:
    with sqlite3.connect(state / FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DatabaseTooNew):
        rebuild(state, lost_found=False)


@pytest.mark.parametrize(
    ("error", "exists", "serves"),
    [
        (OSError(errno.ENOSPC, "full"), True, True),
        (OSError(errno.ENOSPC, "full"), False, True),
        (OSError(errno.EROFS, "read-only"), False, True),
        (PermissionError(errno.EACCES, "denied"), True, True),
        (PermissionError(errno.EACCES, "denied"), False, False),
        (NotADirectoryError(errno.ENOTDIR, "a file"), False, False),
        (DatabaseCorrupt("damaged"), True, True),
        (StorageUnavailable("full"), True, True),
        (RuntimeError("another process has it"), True, False),
    ],
)
def test_what_is_served_in_spite_of(tmp_path: Path, error: Exception, exists: bool, serves: bool) -> None:
    directory = tmp_path if exists else tmp_path / "absent"
    assert frozen.serves_frozen(directory, error) is serves
    if serves:
        assert str(tmp_path) not in frozen.explain(error)


def test_an_alias_whose_target_is_being_deleted(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    """Whichever is first: no alias is left that means nothing."""
    import asyncio

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        for _ in range(5):
            await library.publish("a", sources[0])
            outcomes = await asyncio.gather(library.delete("a"), library.set_alias("b", "a"), return_exceptions=True)
            assert outcomes[0] is None
            assert outcomes[1] is None or isinstance(outcomes[1], NotFound)
            assert library._catalogue.aliases == {}
            await library.publish("b", sources[1])  # the name is free
            await library.delete("b")

    with_library(tmp_path, tiny_base, body)


def test_the_mirror_of_names_says_what_is_stored(state: Path, before: Catalogue) -> None:
    names = {record["name"]: record for record in json.loads((state / "adapters" / NAMES).read_text())}
    assert set(names) == {"a", "c", "d"}
    assert names["a"] | {"created": 0} == {
        "name": "a", "created": 0, "current": 2, "next_number": 4, "served": True,
        "canary": {"version": 3, "weight": 0.25}, "aliases": ["b"], "moves": [1, 2],
    }  # fmt: skip
    assert (names["d"]["current"], names["d"]["next_number"]) == (None, 3)
