"""Weights in four bits: groups of 32 inputs, each with a scale and a minimum, value = q * scale + minimum.

It is what GGUF's Q4_0 and Q4_1 hold, and what GPTQ's and AWQ's checkpoints map to. Activations become bytes, with a
scale for each group too. Within a group sums are of integers, and exact; over the groups they are added in float32
from the first group to the last, so a row's result does not depend on its batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantised import QuantisedWeight, quantise_rows

GROUP = 32
"""Inputs of a group."""
HALF = GROUP // 2
LARGEST_NIBBLE = 15


@dataclass(frozen=True, eq=False)
class Int4Weight(QuantisedWeight):
    """Nibbles with a scale and a minimum a group."""

    packed: Tensor
    """[out, groups * 16] uint8: a group's first 16 values in the low halves of its bytes, the others in the high."""
    scales: Tensor
    """[out, groups] float16."""
    minimums: Tensor
    """[out, groups] float16."""
    in_features: int
    """The last group's values from here on are 0, and so are the activations that meet them."""

    @classmethod
    def of(cls, values: Tensor, scales: Tensor, minimums: Tensor) -> "Int4Weight":
        """From integers [out, in], 0 to 15 in any type, and each group's scale and minimum [out, ceil(in / 32)].

        Scales and minimums are rounded to float16: a minimum of 15 scales moves by at most a 130th of a scale. Raises
        `ValueError` when shapes do not fit, an integer is outside, or a scale or minimum is not finite in float16.
        """
        out, size = values.shape
        groups = -(-size // GROUP)
        for name, tensor in (("scales", scales), ("minimums", minimums)):
            if tensor.shape != (out, groups):
                raise ValueError(f"{name} must be [{out}, {groups}] for values [{out}, {size}], got {[*tensor.shape]}")
            if not tensor.to(torch.float16).isfinite().all():
                raise ValueError(f"{name} must be finite in float16, the largest is {tensor.abs().max():g}")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= LARGEST_NIBBLE:
            raise ValueError(f"values must be from 0 to 15, got {int(values.min())} to {int(values.max())}")
        nibbles = torch.nn.functional.pad(values.to(torch.uint8), (0, groups * GROUP - size)).view(out, groups, 2, HALF)
        packed = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1)
        return cls(packed, scales.to(torch.float16), minimums.to(torch.float16), size)

    def reordered(self, order: Tensor) -> "Int4Weight":
        """The outputs `order` [out]."""
        return Int4Weight(self.packed[order], self.scales[order], self.minimums[order], self.in_features)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.packed), self.in_features))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.minimums.nbytes

    @property
    def values(self) -> Tensor:
        """The integers, [out, groups, 32] uint8."""
        return _unpack(self.packed)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _floats(self.packed, self.scales, self.minimums)[:, : self.in_features].to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return _floats(self.packed[index], self.scales[index], self.minimums[index])[:, : self.in_features]

    def multiply(self, x: Tensor) -> Tensor:
        integers, steps = quantise_groups(x)
        scales, minimums = self.scales.float().t(), self.minimums.float().t()
        total = x.new_zeros(len(x), len(self.packed))
        weight = self.values
        for group in range(len(scales)):
            # Whole numbers below 2^24, as 32 * 15 * 127 is: float32 adds them without rounding, in any order.
            part, step = integers[:, group], steps[:, group, None]
            total += (part @ weight[:, group].float().t()) * (step * scales[group])
            total += (part.sum(1, keepdim=True) * step) * minimums[group]
        return total


def quantise_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, n] float32 → whole numbers [R, ceil(n / 32), 32] up to 127 as float32, and the scale of each group."""
    groups = -(-x.shape[1] // GROUP)
    padded = torch.nn.functional.pad(x, (0, groups * GROUP - x.shape[1]))
    values, scales = quantise_rows(padded.reshape(-1, GROUP))
    return values.view(len(x), groups, GROUP), scales.view(len(x), groups)


def _unpack(packed: Tensor) -> Tensor:
    """[rows, groups * 16] uint8 → [rows, groups, 32] uint8."""
    parts = packed.view(len(packed), -1, HALF)
    return torch.cat((parts & 15, parts >> 4), dim=2)


def _floats(packed: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
    """[rows, groups * 32] float32, each value rounded once as q * scale + minimum rounds in float32."""
    values = _unpack(packed).float()
    return values.mul_(scales.float().unsqueeze(2)).add_(minimums.float().unsqueeze(2)).flatten(1)


STRETCHES = (1.0, 1.05, 1.1, 1.2)
"""A group's range as the fifteenth part of which a first scale is taken: a little clipping often costs least."""
_AT_ONCE = 1 << 16
"""Groups that are quantised together: their intermediate values stay in the cache."""


def quantise_int4(weight: Tensor) -> Int4Weight:
    """weight [out, in] in floating point. Of several clippings each group takes the one of the least square error.

    Scale and minimum are the least squares' for the integers that a clipping gives; a group that has such a scale and
    minimum already (out of a Q4_1 file) keeps its integers.
    """
    out, size = weight.shape
    groups = -(-size // GROUP)
    padding = groups * GROUP - size
    # The last group is padded with its first value: a zero would widen its range.
    flat = torch.cat((weight, weight[:, -1:].expand(out, padding)), dim=1).reshape(-1, GROUP)
    values = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
    scales, minimums = (torch.empty(len(flat), dtype=torch.float16, device=weight.device) for _ in range(2))
    for first in range(0, len(flat), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        values[part], scales[part], minimums[part] = _fit(flat[part].float())
    return Int4Weight.of(values.view(out, -1)[:, :size], scales.view(out, -1), minimums.view(out, -1))


def _fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, 32] float32 → integers, scale and minimum of each group."""
    low, high = x.aminmax(dim=1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for stretch in STRETCHES:
        margin = (high - low) * (stretch - 1) / (2 * stretch)
        first = _quantised(x, (high - low - 2 * margin) / LARGEST_NIBBLE, low + margin)
        scale, minimum = _least_squares(x, first)
        scale, minimum = scale.half().float(), minimum.half().float()
        values = _quantised(x, scale, minimum)
        error = (values * scale + minimum - x).square().sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        found = (values, scale, minimum)
        best = found if best is None else tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    values, scale, minimum = best
    return values.to(torch.uint8), scale.flatten().half(), minimum.flatten().half()


def _quantised(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The integers nearest to x, as float32."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((x - minimum) * inverse).round_().clamp_(0, LARGEST_NIBBLE)


def _least_squares(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that bring values nearest to x, group by group; where all values are one, no scale."""
    mean, target = values.mean(1, keepdim=True), x.mean(1, keepdim=True)
    spread = (values - mean).square().sum(1, keepdim=True)
    scale = ((values - mean) * (x - target)).sum(1, keepdim=True) / spread
    scale = torch.where(spread > 0, scale, 0.0)
    return scale, target - scale * mean
