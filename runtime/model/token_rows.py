"""Rows of the embedding and of the head that an adapter has in place of the base model's, or beyond them.

PEFT writes single rows as `trainable_token_indices`, and whole copies as `modules_to_save`: here a whole copy is rows
for every id.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Some rows of one matrix [vocabulary, hidden]."""

    ids: Tensor
    """[n] int64, ascending."""
    rows: Tensor
    """[n, hidden]"""
    size: int
    """One more than the highest id."""

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor) -> "TokenRows":
        """Rows of ids in any order, each there once."""
        order = ids.argsort()
        return cls(ids[order], rows[order].contiguous(), int(ids.max()) + 1)

    def covers(self, vocab_size: int) -> bool:
        """True for a copy of a whole matrix of this number of rows, or of one with more."""
        return len(self.ids) == self.size >= vocab_size

    def to(self, device: torch.device, dtype: torch.dtype) -> "TokenRows":
        return TokenRows(self.ids.to(device), self.rows.to(device, dtype), self.size)

    def find(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places [T] int64 of ids [T] among these rows, and a mask [T] bool of the ids that have one."""
        place = torch.searchsorted(self.ids, token_ids).clamp_(max=len(self.ids) - 1)
        return place, self.ids[place] == token_ids

    def replace(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Embeddings [T, hidden] of the ids [T], those with a row here replaced by it."""
        place, found = self.find(token_ids)
        return torch.where(found.unsqueeze(1), self.rows[place].to(hidden.dtype), hidden)


@dataclass(frozen=True, eq=False)
class VocabularyRows:
    """The rows that one adapter brings."""

    embedding: TokenRows | None = None
    head: TokenRows | None = None
    """The same object as `embedding` where the two are tied."""

    @property
    def size(self) -> int:
        """Ids below this have an embedding here, or in the base if that has as many."""
        return max((rows.size for rows in (self.embedding, self.head) if rows is not None), default=0)

    @property
    def values(self) -> int:
        """Number of values that are held, tied rows counted once."""
        return sum(rows.rows.numel() for rows in {id(r): r for r in (self.embedding, self.head) if r}.values())

    def to(self, device: torch.device, dtype: torch.dtype) -> "VocabularyRows":
        embedding = None if self.embedding is None else self.embedding.to(device, dtype)
        if self.head is self.embedding:
            return VocabularyRows(embedding, embedding)
        return VocabularyRows(embedding, None if self.head is None else self.head.to(device, dtype))


Embed = Callable[[Tensor], Tensor]
"""Token ids [T] of the base's vocabulary → [T, hidden]."""


def embed_with(rows: TokenRows, token_ids: Tensor, embed: Embed, *, known: int) -> Tensor:
    """Embeddings [T, hidden] of ids of which only those below `known` are the base's."""
    if rows.covers(known):
        return rows.rows[token_ids]
    return rows.replace(token_ids, embed(token_ids.clamp(max=known - 1)))
