"""Activations in bytes, as the reference makes them: a rotated row (`kernels.hadamard`) with one scale, or groups of 32
with a scale each."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hadamard import BLOCK as TURNED
from kernels.int4 import GROUP
from kernels.triton.launch import power, rows
from kernels.triton.rounding import nearest

LARGEST = tl.constexpr(127.0)
"""`kernels.quantised.LARGEST`"""


@triton.jit
def _integers(wide, largest, broken):
    """Values as whole numbers, and their scale, by their largest size; `broken` is above 0 if one is not a number."""
    usable = (largest > 0.0) & (largest < float("inf")) & (broken == 0)
    factor = tl.div_rn(LARGEST, tl.where(usable, largest, 1.0))
    values = tl.where(usable, nearest(wide * factor), 0.0)
    return values, tl.div_rn(tl.where(broken > 0, float("nan"), largest), LARGEST)


@triton.jit
def _hadamard(x, BLOCK: tl.constexpr):
    """`kernels.hadamard.turn` of x [BLOCK], a power of two from 64 on."""
    for stage in tl.static_range(6):
        # The distance is 32 >> stage; a constant cannot get a value twice.
        pairs = tl.permute(tl.reshape(x, [BLOCK // (64 >> stage), 2, 32 >> stage]), (0, 2, 1))
        first, second = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), [BLOCK])
    return x * 0.125


@triton.jit
def _quantise_rotated(x, stride, values, scales, size, padded, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    wide = _hadamard(tl.load(x + row * stride + at, mask=at < size, other=0.0).to(tl.float32), BLOCK)
    largest = tl.max(tl.abs(wide), axis=0)
    broken = tl.sum((wide != wide).to(tl.int32), axis=0)
    integers, scale = _integers(wide, largest, broken)
    tl.store(values + row * padded + at, integers.to(tl.int8), mask=at < padded)
    tl.store(scales + row, scale)


@triton.jit
def _quantise_groups(x, stride, values, sums, scales, size, padded, num_groups, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group, within = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    at = group[:, None] * 32 + within[None, :]
    wide = tl.load(x + row * stride + at, mask=at < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), axis=1)
    broken = tl.sum((wide != wide).to(tl.int32), axis=1)
    integers, scale = _integers(wide, largest[:, None], broken[:, None])
    tl.store(values + row * padded + at, integers.to(tl.int8), mask=at < padded)
    scale = tl.reshape(scale, [BLOCK // 32])
    tl.store(sums + row * num_groups + group, tl.sum(integers, axis=1) * scale, mask=group < num_groups)
    tl.store(scales + row * num_groups + group, scale, mask=group < num_groups)


@dataclass(frozen=True, eq=False)
class RotatedRows:
    """R rows, rotated (`kernels.hadamard`), as integers."""

    values: Tensor
    """[R, ceil(in / 64) * 64] int8."""
    scales: Tensor
    """[R] float32."""


def quantise_rotated(x: Tensor) -> RotatedRows:
    """Rotate rows [tokens, inputs] in blocks and quantise each to int8 with one scale a row."""
    x = rows(x)
    count, size = x.shape
    padded = -(-size // TURNED) * TURNED
    found = RotatedRows(
        torch.empty(count, padded, dtype=torch.int8, device=x.device), torch.empty(count, device=x.device)
    )
    _quantise_rotated[(count,)](
        x, x.stride(0), found.values, found.scales, size, padded, BLOCK=power(size, TURNED), enable_fp_fusion=False
    )
    return found


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """R rows, filled up with zeros to whole groups."""

    values: Tensor
    """[R, groups * 32] int8."""
    sums: Tensor
    """[R, groups] float32: of each group's values, times its scale."""
    scales: Tensor
    """[R, groups] float32."""


def quantise_grouped(x: Tensor) -> GroupedRows:
    """Quantise rows [tokens, inputs] to int8 in groups of inputs with a scale each."""
    x = rows(x)
    count, size = x.shape
    groups = -(-size // GROUP)
    found = GroupedRows(
        torch.empty(count, groups * GROUP, dtype=torch.int8, device=x.device),
        torch.empty(count, groups, device=x.device),
        torch.empty(count, groups, device=x.device),
    )
    _quantise_groups[(count,)](
        x, x.stride(0), found.values, found.sums, found.scales, size, groups * GROUP, groups,
        BLOCK=power(size, GROUP), enable_fp_fusion=False,
    )  # fmt: skip
    return found
