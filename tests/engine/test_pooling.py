"""Pooling as a kind of request: right in chunks, beside requests that generate, and where blocks are short."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine.service import EngineService
from runtime.messages import Output, Pooling, SamplingParams, Submission
from runtime.support import failpoints
from tests.engine.services import check_empty, gather, run

PROMPT = [3 + i % 500 for i in range(150)]


def asked(name: str, kind: Pooling, prompt: list[int] = PROMPT, **options: Any) -> Submission:
    return Submission(request_id=name, prompt_ids=prompt, params=SamplingParams(), pooling=kind, **options)


def generating(name: str, length: int = 20, tokens: int = 60) -> Submission:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return Submission(request_id=name, prompt_ids=[7 + i % 300 for i in range(length)], params=params)


async def vector_of(service: EngineService, submission: Submission) -> np.ndarray:
    [output] = await gather(service.submit(submission))
    assert (output.finish_reason, output.token_ids, output.text) == ("stop", [], "")
    assert output.prompt_tokens == len(submission.prompt_ids)
    return np.array(output.pooled)


@pytest.mark.parametrize("kind", ["mean", "last"])
@pytest.mark.parametrize("asynchronous", ["on", "off"])
def test_chunks_and_neighbours_change_nothing(tiny_model: Path, kind: Pooling, asynchronous: str) -> None:
    whole: list[np.ndarray] = []
    texts: list[list[int]] = []

    async def alone(service: EngineService) -> None:
        whole.append(await vector_of(service, asked("a", kind)))
        texts.append([id for output in await gather(service.submit(generating("b"))) for id in output.token_ids])

    async def beside(service: EngineService) -> None:
        others = [service.submit(generating(f"g{n}")) for n in range(4)]
        pooled = [service.submit(asked(f"p{n}", kind)) for n in range(3)]
        for stream in pooled:
            [output] = await gather(stream)
            assert np.allclose(output.pooled, whole[0], atol=1e-4)
        for stream in others:
            assert [id for output in await gather(stream) for id in output.token_ids] == texts[0]
        again = await vector_of(service, asked("again", kind))  # its prefix is cached by now
        assert np.allclose(again, whole[0], atol=1e-4)

    check_empty(run(tiny_model, alone, threads=1))
    check_empty(run(tiny_model, beside, threads=1, max_batched_tokens=32, asynchronous=asynchronous))


def test_a_short_pool_preempts_those_that_generate(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        generate = [service.submit(generating(f"g{n}", length=30, tokens=150)) for n in range(3)]
        pooled = [service.submit(asked(f"p{n}", "mean")) for n in range(3)]
        vectors = [(await gather(stream))[-1].pooled for stream in pooled]
        assert np.allclose(vectors[0], vectors[1], atol=1e-4)
        assert np.allclose(vectors[0], vectors[2], atol=1e-4)
        for stream in generate:
            assert (await gather(stream))[-1].generated_tokens == 150

    check_empty(run(tiny_model, body, threads=1, num_blocks=24, max_batched_tokens=48))


def test_a_batch_that_fails_is_not_pooled_twice(tiny_model: Path) -> None:
    """The rows of a failed step are computed one by one: no chunk counts twice."""
    expected: list[np.ndarray] = []

    async def alone(service: EngineService) -> None:
        expected.append(await vector_of(service, asked("a", "mean")))

    async def failing(service: EngineService) -> None:
        failpoints.configure("worker.row=raise:2")
        [output] = await gather(service.submit(asked("a", "mean")))
        assert np.allclose(output.pooled, expected[0], atol=1e-4)

    run(tiny_model, alone, threads=1)
    check_empty(run(tiny_model, failing, threads=1, max_batched_tokens=32))


def test_leaving_gives_the_blocks_back(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        streams = [service.submit(asked(f"p{n}", "mean", PROMPT * 3)) for n in range(8)]
        for stream in streams:
            stream.cancel()
        assert await vector_of(service, asked("last", "mean")) is not None

    check_empty(run(tiny_model, body, threads=1, max_batched_tokens=32))


def test_background_requests_come_last_and_give_way(tiny_model: Path) -> None:
    """With one slot: a live request takes the place of one of the background, which is computed all the same."""
    ends: list[str] = []

    async def body(service: EngineService) -> None:
        import asyncio

        from msgspec.structs import replace

        background = [replace(generating(f"background-{n}", tokens=200), background=True) for n in range(2)]
        streams = [service.submit(one) for one in background]
        first: Output = await anext(streams[0])
        assert first.token_ids

        async def follow(name: str, stream: Any) -> list[Output]:
            outputs = await gather(stream)
            ends.append(name)
            return outputs

        live = follow("live", service.submit(generating("live", tokens=5)))
        rest = await asyncio.gather(live, *(follow(f"background-{n}", one) for n, one in enumerate(streams)))
        assert ends[0] == "live"
        assert [outputs[-1].generated_tokens for outputs in rest] == [5, 200, 200]

    check_empty(run(tiny_model, body, threads=1, max_running=1))
