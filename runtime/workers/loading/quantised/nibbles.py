"""Four-bit integers in words of 32 bits, and groups of inputs of any size in ours of 32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import Int4Weight, Weight
from kernels.int4 import GROUP

PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack(words: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """[rows, n] int32 → [rows, 8 * n] uint8; the nibble at bits 4 * i of a word is its value number `order[i]`."""
    shifts = torch.tensor([4 * order.index(value) for value in range(8)], dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & 15).to(torch.uint8).flatten(1)


def weight(values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Weight:
    """The weight [out, in] of scale * (value - zero).

    values [out, in] and zeros [groups, out] are from 0 to 15, scales [groups, out]; `groups` [in] is the group of each
    input; None: in order, all of one size. In int4, unless groups are not runs of inputs that ours of 32 fit in: then
    in float32. Raises `ValueError`.
    """
    out, size = values.shape
    count = len(scales)
    if scales.shape != (count, out) or zeros.shape != scales.shape or not count:
        raise ValueError(f"scales {[*scales.shape]} and zeros {[*zeros.shape]} are not for {out} outputs")
    run = -(-size // count)
    in_order = torch.arange(size) // run
    groups = in_order if groups is None else groups.long()
    if groups.shape != (size,) or not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(f"there are {count} groups, and inputs of others")
    scales, zeros = scales.float(), zeros.float()
    whole = run % GROUP == 0 or count == 1
    if not whole or not torch.equal(groups, in_order):
        return (values.float() - zeros[groups].t()) * scales[groups].t()
    starts = torch.arange(0, size, GROUP)
    of_ours = groups[starts]
    ours = scales[of_ours].t()
    return Int4Weight.of(values, ours, -zeros[of_ours].t() * ours)
