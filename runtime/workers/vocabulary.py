"""The vocabulary, shared out among ranks: each has the embeddings and makes the logits of some of the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.workers.group import SOLO, Group
from runtime.workers.split import Split


class Vocabulary:
    """Which token ids are this rank's, and how what ranks found for theirs comes together."""

    def __init__(self, size: int, group: Group = SOLO) -> None:
        """Raises `ValueError` where a rank would get no token."""
        if -(-size // group.size) * (group.size - 1) >= size:
            raise ValueError(f"a vocabulary of {size} tokens cannot be shared by {group.size} ranks")
        self.split = Split.cut(size, group.rank, group.size)
        self._group = group
        self._size = size
        self.width = -(-size // group.size)
        """Tokens of each rank; the last one may have fewer."""

    def join(self, logits: Tensor) -> Tensor:
        """[R, own] of every rank → [R, vocab] on all."""
        if self._group.size == 1:
            return logits
        padded = F.pad(logits, (0, self.width - logits.shape[1]))
        return self._group.join(padded)[:, : self._size]

    def own(self, token_ids: list[int]) -> list[int]:
        """Columns of this rank's logits that these tokens have there, of those that are here."""
        (ids,) = self.split.ranges
        return [token - ids.start for token in token_ids if token in ids]

    def likeliest(self, best: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Each rank's largest logits [R], NaN if there is one, and their columns [R] int64 → the largest of all, and
        its token. Of equal ones the first, as one rank would: the ranks' tokens are in order."""
        if self._group.size == 1:
            return best, index
        values = torch.stack(self._group.collect(best.contiguous()))
        tokens = torch.stack(self._group.collect((index + self.split.ranges[0].start).contiguous()))
        most, rank = values.max(dim=0)
        return most, tokens.gather(0, rank.unsqueeze(0)).squeeze(0)

    def agree(self, tokens: list[int], device: torch.device) -> list[int]:
        """The first rank's tokens: sums over a distribution may differ in a bit between devices."""
        if self._group.size == 1:
            return tokens
        first: list[int] = self._group.collect(torch.tensor(tokens, device=device))[0].tolist()
        return first
