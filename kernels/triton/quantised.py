"""Products with weights in integers: int8 with a scale an output, and groups of 32 in four or eight bits.

Activations are the reference's: two bytes and a scale a token. Sums within an output, or a group, are of integers, and
groups are added from the first to the last, each product rounded before it is added: hence no fused multiply-add, and
results are the reference's, bit by bit, in any batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4 import GROUP, HALF, Int4Weight
from kernels.int8_groups import Int8GroupWeight
from kernels.quantised import Int8Weight
from kernels.triton.launch import power, rows
from kernels.triton.rounding import nearest

ROWS, OUT, INNER = 16, 64, 64
"""Of a tile: rows and outputs of a product, and inputs that are summed at once."""
LARGEST = tl.constexpr(32512.0)
"""`kernels.quantised.LARGEST_ACTIVATION`"""


@triton.jit
def _quantise(x, stride, high, low, sums, scales, size, padded, num_groups, BLOCK: tl.constexpr):
    """A row as two bytes a number, its scale, and the sum of each group's integers, exact in float32."""
    row = tl.program_id(0).to(tl.int64)
    group, within = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    at = group[:, None] * 32 + within[None, :]
    wide = tl.load(x + row * stride + at, mask=at < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(wide), axis=1), axis=0)
    broken = tl.sum(tl.sum((wide != wide).to(tl.int32), axis=1), axis=0) > 0
    usable = (largest > 0.0) & (largest < float("inf")) & (broken == 0)
    factor = tl.div_rn(LARGEST, tl.where(usable, largest, 1.0))
    values = tl.where(usable, nearest(wide * factor), 0.0)
    upper = tl.floor((values + 128.0) / 256.0)
    tl.store(high + row * padded + at, upper.to(tl.int8), mask=at < padded)
    tl.store(low + row * padded + at, (values - 256.0 * upper).to(tl.int8), mask=at < padded)
    tl.store(sums + row * num_groups + group, tl.sum(values, axis=1), mask=group < num_groups)
    tl.store(scales + row, tl.div_rn(tl.where(broken, float("nan"), largest), LARGEST))


