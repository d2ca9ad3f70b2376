"""Rotary embedding of queries and keys in place, and the new keys and values into the cache.

One program a token and head. Each thread holds both numbers of the pairs that it turns, so that none reads what
another has written already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cache
from kernels.triton.launch import heads, power
from kernels.triton.rounding import nearest

LARGEST = tl.constexpr(127.0)


@triton.jit
def _store(stored, place, width, at, inside, x, factor):
    """A part of a head into its place; in a cache of integers scaled by `factor`."""
    if stored.dtype.element_ty == tl.int8:
        x = nearest(tl.where(factor > 0.0, x * factor, 0.0))
    tl.store(stored + place * width + at, x.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def _store_scale(stored, scales, place, width, largest):
    """The scale of a head, behind it in a cache of integers. Returns the factor that makes the largest size 127; 0
    where that is not a number to scale by."""
    if stored.dtype.element_ty == tl.int8:
        tl.store(scales + place * (width // 4) + width // 4 - 1, tl.div_rn(largest, LARGEST))
    usable = (largest > 0.0) & (largest < float("inf"))
    return tl.where(usable, tl.div_rn(LARGEST, tl.where(usable, largest, 1.0)), 0.0)


@triton.jit
def _rotate(base, cos, sin, dim, half, k_cache, k_scales, place, width, is_key, HALF: tl.constexpr, REST: tl.constexpr):
    """Rotate the head at `base`, and store it if it is a key."""
    pair = tl.arange(0, HALF)
    rotated = pair < half
    first = tl.load(base + pair, mask=rotated, other=0.0).to(tl.float32)
    second = tl.load(base + half + pair, mask=rotated, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=rotated, other=0.0).to(tl.float32)
    s = tl.load(sin + pair, mask=rotated, other=0.0).to(tl.float32)
    low = (first * c - second * s).to(base.dtype.element_ty)
    high = (second * c + first * s).to(base.dtype.element_ty)
    tl.store(base + pair, low, mask=rotated)
    tl.store(base + half + pair, high, mask=rotated)
    if is_key:
        at = 2 * half + tl.arange(0, REST)
        rest = tl.load(base + at, mask=at < dim, other=0.0).to(tl.float32)
        low_wide, high_wide = low.to(tl.float32), high.to(tl.float32)
        largest = _larger(_largest(low_wide), _larger(_largest(high_wide), _largest(rest)))
        factor = _store_scale(k_cache, k_scales, place, width, largest)
        _store(k_cache, place, width, pair, rotated, low_wide, factor)
        _store(k_cache, place, width, half + pair, rotated, high_wide, factor)
        _store(k_cache, place, width, at, at < dim, rest, factor)


@triton.jit
def _copy(v, dim, v_cache, v_scales, place, width, BLOCK: tl.constexpr):
    """Store the value at `v`."""
    at = tl.arange(0, BLOCK)
    x = tl.load(v + at, mask=at < dim, other=0.0).to(tl.float32)
    factor = _store_scale(v_cache, v_scales, place, width, _largest(x))
    _store(v_cache, place, width, at, at < dim, x, factor)


@triton.jit
def _rope_and_cache(
    q, q_stride, k, k_stride, v, v_stride, cos, sin, k_cache, v_cache, k_scales, v_scales, slots,
    num_heads, num_kv, dim, half, width,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(slots + token) * num_kv
    cos += token * half
    sin += token * half
    if head < num_heads:
        _rotate(
            q + token * q_stride + head * dim, cos, sin, dim, half, k_cache, k_scales, place, width, False, HALF, REST
        )
    elif head < num_heads + num_kv:
        kv = head - num_heads
        base = k + token * k_stride + kv * dim
        _rotate(base, cos, sin, dim, half, k_cache, k_scales, place + kv, width, True, HALF, REST)
    else:
        other = head - num_heads - num_kv
        _copy(v + token * v_stride + other * dim, dim, v_cache, v_scales, place + other, width, BLOCK)


@triton.jit
def _largest(x):
    """The largest size, NaN if there is one: a broken head must stay broken in the cache."""
    size = tl.max(tl.abs(x), axis=0)
    return tl.where(tl.sum((x != x).to(tl.int32), axis=0) > 0, float("nan"), size)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def scales_of(stored: Tensor) -> Tensor:
    """A cache of integers as float32, to read its scales; any other as it is, for its scales are not read."""
    return stored.view(torch.float32) if stored.dtype is torch.int8 else stored


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """`Ops.rope_and_cache`; q and k are rotated where they lie."""
    q, k, v = heads(q), heads(k), heads(v)
    tokens, num_heads, dim = q.shape
    num_kv, half = k.shape[1], cos.shape[1]
    assert k_cache.shape[-1] == cache.width(k_cache.dtype, dim)
    if tokens:
        _rope_and_cache[(tokens, num_heads + 2 * num_kv)](
            q, q.stride(0), k, k.stride(0), v, v.stride(0), cos.contiguous(), sin.contiguous(), k_cache, v_cache,
            scales_of(k_cache), scales_of(v_cache), slots, num_heads, num_kv, dim, half, k_cache.shape[-1],
            HALF=power(half), REST=power(dim - 2 * half), BLOCK=power(dim), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return q, k
