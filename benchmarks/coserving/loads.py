"""Loads of requests on a service in this process, for a number of seconds, and the times of their tokens."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from runtime.engine.service import EngineService
from runtime.messages import SamplingParams, Submission


@dataclass(frozen=True, kw_only=True)
class Load:
    """Random prompts, each answered greedily to its full length."""

    name: str
    prompt: int = 64
    """Tokens of a prompt."""
    output: int = 64
    """Tokens of an answer."""
    at_once: int | None = None
    """Clients that send the next request when one ends; None: requests come at random times (Poisson)."""


@dataclass(eq=False)
class Served:
    """What was served in one window of time."""

    seconds: float
    ttft: list[float] = field(default_factory=list)
    """Seconds from a request to its first token."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between two tokens of one answer."""
    tokens: int = 0
    """Generated."""

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds


async def serve(
    service: EngineService, load: Load, seconds: float, *, seed: int, requests_per_second: float = 1.0
) -> Served:
    """Offer a load for `seconds`, then abort what is unfinished. `requests_per_second`: of a load that comes at random
    times."""
    rng, served = random.Random(seed), Served(seconds)
    end = time.perf_counter() + seconds
    clients: list[asyncio.Task[None]] = []
    if load.at_once is not None:
        clients = [asyncio.create_task(_client(service, load, served, rng, end)) for _ in range(load.at_once)]
        await asyncio.sleep(seconds)
    else:
        while (wait := rng.expovariate(requests_per_second)) < end - time.perf_counter():
            await asyncio.sleep(wait)
            clients.append(asyncio.create_task(_request(service, load, served, rng, end)))
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
    for client in clients:
        client.cancel()
    for client in clients:
        with suppress(asyncio.CancelledError):
            await client
    await until(lambda: not service.engine.busy)  # aborted ones are not to run in the next window
    return served


async def _client(service: EngineService, load: Load, served: Served, rng: random.Random, end: float) -> None:
    while time.perf_counter() < end:
        await _request(service, load, served, rng, end)


async def _request(service: EngineService, load: Load, served: Served, rng: random.Random, end: float) -> None:
    prompt = rng.choices(range(service.vocab_size), k=load.prompt)
    params = SamplingParams(max_tokens=load.output, temperature=0.0, ignore_eos=True)
    begun = time.perf_counter()
    times: list[float] = []
    submission = Submission(request_id=f"load-{rng.random()}", prompt_ids=prompt, params=params)
    try:
        async with service.submit(submission) as answer:
            async for output in answer:
                times += [time.perf_counter()] * len(output.token_ids)
    finally:
        inside = [moment for moment in times if moment <= end]
        served.ttft += [moment - begun for moment in inside[:1]]
        served.gaps += [later - earlier for earlier, later in pairwise(inside)]
        served.tokens += len(inside)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread changes, and does not announce."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
