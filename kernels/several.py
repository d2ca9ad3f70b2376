"""Paged rows of several tokens as variable-length attention wants them, and what is left without them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.interface import PagedRows


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
