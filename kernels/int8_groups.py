"""Weights in a byte with a scale for each group of 32 inputs: value = q * scale. It is what GGUF's Q8_0 holds.

Activations and the order of sums are those of `kernels.int4`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.int4 import GROUP, quantise_groups
from kernels.quantised import LARGEST, QuantisedWeight


@dataclass(frozen=True, eq=False)
class Int8GroupWeight(QuantisedWeight):
    """Bytes with a scale a group."""

    values: Tensor
    """[out, groups * 32] int8, from -127 to 127, 0 from `in_features` on."""
    scales: Tensor
    """[out, groups] float16."""
    in_features: int

    @classmethod
    def of(cls, values: Tensor, scales: Tensor) -> "Int8GroupWeight":
        """From integers [out, in] and each group's scale [out, ceil(in / 32)]. Raises `ValueError` when shapes do not
        fit, an integer is outside, or a scale is not finite in float16."""
        out, size = values.shape
        groups = -(-size // GROUP)
        if scales.shape != (out, groups):
            raise ValueError(f"scales must be [{out}, {groups}] for values [{out}, {size}], got {[*scales.shape]}")
        if not scales.to(torch.float16).isfinite().all():
            raise ValueError(f"scales must be finite in float16, the largest is {scales.abs().max():g}")
        if values.numel() and not -LARGEST <= int(values.min()) <= int(values.max()) <= LARGEST:
            raise ValueError(f"values must be from -127 to 127, got {int(values.min())} to {int(values.max())}")
        return cls(pad(values.to(torch.int8), (0, groups * GROUP - size)), scales.to(torch.float16), size)

    def reordered(self, order: Tensor) -> "Int8GroupWeight":
        """The outputs `order` [out]."""
        return Int8GroupWeight(self.values[order], self.scales[order], self.in_features)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.values), self.in_features))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _floats(self.values, self.scales)[:, : self.in_features].to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return _floats(self.values[index], self.scales[index])[:, : self.in_features]

    def multiply(self, x: Tensor) -> Tensor:
        integers, steps = quantise_groups(x)
        scales = self.scales.float().t()
        total = x.new_zeros(len(x), len(self.values))
        for group in range(len(scales)):
            # Sums of bytes' products are exact in float32, in any order.
            weight = self.values[:, group * GROUP : (group + 1) * GROUP].float().t()
            total += (integers[:, group] @ weight) * (steps[:, group, None] * scales[group])
        return total


def _floats(values: Tensor, scales: Tensor) -> Tensor:
    """[rows, groups * 32] float32."""
    groups = values.view(*scales.shape, GROUP).float()
    return groups.mul_(scales.float().unsqueeze(2)).flatten(1)
