"""Weights that are not floats: what all of them have, and int8 with a scale an output.

Activations become two bytes and one scale a token, found when they come: value = integer * scale. One byte would not
do: a token's outliers leave too little of it for the rest. Sums are of integers, so they are exact and a row's result
does not depend on its batch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
"""Of a weight's integers."""
LARGEST_ACTIVATION = 127 * 256
_AT_ONCE = 1024
"""Outputs that are quantised together: what lies between would else be the largest tensors of loading a model."""
_EXACT = 1024
"""Products of a byte with a weight that float32 sums without rounding: 1024 * 128 * 127 < 2^24."""


class QuantisedWeight(ABC):
    """A weight [out, in] that takes the place of the float one."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[out, in]."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its values are."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that it takes."""

    @abstractmethod
    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] in floating point."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Outputs `index` [T] in float32, [T, in]: an embedding's look-up."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] float32 times the weight transposed → [T, out] float32, each row as if it were alone."""


@dataclass(frozen=True, eq=False)
class Int8Weight(QuantisedWeight):
    """Integers with a scale an output."""

    values: Tensor
    """[out, in] int8, from -127 to 127."""
    scales: Tensor
    """[out] float32."""
    sums: Tensor
    """[out] int32: the sum of each output's values."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.sums.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.values[index].float() * self.scales[index].unsqueeze(1)

    def multiply(self, x: Tensor) -> Tensor:
        most = largest_of(x)
        return from_sums(int8_sums(x, self, most), self, most)


Weight = Tensor | QuantisedWeight
"""What a linear multiplies with."""


def quantise_int8(weight: Tensor, most: Tensor | None = None) -> Int8Weight:
    """weight [out, in] in floating point, each output scaled by its largest value. `most` [out] are these, where the
    weight is a slice of the inputs and so cannot tell."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    sums = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    for first in range(0, len(weight), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        found, scales[part] = quantise_rows(weight[part].float(), LARGEST, None if most is None else most[part])
        values[part] = found.to(torch.int8)
        sums[part] = values[part].sum(-1, dtype=torch.int32)
    return Int8Weight(values, scales, sums)


def linear_quantised(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """`Ops.linear`; with gradients to x where they are wanted, as if by the dequantised weight."""
    if torch.is_grad_enabled() and x.requires_grad:
        return linear_dequantised(x, weight, bias)
    y = weight.multiply(x.float())
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def linear_dequantised(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """`Ops.linear` as if by the dequantised weight, with and without gradients: what training needs."""
    y: Tensor = _Dequantised.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def largest_of(x: Tensor) -> Tensor:
    """The size of each row's largest value, [R] float32; not finite for a row that is not."""
    return x.float().abs().amax(-1)


def int8_sums(x: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
    """`Ops.int8_sums`."""
    values, _ = quantise_rows(x.float(), LARGEST_ACTIVATION, most)
    high, low = two_bytes(values)
    return torch.stack((_sums(high, weight), _sums(low, weight)))


def from_sums(sums: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
    """What `int8_sums` [2, R, out] of whole rows, whose largest values are `most` [R], amount to: [R, out] float32."""
    high, low = sums.float().unbind()
    return (high * 256 + low) * ((most / LARGEST_ACTIVATION).unsqueeze(1) * weight.scales)


def _sums(values: Tensor, weight: Int8Weight) -> Tensor:
    """values [R, in], whole numbers of a byte in float32 → their products with each output, summed: [R, out] int32."""
    total = torch.zeros(len(values), weight.shape[0], dtype=torch.int32, device=values.device)
    for first in range(0, values.shape[1], _EXACT):
        part = slice(first, first + _EXACT)
        total += F.linear(values[:, part], weight.values[:, part].float()).to(torch.int32)
    return total


def quantise_rows(x: Tensor, largest: int, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [R, n] float32 → whole numbers [R, n] as float32, scales [R]. A row that is not finite gets such a scale.
    `most` [R]: the rows' largest values, where these are slices of wider rows."""
    most = largest_of(x) if most is None else most
    usable = (most > 0) & most.isfinite()
    # Two tensors: torch makes number / tensor of a reciprocal, which rounds twice.
    factor = torch.where(usable, torch.full_like(most, largest) / most, 0.0)
    values = torch.where(usable.unsqueeze(1), (x * factor.unsqueeze(1)).round(), 0.0)
    return values, most / largest


def two_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to `LARGEST_ACTIVATION` in float32 → high and low byte: high * 256 + low, low from -128 on."""
    high = torch.floor((values + 128) / 256)
    return high, values - 256 * high


class _Dequantised(torch.autograd.Function):
    """x W^T with the weight turned to floating point for the moment; no gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return grad @ ctx.weight.dequantise(grad.dtype), None
