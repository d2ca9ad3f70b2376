"""Low-rank adapters of a mixed batch: every segment shrunk in one launch, and expanded in another (arXiv:2310.18547).

Segments hold tensors of their own, so kernels get a table of addresses. Where each token's adapter is known on the
device alone, a program a token looks it up in a table of all adapters; sums are in the same order in both.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch import LoraSegment, LoraTable
from kernels.triton.launch import power, rows

TOKENS, INNER, OUT = 16, 64, 64
"""Sizes of a tile: tokens, inputs that are summed at once, and outputs."""


@triton.jit
def _token(tokens, at, inside):
    """Places in the batch of a segment's tokens; without a list of them they are its places in the segment."""
    if tokens != 0:
        return tl.load(tokens.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
    return at.to(tl.int64)


@triton.jit
def _shrink(x, stride, segments, shrunk, size, width, TOKENS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr):
    """shrunk [segment's first row + token, rank] = scales * (x A^T), in float32."""
    entry = segments + tl.program_id(0) * 6
    tokens, count, start = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    element = x.dtype.element_ty
    a = tl.load(entry + 3).to(tl.pointer_type(element))
    scales = tl.load(entry + 4).to(tl.pointer_type(element))
    ranks = tl.load(entry + 5)
    at, rank, inner = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK), tl.arange(0, INNER)
    if tl.program_id(1) * TOKENS < count:
        place = _token(tokens, at, at < count)
        total = tl.zeros([TOKENS, RANK], tl.float32)
        for first in range(0, size, INNER):
            column = first + inner
            here = (at < count)[:, None] & (column < size)[None, :]
            inputs = tl.load(x + place[:, None] * stride + column[None, :], mask=here, other=0.0)
            there = (rank < ranks)[None, :] & (column < size)[:, None]
            factors = tl.load(a + rank[None, :] * size + column[:, None], mask=there, other=0.0)
            total = tl.dot(inputs, factors, total, input_precision="ieee")
        total *= tl.load(scales + rank, mask=rank < ranks, other=0.0).to(tl.float32)[None, :]
        tl.store(
            shrunk + (start + at)[:, None] * width + rank[None, :], total,
            mask=(at < count)[:, None] & (rank < ranks)[None, :],
        )  # fmt: skip


@triton.jit
def _expand(shrunk, parts, y, stride, step, width, TOKENS: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr):
    """y [token, column of the part and on] += shrunk B^T, one part of one segment."""
    entry = parts + tl.program_id(0) * 8
    tokens, count, start = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    b = tl.load(entry + 3).to(tl.pointer_type(y.dtype.element_ty))
    ranks, first_rank, size, column = (
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7),
    )  # fmt: skip
    if (tl.program_id(1) * TOKENS < count) & (tl.program_id(2) * OUT < size):
        at, rank = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
        out = tl.program_id(2) * OUT + tl.arange(0, OUT)
        here = (at < count)[:, None] & (rank < ranks)[None, :]
        inputs = tl.load(shrunk + (start + at)[:, None] * width + first_rank + rank[None, :], mask=here, other=0.0)
        there = (rank < ranks)[:, None] & (out < size)[None, :]
        factors = tl.load(b + out[None, :] * ranks + rank[:, None], mask=there, other=0.0).to(tl.float32)
        place = _token(tokens, at, at < count)[:, None] * stride + (column + out)[None, :] * step
        inside = (at < count)[:, None] & (out < size)[None, :]
        before = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        after = before + tl.dot(inputs, factors, input_precision="ieee")
        tl.store(y + place, after.to(y.dtype.element_ty), mask=inside)


