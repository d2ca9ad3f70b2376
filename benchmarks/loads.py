"""Loads on a running peer, and what is measured of them. The peer is warm, and has never seen the prompts."""

import asyncio
import statistics
import time
from collections.abc import Sequence

from msgspec import Struct

from benchmarks.peers import Driver, PeerFailed
from benchmarks.work import Measurement, Prompts, Unit
from runtime.cli.loadgen import Sample

WARM_OUTPUT = 8
"""Tokens that each request of the warm-up generates, at most."""


class Load(Struct, frozen=True, kw_only=True):
    """A closed loop: a new request when one ends."""

    about: str
    unit: Unit
    requests: int
    at_once: int
    shared: int = 0
    """Tokens that all prompts begin with; the warm-up has them too, in as many requests at once."""
    own: int
    """Tokens of each prompt alone."""
    output: int

    @property
    def context(self) -> int:
        return self.shared + self.own + self.output


LOADS = {
    "single": Load(
        about="64 tokens in, 128 out, one request at a time",
        unit="output tok/s",
        requests=4,
        at_once=1,
        own=64,
        output=128,
    ),
    "batch": Load(
        about="64 requests of 120 tokens in and 128 out, 32 at once",
        unit="output tok/s",
        requests=64,
        at_once=32,
        own=120,
        output=128,
    ),
    "prefix": Load(
        about="16 requests, 4 at once, of 1,000 tokens that were asked before and 16 new ones; 16 out",
        unit="s to first token",
        requests=16,
        at_once=4,
        shared=1000,
        own=16,
        output=16,
    ),
    "prefill": Load(
        about="1,000 new tokens in, one out, one request at a time",
        unit="prompt tok/s",
        requests=3,
        at_once=1,
        own=1000,
        output=1,
    ),
}


async def measure(driver: Driver, load: Load, prompts: Prompts, *, peer: str, repeats: int) -> Measurement:
    """Warm up, then put the load on the peer `repeats` times. Raises `PeerFailed` where it does not do all of it."""
    result = Measurement(peer=peer, unit=load.unit)
    shared = prompts.ids(load.shared)

    async def run(requests: int, output: int) -> tuple[list[Sample], float]:
        drawn = [shared + prompts.ids(load.own) for _ in range(requests)]
        return await closed_loop(driver, drawn, output, load.at_once)

    await run(load.at_once, min(load.output, WARM_OUTPUT))
    for _ in range(repeats):
        samples, seconds = await run(load.requests, load.output)
        ttft = statistics.median(sample.ttft for sample in samples)
        result.ttft.append(ttft)
        if paces := [sample.tpot for sample in samples if sample.tpot is not None]:
            result.tpot.append(statistics.median(paces))
        match load.unit:
            case "output tok/s":
                result.values.append(load.requests * load.output / seconds)
            case "prompt tok/s":
                result.values.append((load.shared + load.own) / ttft)
            case "s to first token":
                result.values.append(ttft)
    return result


async def closed_loop(
    driver: Driver, prompts: Sequence[list[int]], output: int, at_once: int
) -> tuple[list[Sample], float]:
    """All samples, and the seconds from the first request to the last answer. Raises `PeerFailed`."""
    waiting = iter(prompts)
    samples: list[Sample] = []

    async def client() -> None:
        for prompt in waiting:
            sample = await driver.complete(prompt, output)
            samples.append(checked(sample, len(prompt), output))

    begin = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())
    except* PeerFailed as failures:
        raise failures.exceptions[0] from None
    return samples, time.perf_counter() - begin


def checked(sample: Sample, prompt: int, output: int) -> Sample:
    """Raise `PeerFailed` for a request that failed, or was less work than another peer's."""
    if sample.error is not None:
        raise PeerFailed(f"A request failed: {sample.error}")
    if (sample.prompt_tokens, sample.output_tokens) != (prompt, output):
        raise PeerFailed(
            f"A request of {prompt} tokens in and {output} out became {sample.prompt_tokens} in and "
            f"{sample.output_tokens} out"
        )
    return sample
