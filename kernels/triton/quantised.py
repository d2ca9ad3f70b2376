"""Products with weights in integers: int8 with a scale an output, and groups of 32 in four or eight bits.

Activations are the reference's (`activations.py`). Sums within an output, or a group, are of integers, and groups are
added from the first to the last, each product rounded before it is added: hence no fused multiply-add, and results are
the reference's, bit by bit, in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4 import GROUP, HALF, Int4Weight
from kernels.int8_groups import Int8GroupWeight
from kernels.quantised import Int8Weight
from kernels.triton.activations import quantise_grouped, quantise_rotated

ROWS, OUT, INNER = 16, 64, 64
"""Sizes of a tile: rows and outputs of a product, and inputs that are summed at once."""


@triton.jit
def _finish(total, y, bias, row, out, num_rows, num_out, BIAS: tl.constexpr):
    inside = (row[:, None] < num_rows) & (out[None, :] < num_out)
    if BIAS:
        total += tl.load(bias + out, mask=out < num_out, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * num_out + out[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _int8(
    x, row_scales, weight, scales, bias, y, num_rows, num_out, size,
    BIAS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    at = tl.arange(0, INNER)
    sums = tl.zeros([ROWS, OUT], tl.int32)
    for first in range(0, size, INNER):
        inner = first + at
        ours = (row[:, None] < num_rows) & (inner[None, :] < size)
        found = tl.load(x + row[:, None].to(tl.int64) * size + inner[None, :], mask=ours, other=0)
        inside = (inner[:, None] < size) & (out[None, :] < num_out)
        values = tl.load(weight + out[None, :].to(tl.int64) * size + inner[:, None], mask=inside, other=0)
        sums = tl.dot(found, values, sums, out_dtype=tl.int32)
    row_scale = tl.load(row_scales + row, mask=row < num_rows, other=0.0)
    scale = tl.load(scales + out, mask=out < num_out, other=0.0)
    total = sums.to(tl.float32) * (row_scale[:, None] * scale[None, :])
    _finish(total, y, bias, row, out, num_rows, num_out, BIAS)


@triton.jit
def _grouped(
    x, sums, steps, weight, scales, minimums, bias, y, num_rows, num_out, num_groups,
    FOUR_BITS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    within = tl.arange(0, 32)
    ours, inside = row < num_rows, out < num_out
    wide_row, wide_out = row.to(tl.int64), out.to(tl.int64)
    total = tl.zeros([ROWS, OUT], tl.float32)
    for group in range(num_groups):
        place = wide_row[:, None] * (num_groups * 32) + group * 32 + within[None, :]
        found = tl.load(x + place, mask=ours[:, None], other=0)
        if FOUR_BITS:
            # A byte holds input i in its low half and input i + 16 in its high.
            pair = wide_out[None, :] * (num_groups * 16) + group * 16 + within[:, None] % 16
            packed = tl.load(weight + pair, mask=inside[None, :], other=0).to(tl.int32)
            values = ((packed >> (within[:, None] // 16 * 4)) & 15).to(tl.int8)
        else:
            one = wide_out[None, :] * (num_groups * 32) + group * 32 + within[:, None]
            values = tl.load(weight + one, mask=inside[None, :], other=0)
        exact = tl.dot(found, values, out_dtype=tl.int32)
        scale = tl.load(scales + wide_out * num_groups + group, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(steps + wide_row * num_groups + group, mask=ours, other=0.0)
        total += exact.to(tl.float32) * (step[:, None] * scale[None, :])
        if FOUR_BITS:
            minimum = tl.load(minimums + wide_out * num_groups + group, mask=inside, other=0.0).to(tl.float32)
            part = tl.load(sums + wide_row * num_groups + group, mask=ours, other=0.0)
            total += part[:, None] * minimum[None, :]
    _finish(total, y, bias, row, out, num_rows, num_out, BIAS)


TAKEN = Int8Weight | Int4Weight | Int8GroupWeight


def linear(x: Tensor, weight: TAKEN, bias: Tensor | None) -> Tensor:
    """`Ops.linear` without a gradient."""
    count, out = len(x), weight.shape[0]
    y = torch.empty(count, out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    grid = (triton.cdiv(out, OUT), triton.cdiv(count, ROWS))
    options = {"BIAS": bias is not None, "ROWS": ROWS, "OUT": OUT, "enable_fp_fusion": False}
    added = y if bias is None else bias
    if isinstance(weight, Int8Weight):
        row = quantise_rotated(x)
        _int8[grid](
            row.values, row.scales, weight.values, weight.scales, added, y, count, out, row.values.shape[1],
            INNER=INNER, **options,
        )  # fmt: skip
        return y
    a = quantise_grouped(x)
    four = isinstance(weight, Int4Weight)
    values, minimums = (weight.packed, weight.minimums) if isinstance(weight, Int4Weight) else (weight.values, y)
    assert values.shape[1] == a.sums.shape[1] * (HALF if four else GROUP)
    _grouped[grid](
        a.values, a.sums, a.scales, values, weight.scales, minimums, added, y, count, out, a.sums.shape[1],
        FOUR_BITS=four, **options,
    )  # fmt: skip
    return y
