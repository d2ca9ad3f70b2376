"""Adapters through the service: loaded beside the engine, counted while they are used."""

from pathlib import Path

import pytest

from runtime.checkpoints.peft import AdapterInvalid
from runtime.engine.service import EngineService
from runtime.errors import AdapterUnavailable, EngineUnavailable
from runtime.messages import Output, SamplingParams, Submission
from runtime.support import failpoints
from tests.adapter_files import make_adapter
from tests.engine.services import check_empty, gather, run


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


def test_calls_to_an_engine_that_is_gone(tiny_model: Path) -> None:
    stopped: list[EngineService] = []

    async def body(service: EngineService) -> None:
        await service.stop(0.0)
        with pytest.raises(EngineUnavailable):
            await service.call(lambda: stopped.append(service))

    run(tiny_model, body)
    assert stopped == []
