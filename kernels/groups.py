"""Paged rows for backends that attend with dense tensors: gathered, padded and masked.

Rows of one token that have contexts of similar length become one batched call; a row of several tokens is a
call of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.interface import PagedRows

WASTE = 1.5
"""Rows decode together while the longest context of a group is at most this many times the shortest."""


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
        limit = max(lengths[first] * WASTE, 4 * size)
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
