"""Dropout masks that are a function of their place: what a slice of a micro-batch drops does not depend on the slicing.

A generator that counts on would have to draw the masks of all tokens for every slice. Here each element is hashed by
itself: 32-bit multiplications and shifts, as the finalisers of MurmurHash3 and its kin have them.
"""

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
"""Odd multipliers that spread every bit over the upper ones."""


def dropout_mask(seed: int, rows: slice, columns: Tensor, probability: float) -> Tensor:
    """[rows, C] float32: 0 with probability `probability` (below 1), else 1 / (1 - probability).

    `columns` [C] int32 are the numbers of the columns, `rows` those of the tokens in their micro-batch.
    """
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=columns.device)
    keys = _hashed(_hashed(row + _int32(seed)) + _int32(seed >> 32))
    hashed = _hashed((columns * _int32(_GOLDEN)) + keys.unsqueeze(1))
    keep = hashed >= round(probability * 2**32) - 2**31
    return keep.to(torch.float32).div_(1 - probability)


def _hashed(x: Tensor) -> Tensor:
    """The elements of x, int32, mixed in place: different ones stay different."""
    for shift, multiplier in ((16, _FIRST), (15, _SECOND)):
        x ^= (x >> shift).bitwise_and_(2 ** (32 - shift) - 1)  # the shift of an unsigned number
        x *= _int32(multiplier)
    return x


def _int32(value: int) -> int:
    """The lower 32 bits as a signed number."""
    return (value + 2**31) % 2**32 - 2**31
