"""Which part of a dimension a rank holds: rows of a weight by its outputs, columns by its inputs, heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Some of `full` indices, in the order in which they are held. Equal on no two ranks but where heads are copied."""

    full: int
    ranges: tuple[range, ...]

    @classmethod
    def whole(cls, full: int) -> Split:
        return cls(full, (range(full),))

    @classmethod
    def even(cls, full: int, rank: int, size: int) -> Split:
        """The rank's of `size` equal stretches. `full` must be a multiple."""
        each = full // size
        return cls(full, (range(rank * each, (rank + 1) * each),))

    @classmethod
    def cut(cls, full: int, rank: int, size: int) -> Split:
        """The rank's of `size` stretches, all of one length but for the end, where there may be less or nothing."""
        each = -(-full // size)
        return cls(full, (range(min(rank * each, full), min((rank + 1) * each, full)),))

    @classmethod
    def joined(cls, splits: Sequence[Split]) -> Split:
        """Dimensions that lie one after the other in a weight."""
        ranges, start = [], 0
        for split in splits:
            ranges += [range(start + part.start, start + part.stop) for part in split.ranges]
            start += split.full
        return cls(start, tuple(ranges))

    @property
    def size(self) -> int:
        """How many are held."""
        return sum(map(len, self.ranges))

    @property
    def is_whole(self) -> bool:
        return self.size == self.full

    def scaled(self, factor: int) -> Split:
        """The same of a dimension in which every index stands for `factor`: heads → their values."""
        ranges = tuple(range(part.start * factor, part.stop * factor) for part in self.ranges)
        return Split(self.full * factor, ranges)

    def copies(self, size: int) -> int:
        """How many of `size` ranks hold each index, where all hold as many."""
        return max(1, self.size * size // self.full)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Where each stretch lies here, and where in the whole."""
        start = 0
        for part in self.ranges:
            yield slice(start, start + len(part)), slice(part.start, part.stop)
            start += len(part)

    def pick(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """What is held of a whole tensor: a view where it is one stretch."""
        if len(self.ranges) < 2:
            only = self.ranges[0] if self.ranges else range(0)
            return tensor.narrow(dim, only.start, len(only))
        return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in self.ranges], dim)

    def put(self, target: Tensor, tensor: Tensor, dim: int = 0) -> None:
        """Write what is held to its places in a whole tensor."""
        for here, there in self.pieces():
            length = there.stop - there.start
            target.narrow(dim, there.start, length).copy_(tensor.narrow(dim, here.start, length))

    def find(self, index: Tensor) -> Tensor:
        """Where indices of the whole lie here [n] int64; -1 for those that do not."""
        found = torch.full_like(index, -1)
        for here, there in self.pieces():
            inside = (index >= there.start) & (index < there.stop)
            found = torch.where(inside, index - there.start + here.start, found)
        return found
