"""Adapters through the service: loaded beside the engine, counted while they are used."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.peft import AdapterInvalid
from runtime.engine.answers import AnswerRounds
from runtime.engine.service import EngineService
from runtime.errors import AdapterUnavailable, EngineUnavailable
from runtime.messages import Output, SamplingParams, Submission
from runtime.support import failpoints
from tests.adapter_files import make_adapter
from tests.engine.services import check_empty, gather, run
from tests.waiting import until


def ask(name: str, adapter: str) -> Submission:
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
    return Submission(request_id=name, prompt_ids=[5, 6, 7], params=params, adapter=adapter)


def test_uses_are_counted_until_the_last_stream_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model, tmp_path / "a")

    async def body(service: EngineService) -> None:
        await service.load_adapter("a@1:x", str(tmp_path / "a"))
        first, second = service.submit(ask("1", "a@1:x")), service.submit(ask("2", "a@1:x"))
        assert service.adapter_in_use("a@1:x")
        await service.unload_adapter("a@1:x")  # while both run
        late = service.submit(ask("3", "a@1:x"))
        with pytest.raises(AdapterUnavailable):
            await gather(late)
        second.cancel()
        assert service.adapter_in_use("a@1:x")
        outputs = await gather(first)
        assert outputs[-1].finish_reason == "length"
        assert not service.adapter_in_use("a@1:x")
        keys = await service.call(lambda: service.engine._executor._slots.keys)  # type: ignore[attr-defined]
        assert keys == []

    service = run(tiny_model, body)
    check_empty(service)
    assert not service._submissions
    assert not service._labels
    assert not service._adapter_streams


def test_what_cannot_be_loaded_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    async def body(service: EngineService) -> None:
        with pytest.raises(AdapterInvalid):
            await service.load_adapter("a", str(tmp_path))
        with pytest.raises(AdapterUnavailable):
            await gather(service.submit(ask("1", "a")))
        await service.unload_adapter("a")

    check_empty(run(tiny_model, body))


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_load_that_fails_on_the_engines_thread(tiny_model: Path, tmp_path: Path) -> None:
    """Fault 25: what was loaded before serves on, and the next try succeeds."""
    make_adapter(tiny_model, tmp_path / "a")

    async def body(service: EngineService) -> None:
        await service.load_adapter("a@1:x", str(tmp_path / "a"))
        before = await gather(service.submit(ask("1", "a@1:x")))
        for place in ("adapters.prepare", "adapters.load"):
            failpoints.configure(f"{place}=raise:1")
            with pytest.raises(failpoints.FailpointError):
                await service.load_adapter("a@2:y", str(tmp_path / "a"))
            with pytest.raises(AdapterUnavailable):
                await gather(service.submit(ask("2", "a@2:y")))
        after = await gather(service.submit(ask("3", "a@1:x")))
        assert tokens(before) == tokens(after)  # outputs that wait for their reader are merged
        await service.load_adapter("a@2:y", str(tmp_path / "a"))
        assert (await gather(service.submit(ask("4", "a@2:y"))))[-1].finish_reason == "length"

    check_empty(run(tiny_model, body))


async def in_memory(service: EngineService) -> tuple[list[str], list[str]]:
    """Keys that are loaded, and prepared ones, once what was cancelled is reverted."""
    await until(lambda: not service._reverts)
    slots = service.engine._executor._slots  # type: ignore[attr-defined]
    return await service.call(lambda: (slots.keys, list(slots._prepared)))


@pytest.mark.parametrize("place", ["adapters.prepare", "adapters.load"])
def test_a_load_whose_caller_is_cancelled_is_reverted(tiny_model: Path, tmp_path: Path, place: str) -> None:
    """The next load of the same adapter waits for that, and stays."""
    make_adapter(tiny_model, tmp_path / "a")

    async def body(service: EngineService) -> None:
        for again in (False, True):
            failpoints.configure(f"{place}=hold")
            load = asyncio.create_task(service.load_adapter("a@1:x", str(tmp_path / "a")))
            await until(lambda: failpoints.passed(place))
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            later = asyncio.create_task(service.load_adapter("a@1:x", str(tmp_path / "a"))) if again else None
            await asyncio.sleep(0)
            failpoints.release(place)
            if later is not None:
                await later
            assert await in_memory(service) == (["a@1:x"] if again else [], [])
        assert (await gather(service.submit(ask("1", "a@1:x"))))[-1].finish_reason == "length"

    check_empty(run(tiny_model, body))


@pytest.mark.parametrize("place", ["write", "adapters.prepare"])
def test_an_evaluation_that_is_cancelled_leaves_nothing(tiny_model: Path, tmp_path: Path, place: str) -> None:
    """Whether its adapter is being written or read then: no adapter in memory, and no file."""
    began, goes_on = threading.Event(), threading.Event()

    class OneSnapshot:
        parameters: Mapping[str, Any] = {}

        def write_adapter(self, folder: Path, parameters: Mapping[str, Any]) -> None:
            began.set()
            assert place != "write" or goes_on.wait(60)
            make_adapter(tiny_model, folder)

    async def body(service: EngineService) -> None:
        rounds = AnswerRounds(service, None, job_id="j", name="a", folder=tmp_path / "job")  # type: ignore[arg-type]
        failpoints.configure("adapters.prepare=hold")
        answers = asyncio.create_task(rounds.run(1, OneSnapshot(), lambda done: None))  # type: ignore[arg-type]
        await until(lambda: began.is_set() if place == "write" else failpoints.passed(place))
        answers.cancel()
        goes_on.set()
        failpoints.release("adapters.prepare")
        with pytest.raises(asyncio.CancelledError):
            await answers
        assert await in_memory(service) == ([], [])
        assert list((tmp_path / "job").iterdir()) == []

    check_empty(run(tiny_model, body))


def test_requests_for_more_versions_than_there_are_places_wait_for_one(tiny_model: Path, tmp_path: Path) -> None:
    """Three versions over one place, all at once, and again: answers as one at a time. The base's do not wait."""
    keys = [f"{name}@1:x" for name in "abc"]
    for seed, key in enumerate(keys):
        make_adapter(tiny_model, tmp_path / key, seed=seed + 1)
    reads: list[str] = []

    def files(key: str) -> Callable[[], str]:
        def read() -> str:
            reads.append(key)
            return str(tmp_path / key)

        return read

    async def body(service: EngineService) -> None:
        for key in keys:
            await service.add_adapter(key, files(key))
        await service.warm_adapter(keys[0])
        await service.warm_adapter(keys[1])  # in its place: nothing used it
        assert [service.adapter_loaded(key) for key in keys] == [False, True, False]
        alone = [tokens(await gather(service.submit(ask(key, key)))) for key in keys]
        assert len({tuple(one) for one in alone}) == 3
        reads.clear()
        for turn in range(2):
            streams = [service.submit(ask(f"{n}/{turn}", key)) for key in ("", *keys) for n in (f"1{key}", f"2{key}")]
            assert await service.call(lambda: len(service.engine.scheduler.adapters)) > 0
            await service.call(service.engine.observe)
            assert 'reason="adapter"} 0.0' not in service.metrics.render()[0].decode()
            answers = [tokens(outputs) for outputs in await asyncio.gather(*map(gather, streams))]
            assert answers[2:] == [one for one in alone for _ in range(2)]
        await until(lambda: 'reason="adapter"} 0.0' in service.metrics.render()[0].decode())
        assert reads == []  # they are still in memory

    check_empty(run(tiny_model, body, max_loaded=1, max_place_wait="10ms"))


