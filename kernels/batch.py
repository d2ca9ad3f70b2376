"""Layout of a flat batch over the paged KV cache, in the forms that backends attend with, and over adapters.

`PagedRows` is the batch itself. From it are derived: `PagedGroups`, padded and masked, for backends that attend with
dense tensors; `QueryTiles`, for kernels that attend a tile of queries at a time on the device of the batch;
`SeveralTokens`, for attention of variable length (flash-attn). `LoraSegment` says which tokens an adapter is for.

Shapes are those of `kernels.interface`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PADDING_RATIO = 1.5
"""Rows decode together while the longest context of a group is at most this many times the shortest."""

TILE_TOKENS = 16
"""Tokens of a tile of a row that has several."""


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Layout of a flat batch over the paged cache: built once a step, used in every layer.

    Rows of one token come first, in order of their context, so that similar rows lie together.
    """

    slots: Tensor
    """[T] int64: block_id * B + offset of every token's place in the cache."""
    counts: list[int]
    """Tokens of each row, next to each other in the batch; their sum is T."""
    contexts: list[int]
    """Tokens of each row before these, in the cache already."""
    tables: Tensor
    """[R, width] int64 block ids; past a row's own blocks any valid ids."""
    block_size: int

    @cached_property
    def extents(self) -> Tensor:
        """[R, 3] int64: each row's first token in the batch, its count, its context."""
        starts = list(accumulate(self.counts, initial=0))[:-1]
        return torch.tensor([*zip(starts, self.counts, self.contexts, strict=True)], dtype=torch.int64).view(-1, 3)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, with its context."""
        return max((a + b for a, b in zip(self.counts, self.contexts, strict=True)), default=0)

    def alone(self, tokens: Tensor) -> PagedRows:
        """Tokens [n] int64 of the batch, each as a row of its own; they stay in their order."""
        starts, _, contexts = self.extents.unbind(1)
        row = torch.searchsorted(starts.contiguous(), tokens, right=True) - 1
        return PagedRows(
            slots=self.slots[tokens],
            counts=[1] * len(tokens),
            contexts=(contexts[row] + tokens - starts[row]).tolist(),
            tables=self.tables[row],
            block_size=self.block_size,
        )

    @cached_property
    def groups(self) -> PagedGroups:
        """The same rows as padded groups with masks, for backends without kernels of their own."""
        return group_rows(self)

    @cached_property
    def tiles(self) -> QueryTiles:
        """The same rows on their device, for kernels that run there."""
        return cut_rows(self)

    @cached_property
    def several(self) -> SeveralTokens:
        """The rows of several tokens, apart from the others. There must be at least one."""
        return pick_several(self)


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Rows of one token each, with contexts of similar length, next to each other in the batch."""

    start: int
    """Index of the first of them in the flat batch."""
    blocks: Tensor
    """[rows, max_blocks] int64 block ids."""
    mask: Tensor
    """[rows, 1, 1, max_blocks * B] bool, True where there is a token to attend to."""


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """One sequence's run of several tokens."""

    start: int
    """Index of its first token in the flat batch."""
    count: int
    context: int
    """Tokens before these that are in the cache already."""
    blocks: Tensor
    """[ceil((context + count) / B)] int64 block ids; used when there is a context."""
    mask: Tensor | None
    """[count, context + count] bool causal mask; None without a context (plain causal)."""


@dataclass(frozen=True, eq=False)
class PagedGroups:
    """All rows of a batch, one way or the other."""

    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """Rows of one token each, and tiles of the others."""

    extents: Tensor
    """[R, 3] int64: `PagedRows.extents`."""
    singles: int
    """Rows of one token: the first ones."""
    longest: int
    """Tokens of the longest of these, with its context."""
    tiles: Tensor
    """[tiles, 2] int64: of the other rows, the index of a row, and of a tile's first token in it."""


@dataclass(frozen=True, eq=False)
class SeveralTokens:
    """The S last rows of a batch, of which each has more than one token."""

    alone: PagedRows
    """The rows before them, of one token each."""
    first: int
    """Index of their first token in the flat batch."""
    query_ends: Tensor
    """[S + 1] int32: 0, and where each row's tokens end, from `first`."""
    key_ends: Tensor
    """[S + 1] int32: the same with their contexts."""
    most_queries: int
    most_keys: int
    tables: Tensor
    """[S, width] int32."""


def group_rows(rows: PagedRows) -> PagedGroups:
    """See `PagedRows.groups`."""
    singles = next((index for index, count in enumerate(rows.counts) if count != 1), len(rows.counts))
    prefill = []
    start = singles
    for index in range(singles, len(rows.counts)):
        prefill.append(_prefill_row(rows, index, start))
        start += rows.counts[index]
    return PagedGroups(_decode_groups(rows, singles), prefill)


