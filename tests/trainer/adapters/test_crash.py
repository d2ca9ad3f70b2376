"""A crash between any two steps of a publish: after the restart the old version or the new one, never neither."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from runtime import failpoints
from runtime.trainer.adapters.library import AdapterLibrary
from runtime.workers.lora_base import LoraBase
from tests.trainer.adapters.conftest import FakeHost, with_library

ROOT = Path(__file__).parents[3]

PLACES = [
    "publish.after_reserve=1",
    "durable.before_write=1",
    "durable.before_file_sync=1",
    "durable.before_write=2",
    "durable.before_file_sync=2",
    "durable.before_directory_sync=1",
    "durable.before_rename=1",
    "durable.before_parent_sync=1",
    "publish.after_stage=1",
    "publish.before_load=1",
    "publish.before_commit=1",
    "publish.in_transaction=1",
    "publish.after_commit=1",
]
"""Failpoint, and at which time of passing it."""

PUBLISH = """
import sys
from pathlib import Path
from runtime import failpoints
from runtime.workers.lora_base import LoraBase, Target
from tests.trainer.adapters.conftest import with_library
import msgspec
base = msgspec.json.decode(sys.argv[1], type=LoraBase)
async def body(library, host):
    failpoints.configure(sys.argv[2])
    await library.publish("a", Path(sys.argv[3]))
with_library(Path(sys.argv[4]), base, body)
"""


def action(place: str, verb: str) -> str:
    name, _, time = place.partition("=")
    return f"{name}={verb}:{time}"


def check(state: Path, base: LoraBase, *, new: bool) -> None:
    """One version serves, it can be read, and nothing lies about beside what the rows say."""

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        version = library.resolve("a")
        assert version is not None
        assert version.number == (2 if new else 1)
        assert host.loaded == [version.key]
        kept = sorted(path.name for path in (state / "adapters" / "a").iterdir())
        assert kept == [str(n) for n in library.get("a").versions]

    with_library(state, base, body)


async def publish_old(library: AdapterLibrary, host: FakeHost, source: Path) -> None:
    await library.publish("a", source)


def test_the_places_are_all_there_are() -> None:
    package = Path(runtime.__file__).parent
    text = "".join(
        path.read_text() for path in [package / "durable.py", package / "trainer" / "adapters" / "publishing.py"]
    )
    assert set(re.findall(r'failpoint\("([^"]+)"', text)) == {place.partition("=")[0] for place in PLACES}


@pytest.mark.parametrize("place", PLACES)
def test_a_raise(place: str, tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    committed = place == "publish.after_commit=1"

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        old = await library.publish("a", sources[0])
        failpoints.configure(action(place, "raise"))
        try:
            with pytest.raises(failpoints.FailpointError):
                await library.publish("a", sources[1])
        finally:
            failpoints.configure("")
        version = library.resolve("a")
        assert version is not None
        assert (version == old) is not committed
        await library.ready(version)

    with_library(tmp_path, tiny_base, body)
    check(tmp_path, tiny_base, new=committed)


def test_an_exit(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    """All places in one test: each is a process of its own, and they run beside each other."""
    import msgspec

    running = {}
    for index, place in enumerate(PLACES):
        state = tmp_path / str(index)
        with_library(state, tiny_base, lambda library, host: publish_old(library, host, sources[0]))
        arguments = [msgspec.json.encode(tiny_base).decode(), action(place, "exit"), str(sources[1]), str(state)]
        running[place, state] = [sys.executable, "-c", PUBLISH, *arguments]
    waiting = list(running.items())
    while waiting:
        batch, waiting = waiting[:2], waiting[2:]
        children = [(where, subprocess.Popen(command, cwd=ROOT)) for where, command in batch]
        for (place, state), child in children:
            assert child.wait(120) == 70, place
            check(state, tiny_base, new=place == "publish.after_commit=1")
