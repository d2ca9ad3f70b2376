"""Activations, and their products with the other half of a gated MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import rows

BLOCK = 1024
SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    if KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gated(x, stride, y, inner, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + inner + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded in between, as two ops would.
    gate = _activated(gate, KIND).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * inner + at, (gate * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _flat(x, y, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, _activated(value, KIND).to(y.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, kind: int) -> Tensor:
    """`Ops.silu_mul` and `Ops.gelu_mul`."""
    x = rows(gate_up)
    inner = x.shape[1] // 2
    y = torch.empty(len(x), inner, dtype=x.dtype, device=x.device)
    if y.numel():
        _gated[(len(x), triton.cdiv(inner, BLOCK))](x, x.stride(0), y, inner, KIND=kind, BLOCK=BLOCK)
    return y


def gelu(x: Tensor, kind: int) -> Tensor:
    """`Ops.gelu`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _flat[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), KIND=kind, BLOCK=BLOCK)
    return y
