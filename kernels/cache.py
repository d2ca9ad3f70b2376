"""Storage of a token's head in a KV cache: float32, bfloat16, or int8 with a scale of its own.

An int8 head [head_dim] takes head_dim + 4 bytes: integers from -127 to 127, then the scale as a float32. So a cache is
one tensor in any type, and a block is copied as a whole.
"""

import torch
from torch import Tensor

from kernels.quantised import quantise_rows

SCALE = 4
"""Bytes of a scale."""


def width(dtype: torch.dtype, head_dim: int) -> int:
    """Elements of a cache's last dimension."""
    return head_dim + SCALE if dtype is torch.int8 else head_dim


def write(cache: Tensor, slots: Tensor, heads: Tensor) -> None:
    """In place: heads [T, G, D] to `slots` [T] of cache [N, B, G, width]."""
    if cache.dtype is torch.int8:
        values, scales = quantise_rows(heads.float().flatten(0, 1))
        stored = torch.cat((values.to(torch.int8), scales.unsqueeze(1).view(torch.int8)), dim=1)
        heads = stored.view(*heads.shape[:2], stored.shape[1])
    cache.flatten(0, 1).index_copy_(0, slots, heads.to(cache.dtype))


def read(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Some of a cache, [..., width] → [..., D] in `dtype`."""
    if blocks.dtype is not torch.int8:
        return blocks.to(dtype)
    return (blocks[..., :-SCALE].float() * _scales(blocks)).to(dtype)


def is_finite(blocks: Tensor) -> Tensor:
    """blocks [n, B, G, width] → [n] bool: True if all values of the block are finite."""
    if blocks.dtype is torch.int8:
        blocks = _scales(blocks)
    return blocks.isfinite().flatten(1).all(dim=1)


def _scales(blocks: Tensor) -> Tensor:
    """Scales of int8 heads [..., width] → [..., 1] float32: copied, since they may lie at any byte."""
    return blocks[..., -SCALE:].clone(memory_format=torch.contiguous_format).view(torch.float32)