@triton.jit
def _finish(total, y, bias, row, out, num_rows, num_out, BIAS: tl.constexpr):
    inside = (row[:, None] < num_rows) & (out[None, :] < num_out)
    if BIAS:
        total += tl.load(bias + out, mask=out < num_out, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * num_out + out[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _int8(
    high, low, row_scales, weight, scales, bias, y, num_rows, num_out, size, padded,
    BIAS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    at = tl.arange(0, INNER)
    upper = tl.zeros([ROWS, OUT], tl.int32)
    lower = tl.zeros([ROWS, OUT], tl.int32)
    for first in range(0, size, INNER):
        inner = first + at
        ours = (row[:, None] < num_rows) & (inner[None, :] < padded)
        place = row[:, None].to(tl.int64) * padded + inner[None, :]
        bytes_high = tl.load(high + place, mask=ours, other=0)
        bytes_low = tl.load(low + place, mask=ours, other=0)
        inside = (inner[:, None] < size) & (out[None, :] < num_out)
        values = tl.load(weight + out[None, :].to(tl.int64) * size + inner[:, None], mask=inside, other=0)
        upper = tl.dot(bytes_high, values, upper, out_dtype=tl.int32)
        lower = tl.dot(bytes_low, values, lower, out_dtype=tl.int32)
    row_scale = tl.load(row_scales + row, mask=row < num_rows, other=0.0)
    scale = tl.load(scales + out, mask=out < num_out, other=0.0)
    total = upper.to(tl.float32) * 256.0 + lower.to(tl.float32)
    total = total * (row_scale[:, None] * scale[None, :])
    _finish(total, y, bias, row, out, num_rows, num_out, BIAS)


@triton.jit
def _grouped(
    high, low, sums, row_scales, weight, scales, minimums, bias, y, num_rows, num_out, num_groups,
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
        bytes_high = tl.load(high + place, mask=ours[:, None], other=0)
        bytes_low = tl.load(low + place, mask=ours[:, None], other=0)
        if FOUR_BITS:
            # A byte holds input i in its low half and input i + 16 in its high.
            pair = wide_out[None, :] * (num_groups * 16) + group * 16 + within[:, None] % 16
            packed = tl.load(weight + pair, mask=inside[None, :], other=0).to(tl.int32)
            values = ((packed >> (within[:, None] // 16 * 4)) & 15).to(tl.int8)
        else:
            one = wide_out[None, :] * (num_groups * 32) + group * 32 + within[:, None]
            values = tl.load(weight + one, mask=inside[None, :], other=0)
        exact = tl.dot(bytes_high, values, out_dtype=tl.int32) * 256 + tl.dot(bytes_low, values, out_dtype=tl.int32)
        scale = tl.load(scales + wide_out * num_groups + group, mask=inside, other=0.0).to(tl.float32)
        total += exact.to(tl.float32) * scale[None, :]
        if FOUR_BITS:
            minimum = tl.load(minimums + wide_out * num_groups + group, mask=inside, other=0.0).to(tl.float32)
            part = tl.load(sums + wide_row * num_groups + group, mask=ours, other=0.0)
            total += part[:, None] * minimum[None, :]
    total = total * tl.load(row_scales + row, mask=ours, other=0.0)[:, None]
    _finish(total, y, bias, row, out, num_rows, num_out, BIAS)


@dataclass(frozen=True, eq=False)
class _Activations:
    """Of R rows, filled up with zeros to whole groups."""

    high: Tensor
    """[R, groups * 32] int8, and so is `low`: value = high * 256 + low."""
    low: Tensor
    sums: Tensor
    """[R, groups] float32."""
    scales: Tensor
    """[R] float32."""


def _activations(x: Tensor) -> _Activations:
    x = rows(x)
    count, size = x.shape
    groups = -(-size // GROUP)
    padded = groups * GROUP
    found = _Activations(
        torch.empty(count, padded, dtype=torch.int8, device=x.device),
        torch.empty(count, padded, dtype=torch.int8, device=x.device),
        torch.empty(count, groups, device=x.device),
        torch.empty(count, device=x.device),
    )
    _quantise[(count,)](
        x, x.stride(0), found.high, found.low, found.sums, found.scales, size, padded, groups,
        BLOCK=power(size, GROUP), enable_fp_fusion=False,
    )  # fmt: skip
    return found


TAKEN = Int8Weight | Int4Weight | Int8GroupWeight


def linear(x: Tensor, weight: TAKEN, bias: Tensor | None) -> Tensor:
    """`Ops.linear` without a gradient."""
    count, out = len(x), weight.shape[0]
    y = torch.empty(count, out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    a = _activations(x)
    grid = (triton.cdiv(out, OUT), triton.cdiv(count, ROWS))
    options = {"BIAS": bias is not None, "ROWS": ROWS, "OUT": OUT, "enable_fp_fusion": False}
    added = y if bias is None else bias
    if isinstance(weight, Int8Weight):
        size = weight.shape[1]
        _int8[grid](
            a.high, a.low, a.scales, weight.values, weight.scales, added, y, count, out, size, a.high.shape[1],
            INNER=INNER, **options,
        )  # fmt: skip
        return y
    four = isinstance(weight, Int4Weight)
    values, minimums = (weight.packed, weight.minimums) if isinstance(weight, Int4Weight) else (weight.values, y)
    assert values.shape[1] == a.sums.shape[1] * (HALF if four else GROUP)
    _grouped[grid](
        a.high, a.low, a.sums, a.scales, values, weight.scales, minimums, added, y, count, out, a.sums.shape[1],
        FOUR_BITS=four, **options,
    )  # fmt: skip
    return y
