"""A paged cache full of old numbers, and rows that decode and chunks of prompts that lie over it in random order."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels import cache
from kernels.batch import PagedRows
from kernels.interface import Ops

BLOCK = 8

Row = tuple[int, int]
"""Tokens before these, and these."""


@dataclass(frozen=True)
class Paged:
    """The tables are those of sequences, of which `rows` may take any part."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def random(cls, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, seed: int) -> "Paged":
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
        tables = torch.zeros(len(lengths), max(needed, default=0), dtype=torch.int64)
        for index, blocks in enumerate(needed):
            tables[index, :blocks] = torch.tensor([order.pop() for _ in range(blocks)], dtype=torch.int64)
        caches = [torch.zeros(sum(needed) + 2, BLOCK, heads, cache.width(dtype, dim), dtype=dtype) for _ in range(2)]
        for stored in caches:
            everything = torch.arange(len(stored) * BLOCK)
            cache.write(stored, everything, torch.randn(len(everything), heads, dim, generator=generator))
        return cls(*caches, tables)

    def rows(self, rows: list[Row], sequences: list[int] | None = None) -> PagedRows:
        """`sequences`: whose part each row is; without it each has its own."""
        tables = self.tables if sequences is None else self.tables[sequences]
        slots = [
            int(tables[index, at // BLOCK]) * BLOCK + at % BLOCK
            for index, (context, count) in enumerate(rows)
            for at in range(context, context + count)
        ]
        contexts, counts = [context for context, _ in rows], [count for _, count in rows]
        return PagedRows(torch.tensor(slots, dtype=torch.int64), counts, contexts, tables.contiguous(), BLOCK)

    def attend(
        self, ops: Ops, q: torch.Tensor, rows: PagedRows, *, window: int | None = None, softcap: float = 0.0
    ) -> torch.Tensor:
        """Of q [T, H, D]; the new tokens are in the cache already, in its type."""
        k, v = (cache.read(stored, torch.float32).flatten(0, 1)[rows.slots] for stored in (self.keys, self.values))
        scale = q.shape[2] ** -0.5
        return ops.paged_attention(q, k, v, self.keys, self.values, rows, scale, window=window, softcap=softcap)


def chunks(length: int, cuts: list[int]) -> list[Row]:
    """One sequence cut at some of its tokens."""
    return [(a, b - a) for a, b in pairwise(sorted({0, length, *(cut % length for cut in cuts)}))]
