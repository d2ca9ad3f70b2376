"""The C++ ops against what this machine can do at most, by weight type and shape.

python -m benchmarks.kernels                              every weight type, SmolLM2's shapes, 1 to 512 rows
python -m benchmarks.kernels --types int8,int4 --rows 1   some of it
EFT_KERNELS_VARIANT=avx2 python -m benchmarks.kernels     another variant

One row is bound by memory (GEMV): bytes of weights a second as a share of the read bandwidth. Many rows are bound by
arithmetic (GEMM): operations a second as a share of the type's peak. Integer weights meet activations of two bytes, so
each of their products is two products of bytes, and the peak is half that of bytes. Copies of a weight are gone
through in turn, more than caches hold. Use an idle machine.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peak import Peaks, measure
from kernels import Weight, quantise_int4, quantise_int8
from kernels.cpu import CpuOps

SHAPES = {
    "qkv": (960, 576),
    "out": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "logits": (49152, 576),
}
"""SmolLM2-135M's linears, [out, in]."""
ROWS = (1, 4, 16, 32, 64, 512)
COLD = 600 << 20
"""Bytes of copies of a weight that are gone through in turn."""
MIN_TIME = 0.15
"""Seconds that one figure is measured for."""


@dataclass(frozen=True)
class WeightType:
    """How weights are made, how large one is, and which of the peaks binds it."""

    make: Callable[[torch.Tensor], Weight]
    peak: Callable[[Peaks], float]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    reason = CpuOps.unavailable()
    if reason is not None:
        sys.stderr.write(f"the C++ ops cannot run here: {reason}\n")
        return 1
    ops = CpuOps()
    types = {
        "float32": WeightType(lambda w: w, lambda p: p.floats),
        "int8": WeightType(lambda w: ops.prepare(quantise_int8(w)), lambda p: p.bytes / 2),
        "int4": WeightType(lambda w: ops.prepare(quantise_int4(w)), lambda p: p.bytes / 2),
    }
    peaks = measure(ops.variant, torch.get_num_threads())
    console = Console()
    console.print(
        f"{ops.variant.name}, {torch.get_num_threads()} threads: reads {peaks.read / 1e9:.1f} GB/s, "
        f"float32 {peaks.floats / 1e9:.0f} GFLOP/s, bytes {peaks.bytes / 1e9:.0f} GOP/s"
    )
    rows = [int(count) for count in options.rows.split(",")]
    table = Table("type", "op", "rows", "µs", "GB/s", "of read", "GOP/s", "of peak")
    for name in options.types.split(","):
        for shape in options.shapes.split(","):
            for count in rows:
                _add(table, ops, name, types[name], shape, count, peaks)
    console.print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="float32,int8,int4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    return parser


def _add(table: Table, ops: CpuOps, name: str, kind: WeightType, shape: str, rows: int, peaks: Peaks) -> None:
    out, size = SHAPES[shape]
    weight = kind.make(torch.randn(out, size))
    num_bytes = weight.nbytes if isinstance(weight, torch.Tensor) else weight.num_bytes
    weights = [weight, *(copy.deepcopy(weight) for _ in range(COLD // num_bytes))]
    x = torch.randn(rows, size)
    seconds = _seconds(lambda turn: ops.linear(x, weights[turn % len(weights)]))
    read, operations = num_bytes / seconds, 2.0 * rows * out * size / seconds
    table.add_row(
        name,
        shape,
        str(rows),
        f"{seconds * 1e6:.0f}",
        f"{read / 1e9:.1f}",
        f"{read / peaks.read:.0%}",
        f"{operations / 1e9:.0f}",
        f"{operations / kind.peak(peaks):.0%}",
    )


def _seconds(work: Callable[[int], object]) -> float:
    """The median of some runs through all weights."""
    times: list[float] = []
    turn = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < MIN_TIME or len(times) < 5:
        start = time.perf_counter()
        work(turn)
        times.append(time.perf_counter() - start)
        turn += 1
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    sys.exit(main())
