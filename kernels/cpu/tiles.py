"""Weights in groups as the C++ ops read them: tiles of 16 outputs, four inputs of each of them next to each other.

A vector then holds the same inputs of many outputs, and memory is read from beginning to end (`tiles.h`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.int4 import HALF, Int4Weight
from kernels.quantised import QuantisedWeight

TILE = 16
"""Outputs of a tile."""


@dataclass(frozen=True, eq=False)
class Int4Tiles(QuantisedWeight):
    """An `Int4Weight` in tiles."""

    values: Tensor
    """[tiles, groups, 4, 16, 4] uint8: line i of a group holds bytes 4 i to 4 i + 3 of 16 outputs' 16."""
    scales: Tensor
    """[tiles, groups, 16] float16."""
    minimums: Tensor
    """[tiles, groups, 16] float16."""
    size: torch.Size
    """[out, in], without what fills the last tile and group."""

    @classmethod
    def of(cls, weight: Int4Weight) -> "Int4Tiles":
        groups = weight.scales.shape[1]
        lines = _whole(weight.packed).view(-1, TILE, groups, HALF // 4, 4).permute(0, 2, 3, 1, 4)
        return cls(lines.contiguous(), _to_tiles(weight.scales), _to_tiles(weight.minimums), weight.shape)

    @property
    def shape(self) -> torch.Size:
        return self.size

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.minimums.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._outputs(torch.arange(self.shape[0])).dequantise(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._outputs(index).dequantise()

    def multiply(self, x: Tensor) -> Tensor:
        return self._outputs(torch.arange(self.shape[0])).multiply(x)

    def _outputs(self, index: Tensor) -> Int4Weight:
        """Outputs `index` [T] as they lay before."""
        tile, lane = index // TILE, index % TILE
        packed = self.values[tile, :, :, lane].flatten(1)
        return Int4Weight(packed, self.scales[tile, :, lane], self.minimums[tile, :, lane], self.shape[1])


def _whole(x: Tensor) -> Tensor:
    """x [out, ...] with zeros up to a whole number of tiles."""
    return pad(x, (0, 0, 0, -len(x) % TILE))


def _to_tiles(x: Tensor) -> Tensor:
    """[out, groups] → [tiles, groups, 16]."""
    return _whole(x).view(-1, TILE, x.shape[1]).transpose(1, 2).contiguous()
