"""Parts of the model that a tensor-parallel rank holds: rows and columns of weights, heads, the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.model.group import SOLO, Group
from runtime.model.spec import DecoderSpec

# -- split -----------------------------------------------------------------------------------------
#
# A rank's part of a dimension: rows of a weight by its outputs, columns by its inputs, heads.


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
        """The rank's stretch out of `size` equal ones. `full` must be a multiple of `size`."""
        each = full // size
        return cls(full, (range(rank * each, (rank + 1) * each),))

    @classmethod
    def cut(cls, full: int, rank: int, size: int) -> Split:
        """The rank's stretch out of `size`, all of one length but for the last ones, which may be shorter or empty."""
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
        """Number of held indices."""
        return sum(map(len, self.ranges))

    @property
    def is_whole(self) -> bool:
        return self.size == self.full

    def scaled(self, factor: int) -> Split:
        """The same split of a dimension with `factor` indices for each index: heads → their values."""
        ranges = tuple(range(part.start * factor, part.stop * factor) for part in self.ranges)
        return Split(self.full * factor, ranges)

    def copies(self, size: int) -> int:
        """Number of ranks, out of `size`, that hold each index, where all ranks hold equally many."""
        return max(1, self.size * size // self.full)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Each stretch as a pair of slices: of the held indices, and of the whole dimension."""
        start = 0
        for part in self.ranges:
            yield slice(start, start + len(part)), slice(part.start, part.stop)
            start += len(part)

    def pick(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The held part of a whole tensor: a view where it is one stretch."""
        if len(self.ranges) < 2:
            only = self.ranges[0] if self.ranges else range(0)
            return tensor.narrow(dim, only.start, len(only))
        return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in self.ranges], dim)

    def put(self, target: Tensor, tensor: Tensor, dim: int = 0) -> None:
        """Write the held part to its places in a whole tensor."""
        for here, there in self.pieces():
            length = there.stop - there.start
            target.narrow(dim, there.start, length).copy_(tensor.narrow(dim, here.start, length))

    def find(self, index: Tensor) -> Tensor:
        """Positions among the held indices of indices of the whole, [n] int64; -1 for indices that are not held."""
        found = torch.full_like(index, -1)
        for here, there in self.pieces():
            inside = (index >= there.start) & (index < there.stop)
            found = torch.where(inside, index - there.start + here.start, found)
        return found


# -- heads -----------------------------------------------------------------------------------------
#
# The split of attention's heads over ranks.


@dataclass(frozen=True)
class Heads:
    """The heads that one rank computes. With more ranks than key/value heads, some hold the same one."""

    q: Split
    kv: Split

    @classmethod
    def of(cls, spec: DecoderSpec, group: Group) -> Heads:
        """The heads of one rank. Raises `ValueError` where the ranks cannot get equal shares."""
        heads, groups, ranks = spec.num_heads, spec.num_kv_heads, group.size
        if heads % ranks or (groups % ranks and ranks % groups):
            fits = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
            raise ValueError(
                f"{heads} attention heads over {groups} key/value heads cannot be shared evenly by {ranks} ranks; "
                f"parallel.tp can be {', '.join(map(str, fits))}"
            )
        kv = Split.even(groups, group.rank, ranks) if groups % ranks == 0 else _copied(groups, group)
        return cls(Split.even(heads, group.rank, ranks), kv)

    def qkv(self, spec: DecoderSpec) -> dict[str, int | Split]:
        """The outputs of the projection to query, key and value, in the checkpoint's layout."""
        q, kv = self.q.scaled(spec.head_dim), self.kv.scaled(spec.head_dim)
        if spec.qkv == "parts":
            return {"q": q, "k": kv, "v": kv}
        if spec.qkv == "fused":
            return {"": Split.joined([q, kv, kv])}
        return {"": self._grouped(spec.num_heads // spec.num_kv_heads).scaled(spec.head_dim)}

    def _grouped(self, each: int) -> Split:
        """Heads by key/value head: `each` of queries, one of keys, one of values."""
        ranges = []
        for held in self.kv.ranges:
            for group in held:
                first = group * (each + 2)
                mine = [head - group * each for head in self.q.ranges[0] if head // each == group]
                ranges.append(range(first + mine[0], first + mine[-1] + 1))
                ranges.append(range(first + each, first + each + 2))
        return Split(self.kv.full * (each + 2), tuple(ranges))


def _copied(groups: int, group: Group) -> Split:
    own = group.rank * groups // group.size
    return Split(groups, (range(own, own + 1),))


# -- vocabulary ------------------------------------------------------------------------------------
#
# The vocabulary, shared out among ranks: each has the embeddings and makes the logits of some of the tokens.


class Vocabulary:
    """The token ids of this rank, and the merging of the ranks' results."""

    def __init__(self, size: int, group: Group = SOLO) -> None:
        """Split `size` tokens over the ranks of `group`. Raises `ValueError` where a rank would get no token."""
        if -(-size // group.size) * (group.size - 1) >= size:
            raise ValueError(f"a vocabulary of {size} tokens cannot be shared by {group.size} ranks")
        self.split = Split.cut(size, group.rank, group.size)
        self._group = group
        self._size = size
        self.width = -(-size // group.size)
        """Number of tokens of each rank; the last one may have fewer."""

    def join(self, logits: Tensor) -> Tensor:
        """Logits [R, own] of every rank → [R, vocab] on all."""
        if self._group.size == 1:
            return logits
        padded = F.pad(logits, (0, self.width - logits.shape[1]))
        return self._group.all_gather(padded)[:, : self._size]

    def own(self, token_ids: list[int]) -> list[int]:
        """Columns of this rank's logits for the given tokens; tokens of other ranks are left out."""
        (ids,) = self.split.ranges
        return [token - ids.start for token in token_ids if token in ids]

    def known(self, token_ids: list[int]) -> list[int]:
        """The given tokens that are in the vocabulary."""
        return [token for token in token_ids if 0 <= token < self._size]

    def argmax(self, best: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Each rank's largest logits [R], NaN if there is one, and their columns [R] int64 → the largest of all ranks
        [R], and its token [R]. Ties go to the first token, as on one rank: the ranks' tokens are in order."""
        if self._group.size == 1:
            return best, index
        values = torch.stack(self._group.gather(best.contiguous()))
        tokens = torch.stack(self._group.gather((index + self.split.ranges[0].start).contiguous()))
        most, rank = values.max(dim=0)
        return most, tokens.gather(0, rank.unsqueeze(0)).squeeze(0)

    def agree(self, tokens: list[int], device: torch.device) -> list[int]:
        """The first rank's tokens: sums over a distribution may differ in a bit between devices."""
        if self._group.size == 1:
            return tokens
        first: list[int] = self._group.gather(torch.tensor(tokens, device=device))[0].tolist()
        return first
