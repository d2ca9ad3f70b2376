"""Weights that are not floats: their common interface, and int8 with a scale an output.

Activations become bytes with one scale a token, found when they come: value = integer * scale. A token's outliers would
leave too little of a byte for the rest, so both sides are turned first (`kernels.hadamard`): in SmolLM2 that keeps
perplexity, which would rise by 7% else, within 1% of float32's. Sums are of integers, so they are exact and a row's
result does not depend on its batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hadamard import BLOCK, turn, turn_back

LARGEST = 127
"""Largest integer, both a weight's and an activation's."""
MAX_QUAD_SIZE = 254
"""Largest sum of the sizes of four weights before they are rounded (256 after): inputs i, i + 1, i + 4 and i + 5 of
eight, i being 0 or 2. So 16 bits hold their products with bytes, for processors that cannot continue in 32."""
MAX_NARROW_QUAD_SIZE = 126
"""Largest sum of the positive ones of them, and of the negative ones, in a narrow weight (128 after)."""
_AT_ONCE = 256
"""Outputs that are quantised together: else the intermediate values would be the largest tensors of loading a model."""
_EXACT = 1024
"""Products of bytes that float32 sums without rounding: 1024 * 127 * 127 < 2^24."""


class QuantisedWeight(ABC):
    """A weight [out, in] that takes the place of the float one."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[out, in]."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of its values."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that it takes, in bytes."""

    @abstractmethod
    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] in floating point."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Outputs `index` [T] in float32, [T, in]: an embedding's look-up."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] float32 times the weight transposed → [T, out] float32, each row as if it were alone."""

    def turned(self, x: Tensor) -> Tensor:
        """x [T, in] as `factor` meets it: x times the weight transposed is this times the factor transposed."""
        return x

    def turned_back(self, x: Tensor) -> Tensor:
        """The transpose of `turned`: of a gradient to what that gave, the one to x."""
        return x

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The form of the weight that is quickest to make in floating point, [out, width of `turned`]."""
        return self.dequantise(dtype)

    def factor_rows(self, rows: slice) -> Tensor:
        """Outputs `rows`, from start to stop, of `factor`: float32."""
        return self.rows(torch.arange(rows.start, rows.stop, device=self.device))


@dataclass(frozen=True, eq=False)
class Int8Weight(QuantisedWeight):
    """Integers with a scale an output, of the weight's turned rows."""

    values: Tensor
    """[out, ceil(in / 64) * 64] int8, from -127 to 127, as `reach_of` scales them."""
    scales: Tensor
    """[out] float32."""
    sums: Tensor
    """[out] int32: the sum of each output's values."""
    in_features: int
    narrow: bool = False
    """True if 16 bits hold the products of four values with unsigned bytes too: see `quantise_narrow_int8`."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.values), self.in_features))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.sums.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return turn_back(self.factor(torch.float32), self.in_features).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return turn_back(self.values[index].float() * self.scales[index].unsqueeze(1), self.in_features)

    def multiply(self, x: Tensor) -> Tensor:
        turned = turn(x)
        most = largest_of(turned)
        return from_sums(int8_sums(turned, self, most), self, most)

    def turned(self, x: Tensor) -> Tensor:
        return turn(x).to(x.dtype)

    def turned_back(self, x: Tensor) -> Tensor:
        return turn_back(x, self.in_features).to(x.dtype)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)

    def factor_rows(self, rows: slice) -> Tensor:
        return self.values[rows].float() * self.scales[rows].unsqueeze(1)


Weight = Tensor | QuantisedWeight
"""Weight of a linear."""


def quantise_int8(weight: Tensor, most: Tensor | None = None) -> Int8Weight:
    """weight [out, in] in floating point, each output turned and scaled by `reach_of`. `most` [out] are the
    results of `reach_of` for the whole weight, where this one is a slice of its inputs."""
    return _quantise(weight, most, narrow=False)


def quantise_narrow_int8(weight: Tensor) -> Int8Weight:
    """The same within `MAX_NARROW_QUAD_SIZE`: half a bit less, and a third faster where bytes are multiplied in 16 bits
    (AVX2, AVX-512 without VNNI), since activations need not take the weights' signs. For the weights that lose the
    least by it."""
    return _quantise(weight, None, narrow=True)


def _quantise(weight: Tensor, most: Tensor | None, *, narrow: bool) -> Int8Weight:
    width = -(-weight.shape[1] // BLOCK) * BLOCK
    values = torch.empty(len(weight), width, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    sums = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    for first in range(0, len(weight), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        turned = turn(weight[part])
        found, scales[part] = quantise_rows(turned, reach_of(turned, narrow=narrow) if most is None else most[part])
        values[part] = found.to(torch.int8)
        sums[part] = values[part].sum(-1, dtype=torch.int32)
    return Int8Weight(values, scales, sums, weight.shape[1], narrow)


def linear_quantised(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """`Ops.linear`; with gradients to x where required, as if by the dequantised weight."""
    if torch.is_grad_enabled() and x.requires_grad:
        return linear_dequantised(x, weight, bias)
    y = weight.multiply(x.float())
    y = y if bias is None else y + bias
    return y.to(x.dtype)


class LastFactor:
    """The `QuantisedWeight.factor` that was made last: training works with one weight for many pieces in turn, and to
    make it again for each costs more than the products of a small one."""

    def __init__(self) -> None:
        self._weight: QuantisedWeight | None = None
        self._factor = torch.empty(0)

    def has(self, weight: QuantisedWeight, dtype: torch.dtype) -> bool:
        """True if `of` need not make it."""
        return weight is self._weight and self._factor.dtype is dtype

    def of(self, weight: QuantisedWeight, dtype: torch.dtype) -> Tensor:
        """The weight's factor in `dtype`, not to be changed."""
        if not self.has(weight, dtype):
            self._weight, self._factor = None, torch.empty(0)  # freed first: there is never room for two
            self._factor = weight.factor(dtype)
            self._weight = weight
        return self._factor


