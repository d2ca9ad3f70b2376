"""Weights in integers as the C++ ops read them: tiles of 16 outputs, four inputs of each of them next to each other.

A vector then holds the same inputs of many outputs, and memory is read from beginning to end (`tile_gemm.h`).
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import pages
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
    filled with zeros. `GroupTiles` have more after a group's lines."""
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
        """Tensors that the C++ op takes after the values: scales and so on, [tiles, ..., 16]."""

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
    zeros: Tensor
    """[tiles * 16] int32: the variant's products for a row of zeros, to be subtracted from those of every row."""
    sums: Tensor
    """[tiles * 16] int32."""
    variant: Variant
    """Variant whose C++ op dequantises it."""
    narrow: bool
    """As in `Int8Weight`. Where it is faster, there is a separate C++ op for it."""

    @classmethod
    def of(cls, weight: Int8Weight, variant: Variant) -> "Int8Tiles":
        values, sums = _lines(weight.values, GROUP), _whole(weight.sums)
        zeros = torch.empty_like(sums)
        load(variant).eft_int8_zero_sums(values.data_ptr(), *values.shape[:2], zeros.data_ptr(), weight.narrow)
        return cls(values, weight.shape, _whole(weight.scales), zeros, sums, variant, weight.narrow)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.sums.nbytes

    @property
    def others(self) -> tuple[Tensor, ...]:
        return self.scales, self.zeros

    def rows(self, index: Tensor) -> Tensor:
        index = index.to(torch.int64).contiguous()
        found = torch.empty(len(index), self.size[1])
        load(self.variant).eft_int8_rows(
            self.values.data_ptr(),
            self.scales.data_ptr(),
            self.size[1],
            index.data_ptr(),
            len(index),
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found

    def turned(self, x: Tensor) -> Tensor:
        return self._hadamard(x, self._width).to(x.dtype)

    def turned_back(self, x: Tensor) -> Tensor:
        return self._hadamard(x, self.size[1]).to(x.dtype)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self.factor_rows(slice(0, self.size[0])).to(dtype)

    def factor_rows(self, rows: slice) -> Tensor:
        tile, skipped = divmod(rows.start, TILE)
        found = torch.empty(rows.stop - rows.start + skipped, self._width)
        load(self.variant).eft_int8_factor(
            self.values[tile:].data_ptr(),
            self.scales[tile * TILE :].data_ptr(),
            *found.shape,
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found[skipped:]

    @property
    def _width(self) -> int:
        """Inputs in whole Hadamard blocks."""
        return self.values.shape[1] * GROUP

    def _hadamard(self, x: Tensor, width: int) -> Tensor:
        """x [T, any] in floating point → [T, width] float32."""
        x = x.float()
        x = x if x.stride(1) == 1 else x.contiguous()
        found = torch.empty(len(x), width)
        load(self.variant).eft_hadamard(
            x.data_ptr(), x.stride(0), *x.shape, found.data_ptr(), width, torch.get_num_threads()
        )
        return found

    def picked(self, index: Tensor | None) -> Int8Weight:
        found = slice(self.size[0]) if index is None else index
        return Int8Weight(self._bytes(index), self.scales[found], self.sums[found], self.size[1], self.narrow)


@dataclass(frozen=True, eq=False)
class GroupTiles(Tiles):
    """Groups with all that belongs to them: `values` is [tiles, groups, bytes] uint8, a group's lines and then its
    float16s, 16 of a kind."""

    @property
    def others(self) -> tuple[Tensor, ...]:
        return ()

    def _lines_of(self, index: Tensor | None, lines: int) -> Tensor:
        """[T, groups * lines * 4] uint8."""
        parts = self.values[:, :, : lines * TILE * 4].view(*self.values.shape[:2], lines, TILE, 4)
        if index is None:
            return parts.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[: self.size[0]]
        return parts[index // TILE, :, :, index % TILE].flatten(1)

    def _halves_of(self, index: Tensor | None, lines: int, place: int) -> Tensor:
        """[T, groups] float16: the kind that comes after `place` others."""
        first = (lines * 4 + place * 2) * TILE
        return self._from_groups(self.values[:, :, first : first + 2 * TILE].view(torch.float16), index)


@dataclass(frozen=True, eq=False)
class Int4Tiles(GroupTiles):
    """An `Int4Weight` in tiles: lines, scales, minimums."""

    LINES = HALF // 4

    @classmethod
    def of(cls, weight: Int4Weight) -> "Int4Tiles":
        return cls(_joined(weight.packed, HALF, weight.scales, weight.minimums), weight.shape)

    def picked(self, index: Tensor | None) -> Int4Weight:
        scales, minimums = (self._halves_of(index, self.LINES, place) for place in range(2))
        return Int4Weight(self._lines_of(index, self.LINES), scales, minimums, self.size[1])


@dataclass(frozen=True, eq=False)
class Int8GroupTiles(GroupTiles):
    """An `Int8GroupWeight` in tiles: lines, scales."""

    LINES = GROUP // 4

    @classmethod
    def of(cls, weight: Int8GroupWeight) -> "Int8GroupTiles":
        return cls(_joined(weight.values, GROUP, weight.scales), weight.shape)

    def picked(self, index: Tensor | None) -> Int8GroupWeight:
        values = self._lines_of(index, self.LINES).view(torch.int8)
        return Int8GroupWeight(values, self._halves_of(index, self.LINES, 0), self.size[1])


@dataclass(frozen=True, eq=False)
class Nf4Tiles(Tiles):
    """An `Nf4Weight` in tiles."""

    scales: Tensor
    """[tiles, blocks, 16] float32."""
    variant: Variant
    """Variant whose C++ op dequantises it."""

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
            return Int8Tiles.of(weight, variant)
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


def _in_lines(x: Tensor, width: int) -> Tensor:
    """[out, groups * width] bytes → [tiles, groups, width / 4, 16] int32, four bytes each, where they lie."""
    whole = _whole(x) if len(x) % TILE else x.contiguous()
    return whole.view(torch.int32).view(-1, TILE, x.shape[1] // width, width // 4).permute(0, 2, 3, 1)


def _lines(x: Tensor, width: int) -> Tensor:
    """[out, groups * width] bytes → [tiles, groups, width / 4, 16, 4]."""
    lines = _in_lines(x, width)
    return pages.empty(lines.shape, lines.dtype).copy_(lines).view(x.dtype).view(*lines.shape, 4)


def _joined(x: Tensor, width: int, *halves: Tensor) -> Tensor:
    """[out, groups * width] bytes and float16s [out, groups] → [tiles, groups, bytes]: lines, then the others."""
    lines = _in_lines(x, width)
    size = width * TILE
    joined = pages.empty((*lines.shape[:2], size + len(halves) * 2 * TILE), torch.uint8)
    joined[:, :, :size].view(torch.int32).view(lines.shape).copy_(lines)
    for place, half in enumerate(halves):
        first = size + place * 2 * TILE
        joined[:, :, first : first + 2 * TILE].copy_(_groups(half).view(torch.uint8))
    return joined


def _groups(x: Tensor) -> Tensor:
    """[out, groups] → [tiles, groups, 16]."""
    return _whole(x).view(-1, TILE, x.shape[1]).transpose(1, 2).contiguous()
