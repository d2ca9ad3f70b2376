"""Paged rows for backends that attend in tiles of queries, on the device of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.interface import PagedRows

TOKENS = 16
"""Tokens of a tile of a row that has several."""


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


def cut_rows(rows: PagedRows) -> QueryTiles:
    """See `PagedRows.tiles`."""
    counts, device = rows.counts, rows.tables.device
    singles = next((index for index, count in enumerate(counts) if count != 1), len(counts))
    tiles = [(index, at) for index in range(singles, len(counts)) for at in range(0, counts[index], TOKENS)]
    return QueryTiles(
        extents=rows.extents.to(device),
        singles=singles,
        longest=max((context + 1 for context in rows.contexts[:singles]), default=0),
        tiles=torch.tensor(tiles, dtype=torch.int64).view(-1, 2).to(device),
    )
