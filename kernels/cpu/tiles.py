"""Weights in integers as the C++ ops read them: tiles of 16 outputs, four inputs of each of them next to each other.

A vector then holds the same inputs of many outputs, and memory is read from beginning to end (`tiles.h`).
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cpu.library import load
from kernels.cpu.variants import Variant
from kernels.int4 import GROUP, HALF, Int4Weight
from kernels.int8_groups import Int8GroupWeight
from kernels.nf4 import BLOCK, Nf4Weight
from kernels.quantised import Int8Weight, QuantisedWeight

TILE = 16
"""Outputs of a tile."""


@dataclass(frozen=True, eq=False)
class Tiles(QuantisedWeight):
    """A weight in tiles: the same values in another order."""

    values: Tensor
    """[tiles, groups, lines, 16, 4] bytes: line i of a group holds bytes 4 i to 4 i + 3 of 16 outputs. The last tile is
    filled with zeros."""
    size: torch.Size
    """[out, in], without what fills the last tile and group."""

    @property
    def shape(self) -> torch.Size:
        return self.size

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + sum(tensor.nbytes for tensor in self.others)

    @property
    @abstractmethod
    def others(self) -> tuple[Tensor, ...]:
        """What the C++ op takes after the values: scales and so on, [tiles, ..., 16]."""

    @abstractmethod
    def picked(self, index: Tensor | None) -> QuantisedWeight:
        """Outputs `index` [T], or all of them, as they lay before."""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.picked(None).dequantise(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.picked(index).dequantise()

    def multiply(self, x: Tensor) -> Tensor:
        return self.picked(None).multiply(x)

    def turned(self, x: Tensor) -> Tensor:
        return self.picked(None).turned(x)

    def turned_back(self, x: Tensor) -> Tensor:
        return self.picked(None).turned_back(x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self.picked(None).factor(dtype)

    def _bytes(self, index: Tensor | None) -> Tensor:
        """[T, groups * lines * 4] of the values."""
        if index is None:
            return self.values.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[: self.size[0]]
        return self.values[index // TILE, :, :, index % TILE].flatten(1)

    def _from_groups(self, x: Tensor, index: Tensor | None) -> Tensor:
        """[tiles, groups, 16] → [T, groups]."""
        if index is None:
            return x.transpose(1, 2).flatten(0, 1)[: self.size[0]]
        return x[index // TILE, :, index % TILE]


@dataclass(frozen=True, eq=False)
class Int8Tiles(Tiles):
    """An `Int8Weight` in tiles."""

    scales: Tensor
    """[tiles * 16] float32."""
    sums: Tensor
    """[tiles * 16] int32."""

    @classmethod
    def of(cls, weight: Int8Weight) -> "Int8Tiles":
        return cls(_lines(weight.values, GROUP), weight.shape, _whole(weight.scales), _whole(weight.sums))

    @property
    def others(self) -> tuple[Tensor, ...]:
        return self.scales, self.sums

    def picked(self, index: Tensor | None) -> Int8Weight:
        found = slice(self.size[0]) if index is None else index
        return Int8Weight(self._bytes(index), self.scales[found], self.sums[found], self.size[1])


@dataclass(frozen=True, eq=False)
class Int4Tiles(Tiles):
    """An `Int4Weight` in tiles."""

    scales: Tensor
    """[tiles, groups, 16] float16."""
    minimums: Tensor
    """[tiles, groups, 16] float16."""

    @classmethod
    def of(cls, weight: Int4Weight) -> "Int4Tiles":
        return cls(_lines(weight.packed, HALF), weight.shape, _groups(weight.scales), _groups(weight.minimums))

    @property
    def others(self) -> tuple[Tensor, ...]:
        return self.scales, self.minimums

    def picked(self, index: Tensor | None) -> Int4Weight:
        scales, minimums = (self._from_groups(x, index) for x in self.others)
        return Int4Weight(self._bytes(index), scales, minimums, self.size[1])


@dataclass(frozen=True, eq=False)
class Int8GroupTiles(Tiles):
    """An `Int8GroupWeight` in tiles."""

    scales: Tensor
    """[tiles, groups, 16] float16."""

    @classmethod
    def of(cls, weight: Int8GroupWeight) -> "Int8GroupTiles":
        return cls(_lines(weight.values, GROUP), weight.shape, _groups(weight.scales))

    @property
    def others(self) -> tuple[Tensor, ...]:
        return (self.scales,)

    def picked(self, index: Tensor | None) -> Int8GroupWeight:
        return Int8GroupWeight(self._bytes(index), self._from_groups(self.scales, index), self.size[1])


@dataclass(frozen=True, eq=False)
class Nf4Tiles(Tiles):
    """An `Nf4Weight` in tiles."""

    scales: Tensor
    """[tiles, blocks, 16] float32."""
    variant: Variant
    """Whose C++ makes floats of it."""

    @classmethod
    def of(cls, weight: Nf4Weight, variant: Variant) -> "Nf4Tiles":
        return cls(_lines(weight.packed, BLOCK // 2), weight.shape, _groups(weight.scales), variant)

    @property
    def others(self) -> tuple[Tensor, ...]:
        return (self.scales,)

    def picked(self, index: Tensor | None) -> Nf4Weight:
        return Nf4Weight(self._bytes(index), self._from_groups(self.scales, index), self.size[1])

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found = torch.empty(self.size)
        load(self.variant).eft_dequantise_nf4(
            self.values.data_ptr(), self.scales.data_ptr(), *self.size, found.data_ptr(), torch.get_num_threads()
        )
        return found.to(dtype)


def tiled(weight: QuantisedWeight, variant: Variant) -> QuantisedWeight:
    """The weight in tiles, where there are ops for it in this variant."""
    match weight:
        case Int8Weight():
            return Int8Tiles.of(weight)
        case Int4Weight():
            return Int4Tiles.of(weight)
        case Int8GroupWeight():
            return Int8GroupTiles.of(weight)
        case Nf4Weight():
            return Nf4Tiles.of(weight, variant)
        case _:
            return weight


def _whole(x: Tensor) -> Tensor:
    """x [out, ...] with zeros up to a whole number of tiles."""
    return pad(x, (0,) * (2 * x.ndim - 1) + (-len(x) % TILE,))


def _lines(x: Tensor, width: int) -> Tensor:
    """[out, groups * width] bytes → [tiles, groups, width / 4, 16, 4]."""
    return _whole(x).view(-1, TILE, x.shape[1] // width, width // 4, 4).permute(0, 2, 3, 1, 4).contiguous()


def _groups(x: Tensor) -> Tensor:
    """[out, groups] → [tiles, groups, 16]."""
    return _whole(x).view(-1, TILE, x.shape[1]).transpose(1, 2).contiguous()