def fits(x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> bool:
    """True if all factors are of the type of x and y, and in one piece."""
    return x.dtype is y.dtype and all(
        tensor.dtype is x.dtype and tensor.is_contiguous()
        for segment in segments
        for tensor in (segment.factors.a, segment.factors.scales, *segment.factors.b)
    )


def lora_apply(x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """`Ops.lora_apply`."""
    x = rows(x)
    counts = [len(x) if segment.tokens is None else len(segment.tokens) for segment in segments]
    starts = list(accumulate(counts, initial=0))
    if not starts[-1]:
        return y
    shrinking, expanding = [], []
    for segment, count, start in zip(segments, counts, starts, strict=False):
        factors = segment.factors
        owner = (0 if segment.tokens is None else segment.tokens.data_ptr(), count, start)
        shrinking.append((*owner, factors.a.data_ptr(), factors.scales.data_ptr(), len(factors.a)))
        first = 0
        for b, column in zip(factors.b, factors.columns, strict=True):
            out, rank = b.shape
            expanding.append((*owner, b.data_ptr(), rank, first, out, column))
            first += rank
    # One copy to the device for both tables.
    numbers = torch.tensor([n for entry in (*shrinking, *expanding) for n in entry], dtype=torch.int64).to(x.device)
    shrunk_width = max(entry[5] for entry in shrinking)
    shrunk = torch.empty(starts[-1], shrunk_width, device=x.device)
    tiles = triton.cdiv(max(counts), TOKENS)
    _shrink[(len(shrinking), tiles)](
        x, x.stride(0), numbers, shrunk, x.shape[1], shrunk_width,
        TOKENS=TOKENS, INNER=INNER, RANK=power(shrunk_width, 16),
    )  # fmt: skip
    widest, rank = max(entry[6] for entry in expanding), max(entry[4] for entry in expanding)
    _expand[(len(expanding), tiles, triton.cdiv(widest, OUT))](
        shrunk, numbers[6 * len(shrinking) :], y, y.stride(0), y.stride(1), shrunk_width,
        TOKENS=TOKENS, OUT=OUT, RANK=power(rank, 16),
    )  # fmt: skip
    return y


@triton.jit
def _shrink_row(
    x, stride, adapters, entries, entry_size, shrunk, size, width,
    TOKENS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """As `_shrink`, of one token: shrunk [token, rank]. Of a tile only the first row is a token."""
    token = tl.program_id(0).to(tl.int64)
    entry = entries + tl.load(adapters + token) * entry_size
    ranks = tl.load(entry + 2)
    if ranks > 0:
        element = x.dtype.element_ty
        a = tl.load(entry).to(tl.pointer_type(element))
        scales = tl.load(entry + 1).to(tl.pointer_type(element))
        at, rank, inner = tl.arange(0, TOKENS), tl.arange(0, RANK), tl.arange(0, INNER)
        total = tl.zeros([TOKENS, RANK], tl.float32)
        for first in range(0, size, INNER):
            column = first + inner
            here = (at < 1)[:, None] & (column < size)[None, :]
            inputs = tl.load(x + token * stride + at[:, None] * 0 + column[None, :], mask=here, other=0.0)
            there = (rank < ranks)[None, :] & (column < size)[:, None]
            factors = tl.load(a + rank[None, :] * size + column[:, None], mask=there, other=0.0)
            total = tl.dot(inputs, factors, total, input_precision="ieee")
        total *= tl.load(scales + rank, mask=rank < ranks, other=0.0).to(tl.float32)[None, :]
        place = shrunk + token * width + at[:, None] * 0 + rank[None, :]
        tl.store(place, total, mask=(at < 1)[:, None] & (rank < ranks)[None, :])


@triton.jit
def _expand_row(
    shrunk, adapters, entries, entry_size, y, stride, step, width,
    TOKENS: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """As `_expand`, of one token and one part of its adapter."""
    token = tl.program_id(0).to(tl.int64)
    entry = entries + tl.load(adapters + token) * entry_size
    part = entry + 3 + tl.program_id(1) * 5
    ranks, first_rank, size, column = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
    if (tl.load(entry + 2) > 0) & (tl.program_id(2) * OUT < size):
        b = tl.load(part).to(tl.pointer_type(y.dtype.element_ty))
        at, rank = tl.arange(0, TOKENS), tl.arange(0, RANK)
        out = tl.program_id(2) * OUT + tl.arange(0, OUT)
        here = (at < 1)[:, None] & (rank < ranks)[None, :]
        inputs = tl.load(shrunk + token * width + first_rank + at[:, None] * 0 + rank[None, :], mask=here, other=0.0)
        there = (rank < ranks)[:, None] & (out < size)[None, :]
        factors = tl.load(b + out[None, :] * ranks + rank[:, None], mask=there, other=0.0).to(tl.float32)
        place = y + token * stride + at[:, None] * 0 + (column + out)[None, :] * step
        inside = (at < 1)[:, None] & (out < size)[None, :]
        after = tl.load(place, mask=inside, other=0.0).to(tl.float32) + tl.dot(inputs, factors, input_precision="ieee")
        tl.store(place, after.to(y.dtype.element_ty), mask=inside)


def lora_apply_table(x: Tensor, y: Tensor, table: LoraTable, adapters: Tensor) -> Tensor:
    """`Ops.lora_apply_table`. Nothing that is launched depends on the numbers in `adapters`."""
    x = rows(x)
    if not len(x) or not table.rank:
        return y
    shrunk = torch.empty(len(x), table.rank, device=x.device)
    entry_size = table.entries.stride(0)
    _shrink_row[(len(x),)](
        x, x.stride(0), adapters, table.entries, entry_size, shrunk, x.shape[1], table.rank,
        TOKENS=TOKENS, INNER=INNER, RANK=power(table.rank, 16),
    )  # fmt: skip
    _expand_row[(len(x), table.parts, triton.cdiv(table.widest, OUT))](
        shrunk, adapters, table.entries, entry_size, y, y.stride(0), y.stride(1), table.rank,
        TOKENS=TOKENS, OUT=OUT, RANK=power(table.part_rank, 16),
    )  # fmt: skip
    return y
