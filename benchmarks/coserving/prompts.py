"""Long prompts beside a stream: the time per token that the stream keeps, and what that costs the prompts.

python -m benchmarks.coserving.prompts                                 int8: no target, 50 ms, 100 ms
python -m benchmarks.coserving.prompts --types none --targets none 50ms 75ms 100ms
python -m benchmarks.coserving.prompts --prompts 4 --length 6000

One stream decodes; then all prompts come at once. Counted are the gaps between the stream's tokens from then on until
the last prompt has its first token, and the prompts' tokens a second in that time. All targets take turns, each in a
service of its own; what prompts lose is the median over turns of the ratio to the same turn without a target. Use an
idle machine.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

from msgspec import Struct
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.coserving.loads import percentile
from runtime.engine.service import EngineService
from runtime.messages import SamplingParams, Submission
from runtime.support.memory import keep_freed_memory
from settings.load import load as load_settings

WARM_TOKENS = 60
"""Of the stream, before the prompts come."""


class Beside(Struct, frozen=True):
    """What one turn with one target gave. Times in seconds."""

    gaps: list[float]
    prompt_rate: float
    """Tokens a second of all prompts together."""


async def measure(service: EngineService, prompts: int, length: int, seed: int) -> Beside:
    """Let `prompts` prompts of `length` tokens come while a stream decodes."""
    rng = random.Random(seed)
    times: list[float] = []
    warm = asyncio.Event()

    async def answer(tokens: int, name: str, output: int, took: list[float]) -> None:
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        ids = rng.choices(range(service.vocab_size), k=tokens)
        submission = Submission(request_id=f"{name}-{seed}", prompt_ids=ids, params=params)
        async with service.submit(submission) as outputs:
            async for one in outputs:
                took += [time.perf_counter()] * len(one.token_ids)
                if len(took) > WARM_TOKENS:
                    warm.set()

    stream = asyncio.create_task(answer(16, "stream", 4000, times))
    await warm.wait()
    begun = time.perf_counter()
    await asyncio.gather(*(answer(length, f"prompt-{index}", 1, []) for index in range(prompts)))
    end = time.perf_counter()
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    gaps = [later - earlier for earlier, later in pairwise(times) if begun <= later <= end]
    return Beside(gaps, prompts * length / (end - begun))


async def run(given: argparse.Namespace, weights: str, console: Console) -> None:
    """Measure one type of weights, and print its table."""
    blocks = given.prompts * (given.length // 16 + 2) + 320
    found: dict[str, list[Beside]] = {target: [] for target in given.targets}
    services = {}
    for target in given.targets:
        flags = {
            "model": given.model,
            "dtype": "float32",
            "quantization": weights,
            "prefix_caching": False,
            "num_blocks": blocks,
            "tpot_target": None if target == "none" else target,
        }
        services[target] = EngineService.load(load_settings(env={}, flags=flags).settings)
        services[target].start()
    try:
        for service in services.values():
            await measure(service, 1, 512, seed=0)
        for turn in range(given.repeats):
            for target, service in services.items():
                found[target].append(await measure(service, given.prompts, given.length, seed=turn + 1))
    finally:
        for service in services.values():
            await service.stop(0.0)
    table = Table(title=f"a stream beside {given.prompts} prompts of {given.length} tokens, {weights}")
    for column in ("target", "TPOT p50", "TPOT p95", "prompts", "of theirs without a target"):
        table.add_column(column, justify="left" if column == "target" else "right")
    plain = found[given.targets[0]]
    for target, turns in found.items():
        p50, p95 = (statistics.median(percentile(one.gaps, share) for one in turns) for share in (0.5, 0.95))
        rate = statistics.median(one.prompt_rate for one in turns)
        kept = statistics.median(one.prompt_rate / base.prompt_rate for one, base in zip(turns, plain, strict=True))
        table.add_row(target, f"{1e3 * p50:.1f} ms", f"{1e3 * p95:.1f} ms", f"{rate:.0f} tok/s", f"{kept:.0%}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coserving.prompts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="as for `eft serve`; default: demo")
    parser.add_argument("--types", nargs="+", default=["int8"], help="settings of `quantization`; default: int8")
    parser.add_argument(
        "--targets", nargs="+", default=["none", "50ms", "100ms"], help="values of `tpot_target`; the first is what "
        "the others are compared with",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=4, help="that come at once; default: 4")
    parser.add_argument("--length", type=int, default=6000, help="tokens of each; default: 6000")
    parser.add_argument("--repeats", type=int, default=3, help="turns; default: 3")
    given = parser.parse_args(argv)
    console = Console()
    if warning := machine.busy():
        console.print(warning, style="yellow")
    keep_freed_memory()
    for weights in given.types:
        asyncio.run(run(given, weights, console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
