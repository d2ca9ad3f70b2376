"""Servers that share adapters: what one publishes the others have, whatever happens at the same time or in between."""

import asyncio
import multiprocessing
import shutil
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from runtime.adapters.library import AdapterLibrary
from runtime.adapters.shared import SharedStore
from runtime.adapters.shared_objects import DirectoryObjects, FsspecObjects, SharedObjects, open_objects
from runtime.adapters.store import SCHEMA
from runtime.adapters.versions import digest
from runtime.errors import Conflict, NotFound, StorageUnavailable
from runtime.model.lora_base import LoraBase
from runtime.support import failpoints
from runtime.support.database import Database
from settings.errors import SettingsError
from tests.adapters.conftest import FakeHost


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    yield
    failpoints.configure("")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 API in this process; skips where moto or s3fs is not installed."""
    moto = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}/adapters"


@pytest.fixture(params=["directory", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/adapters"
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store")


@pytest.fixture(params=["directory", "s3"])
def common_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that several processes reach."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store")


@asynccontextmanager
async def opened(directory: Path, base: LoraBase, place: str) -> AsyncIterator[AdapterLibrary]:
    """One server's library; others' changes are taken when `follow_shared` is called, or in a second."""
    database = Database(directory, [SCHEMA])
    try:
        shared = SharedStore(open_objects(place))
        library = await AdapterLibrary.open(
            database, directory, FakeHost(base), max_loaded=9, max_rank=64, shared=shared
        )
        try:
            yield library
        finally:
            await library.close()
    finally:
        database.close()


Body = Callable[[AdapterLibrary, AdapterLibrary], Awaitable[None]]


def with_two(tmp_path: Path, base: LoraBase, place: str, body: Body) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            libraries = [await stack.enter_async_context(opened(tmp_path / name, base, place)) for name in "ab"]
            await body(*libraries)

    asyncio.run(main())


def served(library: AdapterLibrary, model: str) -> int | None:
    version = library.resolve(model)
    return version.number if version else None


def test_every_change_is_on_the_other_server(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], place: str
) -> None:
    async def body(a: AdapterLibrary, b: AdapterLibrary) -> None:
        first = await a.publish("news", sources[0], job="job-1", step=7, metrics={"loss": 0.5})
        await b.follow_shared()
        assert b.get("news").version == first
        assert b.is_loaded(first)
        assert digest(b.directory(first)) == first.sha256
        assert a.revision("news") == b.revision("news")
        await b.publish("news", sources[1])
        await b.set_alias("latest", "news")
        await b.set_canary("news", 1, 0.5)
        await a.follow_shared()
        assert (served(a, "news@2"), served(a, "latest@1")) == (2, 1)
        assert a.get("news").canary == b.get("news").canary is not None
        await a.promote("news", 1)
        await b.follow_shared()
        assert (served(b, "news"), b.get("news").canary) == (1, None)
        assert (await b.rollback("news")).number == 2  # the history is shared too
        await b.delete_version("news", 1)
        await a.follow_shared()
        assert [*a.get("news").versions] == [2]
        assert not a.directory(first).exists()
        await a.unload("news")
        await b.follow_shared()
        assert served(b, "news") is None
        await b.delete("news")
        await a.follow_shared()
        with pytest.raises(NotFound):
            a.get("news")
        assert (await a.publish("news", sources[2])).number == 3  # numbers are never used again, by any server

    with_two(tmp_path, tiny_base, place, body)


def test_a_server_follows_by_itself(tmp_path: Path, tiny_base: LoraBase, sources: list[Path], place: str) -> None:
    async def body(a: AdapterLibrary, b: AdapterLibrary) -> None:
        await a.publish("news", sources[0])
        for _ in range(600):
            if served(b, "news") is not None:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it does not follow")

    with_two(tmp_path, tiny_base, place, body)


def test_a_new_server_takes_all_and_brings_its_own(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    place = str(tmp_path / "store")
    for name in ("store", "elsewhere"):
        (tmp_path / name).mkdir()

    async def main() -> None:
        async with opened(tmp_path / "c", tiny_base, str(tmp_path / "elsewhere")) as c:
            await c.publish("mine", sources[1])
        async with opened(tmp_path / "a", tiny_base, place) as a:
            await a.publish("news", sources[0])
            async with opened(tmp_path / "c", tiny_base, place) as c:
                assert (served(c, "news"), served(c, "mine")) == (1, 1)
                await a.follow_shared()
                assert served(a, "mine") == 1

    asyncio.run(main())


def test_a_name_that_is_another_adapter_here_stays_as_it_is(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    place = str(tmp_path / "store")
    for name in ("store", "elsewhere"):
        (tmp_path / name).mkdir()

    async def main() -> None:
        async with opened(tmp_path / "c", tiny_base, str(tmp_path / "elsewhere")) as c:
            mine = await c.publish("news", sources[1])
        async with opened(tmp_path / "a", tiny_base, place) as a, AsyncExitStack() as stack:
            theirs = await a.publish("news", sources[0])
            c = await stack.enter_async_context(opened(tmp_path / "c", tiny_base, place))
            assert c.get("news").version == mine
            with pytest.raises(Conflict, match="another adapter here"):
                await c.publish("news", sources[2])
            await a.follow_shared()
            assert a.get("news").version == theirs

    asyncio.run(main())


@hypothesis_settings(max_examples=6, deadline=None)
@given(plan=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), min_size=2, max_size=6))
def test_two_publishers_at_once_lose_no_version(
    plan: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory, tiny_base: LoraBase, sources: list[Path]
) -> None:
    async def body(a: AdapterLibrary, b: AdapterLibrary) -> None:
        where = {"a": a, "b": b}
        made = await asyncio.gather(*(where[name].publish("news", sources[seed]) for name, seed in plan))
        await a.follow_shared()
        await b.follow_shared()
        assert len({version.number for version in made}) == len(plan)
        assert a.get("news") == b.get("news")
        assert {version.key for version in a.get("news").versions.values()} == {version.key for version in made}
        for library in (a, b):
            for version in made:
                assert digest(library.directory(version)) == version.sha256

    tmp_path = tmp_path_factory.mktemp("shared")
    (tmp_path / "store").mkdir()
    with_two(tmp_path, tiny_base, str(tmp_path / "store"), body)


@hypothesis_settings(max_examples=4, deadline=None)
@given(
    plan=st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=3)
    )
)
def test_two_processes_that_publish_at_once_lose_no_version(
    plan: tuple[list[int], list[int]],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: LoraBase,
    sources: list[Path],
    common_place: str,
) -> None:
    """Forked, since a process of its own would import for seconds; with one thread, so that none is missed there."""
    folder, name = tmp_path_factory.mktemp("processes"), f"news-{uuid.uuid4().hex[:8]}"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def publish(own: Path, seeds: list[int]) -> None:
        async def body() -> None:
            async with opened(own, tiny_base, common_place) as library:
                start.wait(60)
                versions = [await library.publish(name, sources[seed]) for seed in seeds]
            (own / "made").write_text("\n".join(version.key for version in versions))

        torch.set_num_threads(1)
        asyncio.run(body())

    processes = [context.Process(target=publish, args=(folder / f"{n}", plan[n])) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0

    async def check() -> None:
        async with opened(folder / "third", tiny_base, common_place) as library:
            versions = library.get(name).versions.values()
            assert {version.key for version in versions} == made
            assert len(versions) == len(plan[0]) + len(plan[1])
            for version in versions:
                assert digest(library.directory(version)) == version.sha256

    made = {key for n in range(2) for key in (folder / f"{n}" / "made").read_text().splitlines()}
    asyncio.run(check())


def test_one_of_many_creates_an_object(tmp_path: Path) -> None:
    objects: SharedObjects = DirectoryObjects(tmp_path)
    for turn in range(20):
        start = threading.Barrier(8)
        won: list[int] = []

        def create(index: int, turn: int = turn, start: threading.Barrier = start, won: list[int] = won) -> None:
            start.wait()
            if objects.create(f"names/x/{turn}", b"%d" % index * 10_000):
                won.append(index)

        threads = [threading.Thread(target=create, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert objects.read(f"names/x/{turn}") == b"%d" % won[0] * 10_000
    assert len(objects.list("names")) == 20


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_an_upload_that_is_cut_off_is_invisible(
    passes: int, tmp_path: Path, tiny_base: LoraBase, sources: list[Path], place: str
) -> None:
    async def body(a: AdapterLibrary, b: AdapterLibrary) -> None:
        first = await a.publish("news", sources[0])
        failpoints.configure(f"shared.in_upload=raise:{passes}")
        with pytest.raises(failpoints.FailpointError):
            await a.publish("news", sources[1])
        failpoints.configure("")
        await b.follow_shared()
        for library in (a, b):
            assert [*library.get("news").versions] == [1]
            assert library.get("news").version == first
        later = await b.publish("news", sources[2])
        assert later.number > 2  # the number of the one that was cut off stays taken
        await a.follow_shared()
        assert a.get("news").version == later

    with_two(tmp_path, tiny_base, place, body)


def test_a_server_that_ends_between_the_store_and_its_rows_has_the_version_at_its_next_start(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], place: str
) -> None:
    async def main() -> None:
        async with opened(tmp_path / "a", tiny_base, place) as a:
            await a.publish("news", sources[0])
            failpoints.configure("shared.before_commit=raise:2")  # the first reserves the number
            with pytest.raises(failpoints.FailpointError):
                await a.publish("news", sources[1])
            failpoints.configure("")
        async with opened(tmp_path / "a", tiny_base, place) as a:
            version = a.get("news").version
            assert version.number == 2
            assert digest(a.directory(version)) == version.sha256

    asyncio.run(main())


def test_a_server_without_the_store_goes_on_serving(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    place = tmp_path / "store"
    place.mkdir()

    async def body(a: AdapterLibrary, b: AdapterLibrary) -> None:
        await a.publish("news", sources[0])
        await b.follow_shared()
        place.rename(tmp_path / "away")
        with pytest.raises(StorageUnavailable) as error:
            await b.publish("news", sources[1])
        assert error.value.code == "shared_store_unavailable"
        assert b.shared_problem is not None
        assert served(b, "news") == 1
        await b.ready(b.get("news").version)
        (tmp_path / "away").rename(place)
        assert (await b.publish("news", sources[1])).number == 2
        assert b.shared_problem is None

    async def alone() -> None:
        shutil.move(place, tmp_path / "away")
        async with opened(tmp_path / "b", tiny_base, str(place)) as b:  # it starts without, too
            assert served(b, "news") == 2

    with_two(tmp_path, tiny_base, str(place), body)
    asyncio.run(alone())


def test_changed_files_are_not_taken(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    place = tmp_path / "store"
    place.mkdir()

    async def main() -> None:
        async with opened(tmp_path / "a", tiny_base, str(place)) as a:
            first = await a.publish("news", sources[0])
            async with opened(tmp_path / "b", tiny_base, str(place)) as b:
                assert b.get("news").version == first
            await a.publish("news", sources[1])
            weights = place / "versions" / "news" / "2" / "adapter_model.safetensors"
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
            async with opened(tmp_path / "b", tiny_base, str(place)) as b:
                assert b.get("news").version == first
                await b.ready(first)
                await a.promote("news", 1)
                await a.delete_version("news", 2)
                await b.follow_shared()  # the next revision does without the damaged version
                assert b.revision("news") == a.revision("news")

    asyncio.run(main())


def test_a_protocol_that_is_not_installed_is_said() -> None:
    with pytest.raises(SettingsError, match="nosuch"):
        open_objects("nosuch://bucket/adapters")
    assert isinstance(open_objects("memory://x"), FsspecObjects)
