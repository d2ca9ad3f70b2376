"""Helpers of all kernels: the tensors that they take, and the sizes of blocks."""

import torch
from torch import Tensor

from kernels.triton.availability import interpreted

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cpu" if interpreted() else "cuda"
"""Device on which tensors must be. Read once, as Triton does when a kernel is defined."""


def takes(*tensors: Tensor) -> bool:
    """True if the kernels can take these: floats on their device, without a gradient."""
    wants_grad = torch.is_grad_enabled()
    return all(x.dtype in FLOATS and x.device.type == DEVICE and not (wants_grad and x.requires_grad) for x in tensors)


def power(size: int, least: int = 1) -> int:
    """The least power of two of at least `size` and `least`: Triton's blocks are of no other sizes."""
    return max(least, 1 << max(0, size - 1).bit_length())


def rows(x: Tensor) -> Tensor:
    """x [T, size] with each row in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with each token in one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