def linear_dequantised(
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    last: LastFactor | None = None,
    multiply: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """`Ops.linear` as if by the dequantised weight, with and without gradients: what training needs. `last`: keeps the
    factor for the next call. `multiply`: makes the product of the input and the factor."""
    y: Tensor = _Dequantised.apply(x, weight, last, multiply)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def largest_of(x: Tensor) -> Tensor:
    """The size of each row's largest value, [R] float32; not finite for a row that is not."""
    return x.float().abs().amax(-1)


def reach_of(turned: Tensor, *, narrow: bool = False) -> Tensor:
    """The value that becomes `LARGEST` in each of a weight's turned rows [R, n], n a multiple of 8, → [R] float32: the
    largest value, or more where four values would be beyond `MAX_QUAD_SIZE`, or with `narrow` values of one sign beyond
    `MAX_NARROW_QUAD_SIZE`."""
    turned = turned.float()
    largest = largest_of(turned)
    if not narrow:
        return torch.maximum(largest, _fours(turned.abs()) * (LARGEST / MAX_QUAD_SIZE))
    fours = torch.maximum(_fours(turned.clamp(min=0)), _fours((-turned).clamp(min=0)))
    return torch.maximum(largest, fours * (LARGEST / MAX_NARROW_QUAD_SIZE))


def _fours(sizes: Tensor) -> Tensor:
    """The largest sum of four in each row [R, n] → [R]; `MAX_QUAD_SIZE` says which four these are."""
    return sizes.view(*sizes.shape[:-1], -1, 2, 2, 2).sum((-3, -1)).amax((-2, -1))


def int8_sums(turned: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
    """`Ops.int8_sums`."""
    values, _ = quantise_rows(turned, most)
    total = torch.zeros(len(values), weight.shape[0], dtype=torch.int32, device=values.device)
    for first in range(0, values.shape[1], _EXACT):
        part = slice(first, first + _EXACT)
        total += F.linear(values[:, part], weight.values[:, part].float()).to(torch.int32)
    return total


def from_sums(sums: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
    """Products from the `int8_sums` [R, out] of whole rows, [R, out] float32. `most` [R]: the largest turned values."""
    return sums.float() * ((most / LARGEST).unsqueeze(1) * weight.scales)


def quantise_rows(x: Tensor, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [R, n] float32 → whole numbers [R, n] up to 127 as float32, scales [R]. A row that is not finite gets such a
    scale. `most` [R]: the rows' largest values, where these are slices of wider rows."""
    most = largest_of(x) if most is None else most
    usable = (most > 0) & most.isfinite()
    # Two tensors: torch makes number / tensor of a reciprocal, which rounds twice.
    factor = torch.where(usable, torch.full_like(most, LARGEST) / most, 0.0)
    values = torch.where(usable.unsqueeze(1), (x * factor.unsqueeze(1)).round(), 0.0)
    return values, most / LARGEST


class _Dequantised(torch.autograd.Function):
    """x W^T with the weight in floating point; no gradient to the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QuantisedWeight,
        last: LastFactor | None,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.weight, ctx.last = weight, last
        return multiply(weight.turned(x), _factor(weight, x.dtype, last))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return ctx.weight.turned_back(grad @ _factor(ctx.weight, grad.dtype, ctx.last)), None, None, None


def _factor(weight: QuantisedWeight, dtype: torch.dtype, last: LastFactor | None) -> Tensor:
    return weight.factor(dtype) if last is None else last.of(weight, dtype)
