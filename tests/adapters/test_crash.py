"""A crash between any two steps of a publish: after the restart the old version or the new one, never neither."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import runtime
from runtime.adapters.library import AdapterLibrary
from runtime.model.lora_base import LoraBase
from runtime.support import failpoints
from tests.adapters.conftest import FakeHost, with_library

ROOT = Path(__file__).parents[2]

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
import json, os, sys
from pathlib import Path
import msgspec
from runtime.support import failpoints
from runtime.model.lora_base import LoraBase
from tests.adapters.conftest import with_library
base, source, places = msgspec.json.decode(sys.argv[1], type=LoraBase), Path(sys.argv[2]), json.loads(sys.argv[3])
for state, place in places.items():
    async def body(library, host):
        failpoints.configure(place)
        await library.publish("a", source)
    child = os.fork()  # no thread runs yet; importing torch once is enough
    if child == 0:
        with_library(Path(state), base, body)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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


def test_the_places_are_all_there_are() -> None:
    package = Path(runtime.__file__).parent
    text = "".join(
        path.read_text() for path in [package / "support" / "durable.py", package / "adapters" / "publishing.py"]
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
    """The process ends there and then, as with `kill -9`."""
    states = {place: tmp_path / str(index) for index, place in enumerate(PLACES)}
    for state in states.values():
        with_library(state, tiny_base, lambda library, host: library.publish("a", sources[0]))
    places = {str(state): action(place, "exit") for place, state in states.items()}
    command = [sys.executable, "-c", PUBLISH, msgspec.json.encode(tiny_base).decode(), str(sources[1])]
    done = subprocess.run([*command, json.dumps(places)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["70"] * len(PLACES), done.stderr
    for place, state in states.items():
        check(state, tiny_base, new=place == "publish.after_commit=1")
