"""RMSNorm: one program a row, so a row's result does not depend on its batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import power, rows


@triton.jit
def _rms_norm(x, stride, weight, y, size, eps, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    wide = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        wide = wide * (1.0 + factor)
    else:
        # Rounded before the product, as the models were trained; in float32 that is nothing.
        wide = wide.to(y.dtype.element_ty).to(tl.float32) * factor
    tl.store(y + row * size + at, wide.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """`Ops.rms_norm`, or `Ops.rms_norm_plus_one`."""
    x = rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _rms_norm[(len(x),)](x, x.stride(0), weight, y, x.shape[1], eps, PLUS_ONE=plus_one, BLOCK=power(x.shape[1]))
    return y
