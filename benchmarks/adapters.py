"""What adapters cost: a decode step's time with and without them, and requests for more than memory has places for.

python -m benchmarks.adapters                                 int8, SmolLM2: the base, 1, 16 and 64 adapters
python -m benchmarks.adapters --quantization none --rows 8    float32, eight rows
python -m benchmarks.adapters --cases 16x8-32,64x16           16 adapters of ranks 8 to 32, 64 of rank 16
python -m benchmarks.adapters traffic                         200 adapters over 16 places, by Zipf's law, 32 at once

A step is the decoder's pass, the head and argmax, on the paged cache. Every round times a step of each case, in a
random order; shares are medians over rounds of the base's time to the case's time in that round, so that a machine that
is shared disturbs both. With `--threads 1` times are those of the processor, without what others use of it. `traffic`
serves the same requests for the base and for the adapters, in turns.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.adapter_traffic import Traffic, measure, show
from kernels import AdaptedTokens, LoraFactors, PagedRows, StackFactors
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_model
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import LINEARS, Decoder
from runtime.model.lora import BatchAdaptation
from settings.load import load as load_settings

BLOCK = 16
"""Tokens of a block."""


@dataclass(frozen=True)
class AdapterCase:
    """Adapters that share the rows of a batch evenly; none: the base."""

    ranks: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> "AdapterCase":
        """`COUNTxRANK` or `COUNTxLOW-HIGH`, the ranks in even steps. Raises `ValueError`."""
        count, _, ranks = text.partition("x")
        low, _, high = ranks.partition("-")
        first, last, number = int(low), int(high or low), int(count)
        return cls(tuple(first + (last - first) * i // max(number - 1, 1) for i in range(number)))

    @property
    def name(self) -> str:
        if not self.ranks:
            return "base"
        low, high = min(self.ranks), max(self.ranks)
        return f"{len(self.ranks)} of rank {low}" if low == high else f"{len(self.ranks)} of ranks {low} to {high}"


class DecodeStep:
    """A step of `rows` rows after `context` tokens each, for one case."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, case: AdapterCase, dtype: torch.dtype, *, rows: int, context: int
    ) -> None:
        width = -(-(context + 1) // BLOCK)
        tables = torch.arange(rows * width).view(rows, width)
        slots = tables[:, context // BLOCK] * BLOCK + context % BLOCK
        paged = PagedRows(slots, [1] * rows, [context] * rows, tables, BLOCK)
        self._decoder = decoder
        self._attention = PagedAttention(decoder.ops, cache, paged, decoder.spec)
        self._tokens = torch.arange(rows) + 100
        self._positions = torch.full((rows,), context)
        owners = torch.arange(rows) % max(len(case.ranks), 1)
        adapted = [
            AdaptedTokens(own if len(case.ranks) > 1 else None, factors_of(decoder, rank, dtype, seed=index))
            for index, rank in enumerate(case.ranks)
            if len(own := (owners == index).nonzero().flatten())
        ]
        self._adaptation = BatchAdaptation(decoder.ops, adapted) if adapted else None

        # With one thread, what others do on the machine is left out.
        self._clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time

    @torch.inference_mode()
    def seconds(self) -> float:
        """Run the step once."""
        begin = self._clock()
        hidden = self._decoder.forward(self._tokens, self._positions, self._attention, self._adaptation)
        self._decoder.ops.argmax(self._decoder.local_logits(hidden))
        return self._clock() - begin


def factors_of(decoder: Decoder, rank: int, dtype: torch.dtype, *, seed: int) -> StackFactors:
    """A random adapter of all linears, as `AdapterSlots` holds one."""
    generator = torch.Generator().manual_seed(seed)

    def factors(layer: int, name: str) -> LoraFactors:
        weight = decoder.layers[layer].linears[name].weight
        inner = weight.shape_of(next(iter(weight.parts)))[1]
        sizes = [part.size for part in weight.parts.values()]
        made = LoraFactors(
            a=torch.randn(rank * len(sizes), inner, generator=generator) * inner**-0.5,
            b=tuple(torch.randn(size, rank, generator=generator) * 0.01 for size in sizes),
            columns=tuple(weight.starts.values()),
            scales=torch.full((rank * len(sizes),), 2.0),
        )
        return decoder.ops.prepare_lora(made, dtype)

    return StackFactors(
        {(layer.index, name): factors(layer.index, name) for layer in decoder.layers for name in LINEARS}
    )


def shares(steps: Sequence[DecodeStep], *, rounds: int) -> list[tuple[float, float]]:
    """Of each step, the first being the base's: seconds, and the share of the base's throughput; medians."""
    times: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    for _ in range(rounds):
        random.shuffle(order)
        for index in order:
            times[index].append(steps[index].seconds())
    return [
        (statistics.median(own), statistics.median(base / mine for base, mine in zip(times[0], own, strict=True)))
        for own in times
    ]


def measure_traffic(options: argparse.Namespace) -> int:
    """Serve requests for many adapters, and print what came of it."""
    traffic = Traffic(
        adapters=options.adapters,
        skew=options.skew,
        at_once=options.rows,
        requests=options.requests,
        prompt=options.context,
        output=options.output,
    )
    found = asyncio.run(measure(options.model, options.quantization, options.places, traffic, options.repeats))
    show(found, traffic, options.places, Console())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", nargs="?", default="steps", choices=("steps", "traffic"), help="default: steps")
    parser.add_argument("--model", default="demo", help="as for `eft serve`; default: demo")
    parser.add_argument("--quantization", default="int8", help="of the base; default: int8")
    parser.add_argument("--cases", default="1x8,16x8-32,64x8-32", help="COUNTxRANK or COUNTxLOW-HIGH, by commas")
    parser.add_argument("--dtype", default="int8", choices=("float32", "bfloat16", "int8"), help="of the adapters")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, requests at once; default: 32")
    parser.add_argument("--context", type=int, default=128, help="tokens before each row, of a prompt; default: 128")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each case; default: 40")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--adapters", type=int, default=200, help="that requests name; default: 200")
    traffic.add_argument("--places", type=int, default=16, help="`adapters.max_loaded`; default: 16")
    traffic.add_argument("--skew", type=float, default=1.0, help="exponent of Zipf's law; default: 1")
    traffic.add_argument("--requests", type=int, default=128, help="of a turn; default: 128")
    traffic.add_argument("--output", type=int, default=48, help="tokens of an answer; default: 48")
    traffic.add_argument("--repeats", type=int, default=2, help="turns of each; default: 2")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.what == "traffic":
        return measure_traffic(options)
    settings = load_settings(flags={"model": options.model, "quantization": options.quantization}).settings
    decoder = load_model(open_checkpoint(options.model), settings.model, device=torch.device("cpu"))
    if not isinstance(decoder, Decoder):
        sys.stderr.write("the model has no decoder of its own here\n")
        return 1
    width = -(-(options.context + 1) // BLOCK)
    cache = KVCache(
        decoder.kv_shapes,
        num_blocks=options.rows * width,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cases = [AdapterCase(()), *map(AdapterCase.read, options.cases.split(","))]
    steps = [
        DecodeStep(decoder, cache, case, getattr(torch, options.dtype), rows=options.rows, context=options.context)
        for case in cases
    ]
    shares(steps, rounds=3)
    table = Table(title=f"{options.rows} rows, {options.quantization}, {torch.get_num_threads()} threads")
    for column in ("", "ms a step", "of the base's throughput"):
        table.add_column(column, justify="right" if column else "left")
    for case, (seconds, share) in zip(cases, shares(steps, rounds=options.rounds), strict=True):
        table.add_row(case.name, f"{1000 * seconds:.2f}", f"{share:.0%}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
