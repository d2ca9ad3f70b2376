"""Weights in four-bit NormalFloat: blocks of 64 inputs, value = CODE[q] * the block's largest size (arXiv:2305.14314).

The numbers are bitsandbytes'. Products are of floats: the weight is made float when it is used.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantised import QuantisedWeight

BLOCK = 64
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, from -1 to 1. Source: bitsandbytes, `create_normal_map`."""
_AT_ONCE = 1 << 20
"""Values that are quantised together."""


@dataclass(frozen=True, eq=False)
class Nf4Weight(QuantisedWeight):
    """Places in `CODE`, and a scale a block."""

    packed: Tensor
    """[out, blocks * 32] uint8: of two neighbouring inputs the first in the high half, as bitsandbytes has them."""
    scales: Tensor
    """[out, blocks] float32."""
    in_features: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.packed), self.in_features))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _floats(self.packed, self.scales)[:, : self.in_features].to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return _floats(self.packed[index], self.scales[index])[:, : self.in_features]

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantise())


def quantise_nf4(weight: Tensor) -> Nf4Weight:
    """weight [out, in] in floating point, each value to the nearest of the code."""
    out, size = weight.shape
    blocks = F.pad(weight.float(), (0, -size % BLOCK)).view(out, -1, BLOCK)
    scales = blocks.abs().amax(-1)
    code = torch.tensor(CODE, device=weight.device)
    middles = (code[1:] + code[:-1]) / 2
    flat = (blocks * torch.where(scales > 0, 1 / scales, 0.0).unsqueeze(2)).flatten()
    # `out_int32` and in parts: places of eight bytes each would be the largest tensor of loading a model.
    places = torch.cat(
        [torch.bucketize(part, middles, out_int32=True).to(torch.uint8) for part in torch.split(flat, _AT_ONCE)]
    )
    pairs = places.view(out, -1, 2)
    return Nf4Weight(pairs[:, :, 0] << 4 | pairs[:, :, 1], scales, size)


def _floats(packed: Tensor, scales: Tensor) -> Tensor:
    """[rows, blocks * 64] float32."""
    pairs = torch.tensor([(CODE[byte >> 4], CODE[byte & 15]) for byte in range(256)], device=packed.device)
    values = F.embedding(packed.int(), pairs)
    return (values.view(*scales.shape, BLOCK) * scales.unsqueeze(2)).flatten(1)