def _decode_groups(rows: PagedRows, singles: int) -> list[DecodeGroup]:
    """The first `singles` rows."""
    groups = []
    size, device = rows.block_size, rows.tables.device
    lengths = [context + 1 for context in rows.contexts[:singles]]
    first = 0
    while first < singles:
        limit = max(lengths[first] * MAX_PADDING_RATIO, 4 * size)
        last = first
        while last < singles and lengths[last] <= limit:
            last += 1
        width = -(-lengths[last - 1] // size)
        seen = torch.tensor(lengths[first:last], device=device)
        mask = torch.arange(width * size, device=device) < seen.unsqueeze(1)
        groups.append(DecodeGroup(first, rows.tables[first:last, :width], mask[:, None, None, :]))
        first = last
    return groups


def _prefill_row(rows: PagedRows, index: int, start: int) -> PrefillRow:
    count, context = rows.counts[index], rows.contexts[index]
    total = context + count
    mask = None
    if context:
        mask = torch.ones(count, total, dtype=torch.bool, device=rows.tables.device).tril(context)
    return PrefillRow(start, count, context, rows.tables[index, : -(-total // rows.block_size)], mask)


def cut_rows(rows: PagedRows) -> QueryTiles:
    """See `PagedRows.tiles`."""
    counts, device = rows.counts, rows.tables.device
    singles = next((index for index, count in enumerate(counts) if count != 1), len(counts))
    tiles = [(index, at) for index in range(singles, len(counts)) for at in range(0, counts[index], TILE_TOKENS)]
    return QueryTiles(
        extents=rows.extents.to(device),
        singles=singles,
        longest=max((context + 1 for context in rows.contexts[:singles]), default=0),
        tiles=torch.tensor(tiles, dtype=torch.int64).view(-1, 2).to(device),
    )


def pick_several(rows: PagedRows) -> SeveralTokens:
    """See `PagedRows.several`."""
    singles, device = rows.tiles.singles, rows.tables.device
    counts = rows.counts[singles:]
    lengths = [count + context for count, context in zip(counts, rows.contexts[singles:], strict=True)]
    ends = torch.tensor([[*accumulate(sizes, initial=0)] for sizes in (counts, lengths)], dtype=torch.int32)
    query_ends, key_ends = ends.to(device)
    return SeveralTokens(
        alone=replace(
            rows,
            slots=rows.slots[:singles],
            counts=rows.counts[:singles],
            contexts=rows.contexts[:singles],
            tables=rows.tables[:singles],
        ),
        first=singles,
        query_ends=query_ends,
        key_ends=key_ends,
        most_queries=max(counts),
        most_keys=max(lengths),
        tables=rows.tables[singles:].to(torch.int32),
    )


def decode_rows(slots: Tensor, tables: Tensor, extents: Tensor, *, block_size: int, longest: int) -> PagedRows:
    """R rows of one token whose layout is known on the device alone: slots [R], tables [R, width], extents [R, 3] as
    `PagedRows.extents`. `longest`: a limit of the tokens of a row, with its context; kernels are launched for it."""
    count = len(slots)
    rows = PagedRows(slots, [1] * count, [longest - 1] * count, tables, block_size)
    none = torch.empty(0, 2, dtype=torch.int64, device=slots.device)
    vars(rows)["tiles"] = QueryTiles(extents, singles=count, longest=longest, tiles=none)  # in place of the host's
    return rows


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One adapter's low-rank factors for one linear, all its adapted parts together. Built when it is loaded."""

    a: Tensor
    """[R, in]: every part's A, one below the other, R the sum of their ranks; so one product shrinks for all."""
    b: tuple[Tensor, ...]
    """Every part's B, each [out of the part, its rank]."""
    columns: tuple[int, ...]
    """First column of each part in the linear's output."""
    scales: Tensor
    """[R]: the scale of the part that each row of `a` belongs to."""
    reach: Tensor | None = field(default=None, kw_only=True)
    """[2, R]: the largest size of each rank's numbers in A and in B, where these are a rank process's share of them;
    None: they are all here."""

    def plain(self) -> LoraFactors:
        """The same as tensors of these shapes in floating point, where a backend has them in a layout of its own."""
        return self


class LoraSegment(NamedTuple):
    """The tokens of a batch that one adapter is for."""

    tokens: Tensor | None
    """[n] int64, ascending indices into the flat batch; None: all of it."""
    factors: LoraFactors


@dataclass(frozen=True, eq=False)
class LoraTable:
    """The adapters of one linear by number, for tokens whose adapters are known on the device alone.

    Kernels read the addresses of factors from the device, so a table serves launches that were recorded before an
    adapter was there. Factors are contiguous, and of the type of the linear's input.
    """

    entries: Tensor
    """[adapters, 3 + 5 * parts] int64: addresses of A and of the scales, rank of A, 0 for an adapter that leaves the
    linear as it is; then for each part the address of its B, its rank, its first rank, its outputs (0: there is no such
    part) and its first column."""
    parts: int
    rank: int
    """Largest rank of an A."""
    part_rank: int
    """Largest rank of a part."""
    widest: int
    """Most outputs of a part."""
    held: tuple[LoraFactors | None, ...]
    """The adapters' factors by number: what `entries` says, for backends that read no addresses."""