def test_the_version_that_a_request_waits_for_goes_or_cannot_be_read(tiny_model: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model, tmp_path / "a")
    folders = {"a@1:x": tmp_path / "a", "b@1:x": tmp_path / "a", "c@1:x": tmp_path / "nothing"}

    async def body(service: EngineService) -> None:
        service.tokenizer_of = lambda card: None  # type: ignore[method-assign]  # the folder goes after it was read
        for key, folder in folders.items():
            await service.add_adapter(key, partial(str, folder))
        failpoints.configure("adapters.load=hold")
        streams = [service.submit(ask(key, key)) for key in folders]
        await until(lambda: failpoints.passed("adapters.load"))
        gone = asyncio.create_task(service.unload_adapter("b@1:x"))
        failpoints.release("adapters.load")
        await gone
        assert (await gather(streams[0]))[-1].finish_reason == "length"
        with pytest.raises(AdapterUnavailable, match="is not loaded any more"):
            await gather(streams[1])
        with pytest.raises(AdapterUnavailable, match="missing or damaged"):
            await gather(streams[2])
        with pytest.raises(AdapterInvalid):
            await service.warm_adapter("c@1:x")
        assert (await gather(service.submit(ask("again", "a@1:x"))))[-1].finish_reason == "length"

    check_empty(run(tiny_model, body, max_loaded=1))


def test_calls_to_an_engine_that_is_gone(tiny_model: Path) -> None:
    stopped: list[EngineService] = []

    async def body(service: EngineService) -> None:
        await service.stop(0.0)
        with pytest.raises(EngineUnavailable):
            await service.call(lambda: stopped.append(service))

    run(tiny_model, body)
    assert stopped == []
