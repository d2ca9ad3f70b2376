"""The C++ ops against what this machine can do at most, by weight type and shape.

python -m benchmarks.kernels                              every weight type, SmolLM2's shapes, 1 to 512 rows
python -m benchmarks.kernels --types int8,int4 --rows 1   some of it
python -m benchmarks.kernels --types attention            attention alone
EFT_KERNELS_VARIANT=avx2 python -m benchmarks.kernels     another variant

One row is bound by memory (GEMV): bytes of weights a second are to be 75% of what reading alone reaches. From 32 rows
on linears are bound by arithmetic (GEMM): operations a second are to be 55% of the peak, which for integer weights is
that of bytes, for int8 with sums of 32 bits. `limit` says whether they are. What the machine can do is measured right
before or after each timing, and shares are medians over these pairs, so that a slower clock or a thread that had to
wait changes both. Whoever uses the same cores' caches changes one: use an idle machine. Copies of a weight are gone
through in turn, more than any cache holds. Attention is bound by arithmetic for prompts, and by reading the KV cache
for rows that decode.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.linears import COLD, SHAPES, TYPES, ColdLinear, repeated
from benchmarks.peak import Kind, Machine
from kernels import cache
from kernels.batch import PagedRows
from kernels.cpu import CpuOps

ROWS = (1, 8, 32, 512)
READ_LIMIT, PEAK_LIMIT = 0.75, 0.55
"""What linears are to reach: of the read bandwidth, for one row; of the arithmetic peak, from `MANY` rows on."""
MANY = 32
TURNS = 11
"""Timings of each figure."""


@dataclass(frozen=True)
class AttentionCase:
    """Rows alike over SmolLM2's heads."""

    rows: int
    context: int
    count: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        kind = "decode" if self.count == 1 else f"chunk {self.count}"
        return f"{kind} after {self.context}, KV {str(self.dtype).removeprefix('torch.')}"


HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
CASES = (
    AttentionCase(1, 0, 512),
    AttentionCase(1, 512, 512),
    AttentionCase(1, 512, 512, torch.bfloat16),
    AttentionCase(1, 512, 512, torch.int8),
    AttentionCase(4, 1000, 16),
    AttentionCase(4, 1000, 16, torch.bfloat16),
    AttentionCase(4, 1000, 16, torch.int8),
    AttentionCase(1, 250, 1),
    AttentionCase(1, 4000, 1),
    AttentionCase(32, 250, 1),
    AttentionCase(32, 250, 1, torch.bfloat16),
    AttentionCase(32, 250, 1, torch.int8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    reason = CpuOps.unavailable()
    if reason is not None:
        sys.stderr.write(f"the C++ ops cannot run here: {reason}\n")
        return 1
    ops = CpuOps()
    machine = Machine(ops.variant, torch.get_num_threads())
    console = Console()
    console.print(
        f"{ops.variant.name}, {torch.get_num_threads()} threads: reads {machine.peak('read') / 1e9:.1f} GB/s, "
        f"float32 {machine.peak('floats') / 1e9:.0f} GFLOP/s, bytes {machine.peak('bytes') / 1e9:.0f} GOP/s, "
        f"with sums of 32 bits {machine.peak('wide_bytes') / 1e9:.0f} GOP/s"
    )
    rows = [int(count) for count in options.rows.split(",")]
    table = Table("type", "op", "rows", "µs", "GB/s", "of read", "GOP/s", "of peak", "limit")
    names = options.types.split(",")
    for case in CASES if "attention" in names else ():
        _add_attention(table, ops, case, machine)
    for name in (name for name in names if name != "attention"):
        for shape in options.shapes.split(","):
            _add_linear(table, ops, name, shape, rows, machine)
    console.print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="float32,bfloat16,int8,int4,attention")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    return parser


def _add_linear(table: Table, ops: CpuOps, name: str, shape: str, counts: Sequence[int], machine: Machine) -> None:
    linear, (out, size) = ColdLinear(ops, name, shape), SHAPES[shape]
    for rows in counts:
        work = Work(linear.timer(rows), linear.num_bytes, 2.0 * rows * out * size, TYPES[name].peak)
        _row(table, name, shape, rows, work, machine)


def _add_attention(table: Table, ops: CpuOps, case: AttentionCase, machine: Machine) -> None:
    length = case.context + case.count
    blocks = -(-length // BLOCK)
    tables = torch.arange(case.rows * blocks).view(case.rows, blocks)
    places = torch.arange(case.context, length)
    slots = (tables[:, places // BLOCK] * BLOCK + places % BLOCK).flatten()
    rows = PagedRows(slots, [case.count] * case.rows, [case.context] * case.rows, tables, BLOCK)
    head_bytes = cache.width(case.dtype, HEAD_DIM) * case.dtype.itemsize
    num_bytes = case.rows * length * KV_HEADS * 2 * head_bytes
    caches = [
        (_filled(len(tables) * blocks, case.dtype), _filled(len(tables) * blocks, case.dtype))
        for _ in range(1 + COLD // 4 // num_bytes)
    ]
    q = torch.randn(case.rows * case.count, HEADS, HEAD_DIM)
    k = v = q[:, :KV_HEADS]
    turns = itertools.cycle(range(len(caches)))

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            ops.paged_attention(q, k, v, *caches[next(turns)], rows, HEAD_DIM**-0.5)
        return (time.perf_counter() - start) / calls

    seen = case.rows * sum(range(case.context + 1, length + 1))
    work = Work(repeated(timed, most=sys.maxsize), num_bytes, 4.0 * seen * HEADS * HEAD_DIM, "floats")
    _row(table, "attention", case.name, case.rows, work, machine)


def _filled(blocks: int, dtype: torch.dtype) -> torch.Tensor:
    stored = torch.zeros(blocks, BLOCK, KV_HEADS, cache.width(dtype, HEAD_DIM), dtype=dtype)
    cache.write(stored, torch.arange(blocks * BLOCK), torch.ones(blocks * BLOCK, KV_HEADS, HEAD_DIM))
    return stored


@dataclass(frozen=True)
class Work:
    """Something that is timed."""

    seconds: Callable[[], float]
    num_bytes: int
    """That it reads."""
    operations: float
    peak: Kind
    """Of the machine's, which bounds its arithmetic."""


def _row(table: Table, name: str, op: str, rows: int, work: Work, machine: Machine) -> None:
    seconds, of_read, of_peak = _beside(work, machine)
    table.add_row(
        name,
        op,
        str(rows),
        f"{seconds * 1e6:.0f}",
        f"{work.num_bytes / seconds / 1e9:.1f}",
        f"{of_read:.0%}",
        f"{work.operations / seconds / 1e9:.0f}",
        f"{of_peak:.0%}",
        "" if name == "attention" else _verdict(rows, of_read, of_peak),
    )


def _beside(work: Work, machine: Machine) -> tuple[float, float, float]:
    """Medians: its seconds, its share of what the machine reads, and of what that computes, in those moments."""
    times, of_read, of_peak = [], [], []
    kinds: tuple[Kind, Kind] = ("read", work.peak)
    beside = {kind: machine.rate(kind) for kind in kinds}
    for turn in range(TURNS):
        times.append(seconds := work.seconds())
        kind = kinds[turn % 2]
        beside[kind] = machine.rate(kind)
        of_read.append(work.num_bytes / seconds / beside["read"])
        of_peak.append(work.operations / seconds / beside[work.peak])
    return statistics.median(times), statistics.median(of_read), statistics.median(of_peak)


def _verdict(rows: int, of_read: float, of_peak: float) -> str:
    if 1 < rows < MANY:
        return ""
    return "held" if (of_read >= READ_LIMIT if rows == 1 else of_peak >= PEAK_LIMIT) else "missed"


if __name__ == "__main__":
    sys.exit(main())
