"""Checkpoints of running jobs in the library: found by their names, loaded when asked for, gone with their job."""

from pathlib import Path

import pytest

from runtime.adapters.library import AdapterLibrary
from runtime.errors import InvalidRequest
from runtime.model.lora_base import LoraBase
from tests.adapters.conftest import FakeHost, with_library


def test_they_are_found_by_name_and_step(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        await library.publish("news", sources[0])
        await library.offer("news", "job-1", {40: sources[2], 20: sources[1]})
        assert [version.id for version in library.checkpoints()] == ["news:ckpt-step-20", "news:ckpt-step-40"]
        version = library.resolve("news:ckpt-step-40")
        assert version is not None
        assert (version.name, version.job, version.step, version.rank) == ("news", "job-1", 40, 4)
        assert library.fits(version)
        assert library.directory(version) == sources[2]
        published = library.resolve("news")
        assert published is not None
        assert library.directory(published) == tmp_path / "adapters" / "news" / "1"
        assert [library.resolve(name) for name in ("news:ckpt-step-30", "other:ckpt-step-40", "news@40")] == [None] * 3
        assert [record.name for record in library.list()] == ["news"]
        assert list(library.get("news").versions) == [1]

    with_library(tmp_path, tiny_base, body)


def test_they_can_be_named_once_asked_for_and_as_long_as_offered(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        await library.offer("a", "job-1", {2: sources[0], 4: sources[1]})
        versions = library.checkpoints()
        assert not host.named
        for version in versions:
            await library.ready(version)
        assert list(host.named) == [version.key for version in versions]
        await library.offer("a", "job-1", {4: sources[1], 6: sources[2]})
        assert list(host.named) == [versions[1].key]
        assert library.checkpoints()[0] is versions[1]  # read once
        await library.offer("b", "job-2", {2: sources[0]})
        await library.offer("a", "job-1", {})
        assert not host.named
        assert [version.id for version in library.checkpoints()] == ["b:ckpt-step-2"]

    with_library(tmp_path, tiny_base, body)


def test_the_same_step_of_another_job_is_another_version(
    tmp_path: Path, tiny_base: LoraBase, sources: list[Path]
) -> None:
    """So that the KV of one is never found by the other, nor that of a version with this number."""

    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        keys = {(await library.publish("a", sources[0])).key}
        for job, source in (("job-1", sources[0]), ("job-2", sources[1])):
            await library.offer("a", job, {1: source})
            keys.add(library.checkpoints()[0].key)
            await library.offer("a", job, {})
        assert len(keys) == 3

    with_library(tmp_path, tiny_base, body)


def test_what_cannot_be_read_is_not_offered(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        await library.offer("a", "job-1", {2: tmp_path / "nothing", 4: sources[0]})
        assert [version.id for version in library.checkpoints()] == ["a:ckpt-step-4"]

    with_library(tmp_path, tiny_base, body)


def test_no_adapter_is_called_like_one(tmp_path: Path, tiny_base: LoraBase, sources: list[Path]) -> None:
    async def body(library: AdapterLibrary, host: FakeHost) -> None:
        with pytest.raises(InvalidRequest, match="must not end like a checkpoint"):
            await library.publish("a:ckpt-step-4", sources[0])
        assert (await library.publish("a:ckpt-step-four", sources[0])).number == 1

    with_library(tmp_path, tiny_base, body)
