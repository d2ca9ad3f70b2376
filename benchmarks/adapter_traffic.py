"""Many adapters over few places: requests whose adapters follow Zipf's law, beside the same requests for the base.

Adapters that were used before are in host memory (`adapters.unused_memory`), the others are read from the disk.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.coserving.loads import percentile
from runtime.checkpoints.peft import CONFIG, WEIGHTS
from runtime.engine.service import EngineService
from runtime.messages import SamplingParams, Submission
from runtime.model.lora_base import LoraBase
from settings.load import load as load_settings

RANKS = (8, 12, 16, 20, 24, 28, 32)
"""Ranks that adapters have in turn."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Clients that send a request when their last one has ended."""

    adapters: int
    skew: float
    """Exponent of Zipf's law: the n-th adapter is asked for in proportion to n ** -skew."""
    at_once: int
    requests: int
    prompt: int
    output: int


@dataclass(eq=False)
class Passed:
    """What was served in one turn. Times in seconds."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """From a request to its first token, without the first request of each client."""
    loads: int = 0
    """Loads of adapters into a place."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def write_adapter(folder: Path, base: LoraBase, rank: int) -> Path:
    """Write a random adapter of all linears, as PEFT does."""
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (name, target) in itertools.product(range(base.num_layers), base.targets.items()):
        module = f"base_model.model.{base.layers}.{layer}.{name}"
        a = torch.randn(rank, target.in_features, generator=generator) * target.in_features**-0.5
        tensors[f"{module}.lora_A.weight"] = a.bfloat16()
        b = torch.randn(target.out_features, rank, generator=generator) * 0.01
        tensors[f"{module}.lora_B.weight"] = b.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    modules = sorted({name.rpartition(".")[2] for name in base.targets})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / CONFIG).write_bytes(msgspec.json.encode(config))
    return folder


async def serve(service: EngineService, traffic: Traffic, keys: Sequence[str], seed: int) -> Passed:
    """Serve all requests; `keys`: of the adapters, the base's is empty."""
    rng, passed = random.Random(seed), Passed()
    weights = [(n + 1) ** -traffic.skew for n in range(traffic.adapters)]
    chosen = rng.choices(range(traffic.adapters), weights, k=traffic.requests)
    prompts = [rng.choices(range(service.vocab_size), k=traffic.prompt) for _ in chosen]
    params = SamplingParams(max_tokens=traffic.output, temperature=0.0, ignore_eos=True)
    due = iter(enumerate(zip(chosen, prompts, strict=True)))

    async def client() -> None:
        for number, (adapter, prompt) in due:
            key = keys[adapter % len(keys)]
            sent, name = time.perf_counter(), f"{key}-{seed}-{number}"
            submission = Submission(request_id=name, prompt_ids=prompt, params=params, adapter=key)
            first = None
            async with service.submit(submission) as outputs:
                async for one in outputs:
                    first = first or time.perf_counter()
                    passed.tokens += len(one.token_ids)
            if number >= traffic.at_once:  # the first of all clients came at once
                passed.first.append((first or time.perf_counter()) - sent)

    before, begun = service.engine.adapter_loads.num_loads, time.perf_counter()
    await asyncio.gather(*(client() for _ in range(traffic.at_once)))
    passed.seconds = time.perf_counter() - begun
    passed.loads = service.engine.adapter_loads.num_loads - before
    return passed


async def measure(model: str, quantization: str, places: int, traffic: Traffic, repeats: int) -> list[list[Passed]]:
    """Turns of the base and of the adapters, in turns."""
    flags = {
        "model": model,
        "quantization": quantization,
        "prefix_caching": False,
        "max_loaded": places,
        "unused_memory": "4GiB",
        "num_blocks": traffic.at_once * ((traffic.prompt + traffic.output) // 16 + 2),
    }
    service = EngineService.load(load_settings(env={}, flags=flags).settings)
    service.start()
    found: list[list[Passed]] = [[], []]
    with tempfile.TemporaryDirectory() as directory:
        folders = [write_adapter(Path(directory, str(rank)), service.lora_base, rank) for rank in RANKS]
        keys = [f"a{n}@1:benchmark" for n in range(traffic.adapters)]
        try:
            for number, key in enumerate(keys):
                await service.add_adapter(key, partial(str, folders[number % len(folders)]))
            await serve(service, replace(traffic, requests=2 * traffic.adapters, prompt=8, output=2), keys, seed=0)
            for turn in range(repeats):
                for cases, asked in zip(found, ([""], keys), strict=True):
                    cases.append(await serve(service, traffic, asked, seed=turn + 1))
        finally:
            await service.stop(0.0)
    return found


def show(found: list[list[Passed]], traffic: Traffic, places: int, console: Console) -> None:
    title = f"{traffic.adapters} adapters over {places} places, skew {traffic.skew:g}, {traffic.at_once} at once"
    table = Table(title=title)
    for column in ("", "tok/s", "of the base's", "TTFT p50", "p95", "p99", "p99 / base's p50", "loads"):
        table.add_column(column, justify="right" if column else "left")
    base = found[0]
    for name, turns in zip(("base", "adapters"), found, strict=True):
        rate = statistics.median(one.rate for one in turns)
        share = statistics.median(one.rate / other.rate for one, other in zip(turns, base, strict=True))
        times = [statistics.median(percentile(one.first, part) for one in turns) for part in (0.5, 0.95, 0.99)]
        late = statistics.median(
            percentile(one.first, 0.99) / percentile(other.first, 0.5) for one, other in zip(turns, base, strict=True)
        )
        loads = statistics.median(one.loads for one in turns)
        table.add_row(
            name, f"{rate:.0f}", f"{share:.0%}", *(f"{1000 * one:.0f} ms" for one in times), f"{late:.1f}", f"{loads:g}"
        )
    console.print(table)
