"""Blocks of 64 inputs times a Hadamard matrix: it spreads outliers, so that a byte a number will do (arXiv:2404.00456).

The matrix is symmetric and its own inverse, so a product of rows is the same with both of them turned. It is applied as
sums and differences of pairs, from the farthest to the nearest: every backend gives the same bits.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
SCALE = 0.125
"""Factor that makes the matrix its own inverse: one over the root of `BLOCK`."""


def turn(x: Tensor) -> Tensor:
    """x [..., n] in floating point → [..., ceil(n / 64) * 64] float32, as if there were zeros after x."""
    x = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    shape, distance = x.shape, BLOCK // 2
    while distance:
        first, second = x.reshape(-1, BLOCK // (2 * distance), 2, distance).unbind(2)
        x = torch.stack((first + second, first - second), dim=2)
        distance //= 2
    return x.view(shape) * SCALE


def turn_back(x: Tensor, size: int) -> Tensor:
    """Undo `turn`, but for rounding: x [..., ceil(size / 64) * 64] → [..., size]."""
    return turn(x)[..., :size]
