"""Names and versions: what is there after each change, after a restart, and while memory is full."""

import asyncio
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.adapters.card import CARD, Card, Prompt, encode_card
from runtime.adapters.library import AdapterLibrary
from runtime.adapters.store import NameTaken
from runtime.adapters.versions import digest
from runtime.checkpoints.peft import AdapterInvalid
from runtime.errors import AdapterUnavailable, Conflict, InvalidRequest, NotFound
from runtime.model.lora_base import LoraBase
from tests.adapters.conftest import FakeHost, with_library


def number(library: AdapterLibrary, model: str) -> int | None:
    version = library.resolve(model)
    return version.number if version else None


def test_publish_promote_and_roll_back(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        for source in sources:
            await library.publish("news", source, job="job-1", step=7, metrics={"loss": 0.5})
        assert number(library, "news") == 3
        assert [number(library, text) for text in ("news@1", "news:2", "news@4", "other")] == [1, 2, None, None]
        await library.promote("news", 1)
        assert number(library, "news") == 1
        assert (await library.rollback("news")).number == 3
        assert (await library.rollback("news")).number == 2
        assert (await library.rollback("news")).number == 1
        with pytest.raises(Conflict, match="no version before"):
            await library.rollback("news")
        with pytest.raises(NotFound, match=r"no version 9.*1, 2, 3"):
            await library.promote("news", 9)
        version = library.get("news").versions[2]
        assert (version.job, version.step, version.metrics, version.rank) == ("job-1", 7, {"loss": 0.5}, 4)
        assert len({v.key for v in library.get("news").versions.values()}) == 3

    with_library(tmp_path, tiny_base, body)


def test_everything_is_there_after_a_restart(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def before(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("a", sources[0])
        await library.publish("a", sources[1])
        await library.set_alias("latest", "a")
        await library.publish("b", sources[2])
        await library.unload("b")

    async def after(library: AdapterLibrary, host: FakeHost) -> None:
        assert host.loaded == [library.get("a").version.key]
        assert (number(library, "latest"), number(library, "a@1"), number(library, "b")) == (2, 1, None)
        await library.load("b")
        assert number(library, "b") == 1

    with_library(tmp_path, tiny_base, before)
    with_library(tmp_path, tiny_base, after)


@pytest.mark.parametrize(
    ("served", "what"), [("NEWS", "adapter 'news'"), ("Latest", "alias 'latest'"), ("ｎews", "news")]
)
def test_a_model_served_under_a_name_that_is_taken_does_not_start(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], served: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def before(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("news", sources[0])
        await library.set_alias("latest", "news")

    async def after(library: AdapterLibrary, host: FakeHost) -> None:
        assert number(library, "news") == 1

    with_library(tmp_path, tiny_base, before)
    monkeypatch.setattr(FakeHost, "model_name", served)
    with pytest.raises(NameTaken, match=what) as caught:
        with_library(tmp_path, tiny_base, after)
    assert "--served-model-name" in str(caught.value)
    monkeypatch.setattr(FakeHost, "model_name", "other")
    with_library(tmp_path, tiny_base, after)


def test_two_names_that_differ_in_case_published_at_once(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        done = await asyncio.gather(
            *(library.publish(name, sources[0]) for name in ("News", "news", "NEWS")), return_exceptions=True
        )
        assert [isinstance(one, Conflict) for one in done].count(True) == 2
        assert len(library.list()) == 1

    with_library(tmp_path, tiny_base, body)


def test_a_card_goes_along(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    """From the folder that is published to the version's, and through a restart; what is none is no card."""
    folders = [tmp_path / str(index) for index in range(4)]
    for folder in folders:
        shutil.copytree(sources[0], folder)
    card = Card(prompt=Prompt(format="alpaca", template="{instruction}"))
    (folders[0] / CARD).write_bytes(encode_card(card))
    (folders[1] / CARD).write_text("{")
    (folders[2] / CARD).symlink_to("/etc/passwd")
    os.mkfifo(folders[3] / CARD)

    async def publish(library: AdapterLibrary, host: FakeHost) -> None:
        for folder in folders:
            await library.publish("a", folder)
        check(library)

    async def restarted(library: AdapterLibrary, host: FakeHost) -> None:
        check(library)

    def check(library: AdapterLibrary) -> None:
        versions = library.get("a").versions
        assert [library.card(version) for version in versions.values()] == [card, Card(), Card(), Card()]
        assert (library.directory(versions[1]) / CARD).read_bytes() == encode_card(card)
        assert not any((library.directory(versions[number]) / CARD).exists() for number in (2, 3, 4))

    with_library(tmp_path / "state", tiny_base, publish)
    with_library(tmp_path / "state", tiny_base, restarted)


def test_numbers_and_keys_are_never_used_again(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        first = await library.publish("a", sources[0])
        await library.delete("a")
        assert number(library, "a") is None
        assert not library.directory(first).exists()
        assert host.loaded == []
        with pytest.raises(AdapterInvalid):
            await library.publish("a", tmp_path / "nothing")
        again = await library.publish("a", sources[0])
        assert (again.number, again.sha256) == (3, first.sha256)
        assert again.key != first.key
        with pytest.raises(Conflict, match="no version before"):
            await library.rollback("a")

    with_library(tmp_path, tiny_base, body)


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", "x" * 300, "Base-Model", "base-model", "ﬁne", "a b", ".hidden", "a..b", "v:3", "v@3", "a\n"],
)
def test_names_that_are_refused(name: str, tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await library.publish(name, sources[0])
        assert caught.value.param == "name"
        assert library.list() == []
        assert not any((tmp_path / "adapters").glob("*"))

    with_library(tmp_path, tiny_base, body)


def test_duplicates(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("a", sources[0], new=True)
        with pytest.raises(Conflict):
            await library.publish("a", sources[1], new=True)
        await library.set_alias("nick", "a")
        with pytest.raises(Conflict, match="alias of 'a'"):
            await library.publish("nick", sources[1])
        with pytest.raises(Conflict, match="own name"):
            await library.set_alias("a", "a")
        with pytest.raises(InvalidRequest, match="already been loaded"):
            await library.load_external("a", sources[1], inplace=False)
        results = await asyncio.gather(
            *(library.load_external("c", source, inplace=False) for source in sources), return_exceptions=True
        )
        assert sum(isinstance(result, InvalidRequest) for result in results) == 2

    with_library(tmp_path, tiny_base, body)


def test_loading_the_same_files_again_is_the_same_version(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        first = await library.load_external("a", sources[0], inplace=False)
        await library.unload("a")
        assert host.loaded == []
        assert await library.load_external("a", sources[0], inplace=False) == first
        assert (await library.load_external("a", sources[1], inplace=True)).number == 2
        link = tmp_path / "link"  # put into a folder's place once that was checked
        link.symlink_to(sources[0])
        with pytest.raises(AdapterInvalid, match="folder cannot be opened"):
            await library.load_external("b", link, inplace=False)

    with_library(tmp_path, tiny_base, body)


def test_versions_that_were_not_named_for_longest_are_forgotten(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.adapters.versions.MAX_NAMED", 2)

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        a, b, c = [await library.publish(name, source) for name, source in zip("abc", sources, strict=True)]
        assert list(host.named) == [b.key, c.key]
        host.used = {b.key}
        await library.ready(a)
        assert list(host.named) == [b.key, a.key]
        host.used = {a.key, b.key}
        await library.ready(c)  # one more than the bound, as all are in use
        host.used = set()
        await asyncio.gather(*(library.ready(version) for version in (a, b, c) * 5))
        assert set(host.named) == {a.key, b.key, c.key}

    with_library(tmp_path, tiny_base, body)


def test_files_are_read_through_once_and_again_after_a_change(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[Path] = []

    def counted(directory: Path) -> str:
        digests.append(directory)
        return digest(directory)

    monkeypatch.setattr("runtime.adapters.versions.digest", counted)

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        version = await library.publish("a", sources[0])
        folder = str(library.directory(version))
        assert [host.named[version.key]() for _ in range(3)] == [folder] * 3
        assert len(digests) == 1
        weights = library.directory(version) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(AdapterInvalid, match="files were changed"):
            host.named[version.key]()

    with_library(tmp_path, tiny_base, body)


def test_in_use_or_drained(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        first, second = [await library.publish("a", source) for source in sources[:2]]
        host.used = {first.key}
        with pytest.raises(Conflict, match="answering requests"):
            await library.delete("a")
        with pytest.raises(Conflict, match="answering requests"):
            await library.delete_version("a", 1)
        with pytest.raises(Conflict, match="current version"):
            await library.delete_version("a", 2, drain=True)
        await library.delete_version("a", 1, drain=True)
        assert list(library.get("a").versions) == [2]
        assert library.directory(second).exists()
        await library.delete("a", drain=True)
        assert library.list() == []

    with_library(tmp_path, tiny_base, body)


def test_a_canary_gets_its_share(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.adapters.library.random.random", random.Random(1).random)

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        for source in sources[:2]:
            await library.publish("a", source)
        await library.set_canary("a", 1, 0.2)
        share = sum(number(library, "a") == 1 for _ in range(2000)) / 2000
        assert 0.15 < share < 0.25
        assert number(library, "a@2") == 2
        with pytest.raises(Conflict, match="current"):
            await library.set_canary("a", 2, 0.5)
        with pytest.raises(InvalidRequest, match="from 0 to 1"):
            await library.set_canary("a", 1, float("nan"))
        await library.promote("a", 1)
        assert library.get("a").canary is None

    with_library(tmp_path, tiny_base, body)


def test_a_load_that_fails_in_the_middle_of_a_swap_leaves_the_old_version(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        old = await library.publish("a", sources[0])

        async def fail(key: str) -> None:
            raise MemoryError("no")

        with monkeypatch.context() as patch:
            patch.setattr(host, "warm_adapter", fail)
            with pytest.raises(MemoryError):
                await library.publish("a", sources[1])
        assert library.resolve("a") == old
        assert host.loaded == [old.key]
        assert [path.name for path in (tmp_path / "adapters" / "a").iterdir()] == ["1"]

    with_library(tmp_path, tiny_base, body)


def test_damaged_files_are_noticed(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def publish(library: AdapterLibrary, host: FakeHost) -> Any:
        return library.directory(await library.publish("a", sources[0]))

    async def restart(library: AdapterLibrary, host: FakeHost) -> None:
        assert host.loaded == []
        version = library.resolve("a")
        assert version is not None
        with pytest.raises(AdapterUnavailable, match="missing or damaged"):
            await library.ready(version)

    weights = with_library(tmp_path, tiny_base, publish) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with_library(tmp_path, tiny_base, restart)


def test_another_base_model_does_not_get_them(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    import dataclasses

    async def publish(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("a", sources[0])

    async def elsewhere(library: AdapterLibrary, host: FakeHost) -> None:
        assert library.resolve("a") is None
        assert host.loaded == []
        with pytest.raises(Conflict, match="another base model"):
            await library.promote("a", 1)

    with_library(tmp_path, tiny_base, publish)
    with_library(tmp_path, dataclasses.replace(tiny_base, fingerprint="other"), elsewhere)


def test_who_asked_may_leave(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    """A publish that is under way goes on when its HTTP client is gone, and nothing comes in between."""

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        host.gate.clear()
        first = asyncio.create_task(library.publish("a", sources[0]))
        second = asyncio.create_task(library.publish("a", sources[1]))
        await asyncio.sleep(0.05)
        first.cancel()
        host.gate.set()
        assert (await second).number == 2
        assert list(library.get("a").versions) == [1, 2]

    with_library(tmp_path, tiny_base, body)


def test_what_training_wrote(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    from runtime.checkpoints.peft import read_adapter, write_adapter

    adapter = read_adapter(sources[0], tiny_base, max_rank=64)

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("a", lambda path: write_adapter(path, adapter.layers, adapter.shape, tiny_base))
        for part in next(iter(adapter.layers.values())):
            part.a[0, 0] = float("nan")
        with pytest.raises(AdapterInvalid, match="finite"):
            await library.publish("a", lambda path: write_adapter(path, adapter.layers, adapter.shape, tiny_base))
        assert number(library, "a") == 1
        assert [path.name for path in (tmp_path / "adapters" / "a").iterdir()] == ["1"]
        samples = [
            sample
            for family in text_string_to_metric_families(host.metrics.render()[0].decode())
            for sample in family.samples
            if sample.name == "eft:adapter_publishes_total"
        ]
        counts = {sample.labels["outcome"]: sample.value for sample in samples}
        assert counts == {"published": 1, "refused": 1, "failed": 0}

    with_library(tmp_path, tiny_base, body)
    config = json.loads((tmp_path / "adapters" / "a" / "1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base-model"
