"""Weights that are stored in bfloat16 and computed with in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import pages
from kernels.quantised import QuantisedWeight


@dataclass(frozen=True, eq=False)
class BFloat16Weight(QuantisedWeight):
    """Half of float32's memory; products and sums are float32's."""

    values: Tensor
    """[out, in] bfloat16."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.values[index].float()

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values.float())


def store_bfloat16(weight: Tensor) -> BFloat16Weight:
    """weight [out, in] in floating point, rounded."""
    if weight.device.type != "cpu":
        return BFloat16Weight(weight.to(torch.bfloat16).contiguous())
    return BFloat16Weight(pages.empty(weight.shape, torch.bfloat16).copy_(weight))
